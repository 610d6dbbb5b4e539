"""Order of enqueuing iterations and reading their outcomes, and the numbers that are reported."""

import pytest
from support.host_reads import NoHostReads
from support.trainer import command, iterations, measured

from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.runs.metrics_file import read_records
from megatron_lite.train.native import NativeEngine

pytestmark = pytest.mark.slow

JOB = ("--train-iters", 6, "--save-interval", 4, "--eval-interval", 100, "--log-interval", 100)


@pytest.fixture
def events(monkeypatch):
    """Record what is enqueued and read, and let no other host read happen in an iteration."""
    found, guards = [], []
    step, later = NativeEngine.train_step, CpuBackend.read_later

    def train_step(self, plan, read, rates):
        def unwatched(function):
            def call(*args):
                with guards[-1].allowed():
                    return function(*args)

            return call

        found.append(f"begin {plan.iteration}")
        with NoHostReads() as guard:
            guards.append(guard)
            pending = step(self, plan, unwatched(read), unwatched(rates))
        found.append(f"enqueued {plan.iteration}")
        return pending

    def read_later(self, values):
        number = next(event.split()[1] for event in reversed(found) if event.startswith("begin"))
        reading = later(self, values)

        def read():
            found.append(f"read {number}")
            return reading()

        return read

    monkeypatch.setattr(NativeEngine, "train_step", train_step)
    monkeypatch.setattr(CpuBackend, "read_later", read_later)
    return found


@pytest.mark.parametrize("precision", [(), ("--bf16",), ("--fp16", "--initial-loss-scale", 1024)], ids=str)
def test_an_outcome_is_read_while_the_next_iteration_is_in_flight(precision, corpus, events, tmp_path):
    args = corpus.job(*JOB, "--eval-iters", 0, "--reset-attention-mask", "--eod-mask-loss", *precision)
    assert command(*args, "--save", tmp_path / "run").code == 0
    one, two, three = (["begin 1", "enqueued 1"], ["begin 2", "enqueued 2"], ["begin 3", "enqueued 3"])
    if "--fp16" in precision:  # the overflow flag is needed before the optimizer's step
        assert events[:8] == [*one, "begin 2", "read 1", "enqueued 2", "begin 3", "read 2", "enqueued 3"]
    else:
        assert events[:8] == [*one, *two, "read 1", *three, "read 2"]
    # Before a save and at the end, all outcomes are read.
    assert events.index("read 4") < events.index("begin 5")
    assert events[-1] == "read 6"
    assert iterations(tmp_path / "run") == list(range(1, 7))


def test_reported_numbers_do_not_depend_on_when_they_are_read(corpus, tmp_path):
    late, at_once = tmp_path / "late", tmp_path / "at_once"
    for folder, level in ((late, 0), (at_once, 1)):
        args = corpus.job(*JOB, "--timing-log-level", level, "--fp16", "--hysteresis", 1, "--log-num-zeros-in-grad")
        assert command(*args, "--save", folder).code == 0
    timed = {"seconds", "tokens_per_second", "tflops_per_device", "mfu", "eta_seconds", "memory", "timers", "time"}
    ours, theirs = (
        [{name: value for name, value in record.items() if name not in timed} for record in measured(folder)]
        for folder in (late, at_once)
    )
    assert ours == theirs


def test_the_next_iteration_reports_the_parts_of_a_measured_one(corpus, tmp_path):
    save = tmp_path / "run"
    assert command(*corpus.job(*JOB, "--train-iters", 22, "--log-interval", 5, "--save", save)).code == 0
    records = {one["iteration"]: one for one in read_records(save / "metrics.jsonl") if one["kind"] == "iteration"}
    assert [iteration for iteration, one in records.items() if "parts" in one] == [11, 21]
    for iteration in (10, 20):
        parts = records[iteration + 1]["parts"]
        assert list(parts) == ["compute", "data", "gradients", "optimizer"] and min(parts.values()) > 0.0
        assert sum(parts.values()) <= records[iteration]["seconds"], "the parts are within the iteration"
    assert command("report", save).code == 0
    page = (save / "report.html").read_text(encoding="utf-8")
    assert "measured in 2 of them" in page and "--log-interval 5" in page and "<i class='mark restart'>" not in page
