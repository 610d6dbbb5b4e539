import io
import re
from datetime import datetime

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.metrics.console import (
    ConsoleSink,
    LogInterval,
    format_iteration,
    format_memory,
    format_timers,
    format_validation,
    line_writer,
)
from megatron_lite.metrics.report import IterationReport, ValidationReport

NOW = datetime(2026, 8, 1, 12, 0, 0, 123456)


def report(iteration=100, **changes):
    values = {
        "train_iterations": 311541,
        "consumed_train_samples": 16 * iteration,
        "consumed_train_tokens": 16 * 2048 * iteration,
        "losses": {"lm loss": 2.5},
        "learning_rate": 1e-4,
        "global_batch_size": 16,
        "seq_length": 2048,
        "seconds": 2.0,
        "tokens_per_second": 16384.0,
    }
    return IterationReport(iteration=iteration, **{**values, **changes})


def line_of(*reports):
    window = LogInterval()
    for entry in reports:
        window.add(entry)
    return format_iteration(reports[-1], window.take(), NOW)


def test_megatrons_fields_precede_additional_ones():
    full = report(
        losses={"lm loss": 6.681113},
        loss_scale=4096.0,
        grad_norm=1.2345,
        num_zeros=17,
        params_norm=301.5,
        tflops_per_device=123.45,
        mfu=0.3956,
        eta_seconds=90061,
    )
    assert line_of(full) == (
        " [2026-08-01 12:00:00.123456] iteration      100/  311541 | consumed samples:         1600 |"
        " elapsed time per iteration (ms): 2000.0 | throughput per GPU (TFLOP/s/GPU): 123.5 |"
        " learning rate: 1.000000E-04 | global batch size:    16 | lm loss: 6.681113E+00 | loss scale: 4096.0 |"
        " grad norm: 1.234 | num zeros: 17 | params norm: 301.500 | number of skipped iterations:   0 |"
        " number of nan iterations:   0 | tokens/s: 16384.0 | MFU: 39.6% | ETA: 1d 01:01:01 |"
    )


def test_unknown_values_are_omitted():
    line = line_of(report())
    for name in ("throughput", "grad norm", "num zeros", "params norm", "MFU", "ETA", "skipped samples"):
        assert name not in line
    assert " | skipped samples:          320 | elapsed" in line_of(report(skipped_train_samples=320))


def test_losses_are_averaged_over_applied_iterations_and_times_over_all():
    line = line_of(
        report(98, losses={"lm loss": 3.0}, seconds=1.0),
        report(99, losses={"lm loss": float("nan")}, skipped=1, nan=1, seconds=4.0),
        report(100, losses={"lm loss": 2.0}, seconds=1.0),
    )
    assert "lm loss: 2.500000E+00 |" in line
    assert "elapsed time per iteration (ms): 2000.0 |" in line
    assert "number of skipped iterations:   1 | number of nan iterations:   1 |" in line
    assert "tokens/s: 16384.0 |" in line


def test_a_loss_not_above_zero_is_omitted():
    assert "lm loss" not in line_of(report(skipped=1))
    assert "lm loss" not in line_of(report(losses={"lm loss": float("nan")}))


def test_source_losses_are_averaged_over_the_iterations_with_samples():
    line = line_of(
        report(99, losses={"lm loss": 3.0, "lm loss wiki": 4.0}),
        report(100, losses={"lm loss": 2.0, "lm loss oscar": 1.0}),
    )
    assert "lm loss: 2.500000E+00 | lm loss wiki: 4.000000E+00 | lm loss oscar: 1.000000E+00 |" in line


@given(
    st.lists(
        st.tuples(st.floats(0.001, 1e4), st.integers(1, 4096), st.floats(1e-3, 100), st.integers(0, 1)),
        min_size=1,
        max_size=20,
    )
)
def test_every_line_can_be_parsed(rows):
    reports = [
        report(number, losses={"lm loss": loss}, global_batch_size=batch, seconds=seconds, skipped=skipped)
        for number, (loss, batch, seconds, skipped) in enumerate(rows, 1)
    ]
    line = line_of(*reports)
    fields = dict(field.split(": ", 1) for field in line.rstrip(" |").split(" | ")[1:])
    assert all(re.fullmatch(r" *[-+.0-9E:%d ]+", value) for value in fields.values())
    advanced = [loss for loss, *_, skipped in rows if not skipped]
    assert ("lm loss" in fields) == bool(advanced)
    if advanced:
        assert abs(float(fields["lm loss"]) - sum(advanced) / len(advanced)) <= 1e-5 * max(advanced)
    assert int(fields["number of skipped iterations"]) == len(rows) - len(advanced)


def test_one_line_per_interval_and_for_an_incomplete_one():
    stream = io.StringIO()
    sink = ConsoleSink(line_writer(stream), log_interval=3)
    for iteration in range(1, 9):
        # Measured once, within an interval.
        memory = {"allocated": 2**20, "max_allocated": 2**21} if iteration == 1 else {}
        sink.iteration(report(iteration, memory=memory))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split("iteration")[1].split("/")[0]) for line in lines if " iteration " in line] == [3, 6, 8]
    assert lines[1] == "[Rank 0] (after 3 iterations) memory (MB) | allocated: 1.0 | max allocated: 2.0"
    assert len(lines) == 4


def test_the_last_iteration_is_printed():
    lines = []
    sink = ConsoleSink(lines.append, log_interval=100)
    sink.iteration(report(7, train_iterations=7))
    assert len(lines) == 1
    sink.close()
    assert len(lines) == 1


def test_timers_are_milliseconds_per_iteration():
    lines = []
    sink = ConsoleSink(lines.append, log_interval=2)
    sink.iteration(report(1, timers={"forward-backward": 0.001, "optimizer": 0.004}))
    sink.iteration(report(2, timers={"forward-backward": 0.003, "optimizer": 0.004}))
    assert lines[1] == "time (ms) | forward-backward: 2.00 | optimizer: 4.00"
    assert format_timers({"a": 0.5}) == "time (ms) | a: 500.00"
    assert format_memory({"reserved": 0}, 5, rank=3).startswith("[Rank 3] (after 5 iterations)")


def test_reserved_memory_equal_to_allocated_is_omitted():
    gpu = {"allocated": 1 << 20, "max_allocated": 2 << 20, "reserved": 3 << 20, "max_reserved": 4 << 20}
    fields = "allocated: 1.0 | max allocated: 2.0"
    assert format_memory(gpu, 5, rank=0).endswith(f"(MB) | {fields} | reserved: 3.0 | max reserved: 4.0")
    cpu = {**gpu, "reserved": 1 << 20, "max_reserved": 2 << 20}
    assert format_memory(cpu, 5, rank=0).endswith(f"(MB) | {fields}")


def test_validation_lines():
    text = format_validation(ValidationReport(iteration=200, consumed_train_samples=1, losses={"lm loss": 1.0}))
    dashes, line, again = text.split("\n")
    assert line == "validation loss at iteration 200 | lm loss value: 1.000000E+00 | lm loss PPL: 2.718282E+00 | "
    assert dashes == again == "-" * (len(line) + 1)


def test_validation_lines_of_named_sets_and_at_the_end():
    end = ValidationReport(
        iteration=9, consumed_train_samples=1, losses={"lm loss": 99.0}, split="test", name="wiki", at_end=True
    )
    line = format_validation(end).split("\n")[1]
    assert line.startswith("validation-wiki loss at iteration 9 on test set | ")
    assert "PPL: 4.851652E+08" in line
