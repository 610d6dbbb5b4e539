import errno
import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import DataError, TrainingError
from megatron_lite.metrics.jsonl import JsonlSink
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.runs.metrics_file import decode, encode, prepare, read_records, seconds_of

CONFIG = RunConfig(
    model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
    batch=BatchConfig(seq_length=8, micro_batch_size=1),
)


def report(iteration, loss=2.0):
    return IterationReport(
        iteration=iteration,
        train_iterations=10,
        consumed_train_samples=iteration,
        consumed_train_tokens=8 * iteration,
        losses={"lm loss": loss},
        learning_rate=0.0,
        global_batch_size=1,
        seq_length=8,
        num_zeros=0,
        seconds=0.1,
        tokens_per_second=80.0,
    )


def evaluation(iteration, at_end=False):
    return ValidationReport(
        iteration=iteration, consumed_train_samples=iteration, losses={"lm loss": 2.0}, at_end=at_end
    )


@pytest.fixture(autouse=True)
def constant_time(monkeypatch):
    monkeypatch.setattr("megatron_lite.metrics.jsonl.time", SimpleNamespace(time=lambda: 0.0))


def facts(start=0):
    return RunFacts(parameters=100, train_iterations=10, start_iteration=start)


def write(path, start, iterations, end=True):
    """Write a run from `start` over `iterations`, with an evaluation after every second one and at the end."""
    sink = JsonlSink(path)
    sink.start(CONFIG, facts(start))
    for iteration in iterations:
        sink.iteration(report(iteration, loss=1.0 / iteration))
        if iteration % 2 == 0:
            sink.validation(evaluation(iteration))
    if end:
        sink.validation(evaluation(iterations[-1], at_end=True))
        sink.close()
    return sink


def measured(path):
    return [record for record in read_records(path) if record["kind"] not in ("start", "discarded")]


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_floats_roundtrip_bit_for_bit(value):
    record = decode(encode({"kind": "iteration", "losses": {"lm loss": value}}))
    back = record["losses"]["lm loss"]
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert math.copysign(1, back) == math.copysign(1, value) or math.isnan(value)


def test_every_line_is_strict_json():
    def refuse(name):
        raise AssertionError(name)

    line = encode({"kind": "iteration", "grad_norm": math.inf, "loss": math.nan, "low": [-math.inf]})
    record = json.loads(line, parse_constant=refuse)
    assert (record["grad_norm"], record["loss"], record["low"]) == ("Infinity", "NaN", ["-Infinity"])


def test_zeros_are_kept_and_unknown_values_omitted(tmp_path):
    write(tmp_path / "m.jsonl", 0, [1])
    record = next(record for record in read_records(tmp_path / "m.jsonl") if record["kind"] == "iteration")
    assert record["num_zeros"] == 0 and record["learning_rate"] == 0.0 and record["skipped"] == 0
    assert "mfu" not in record and "params_norm" not in record


def test_the_start_holds_the_whole_configuration(tmp_path):
    write(tmp_path / "deep" / "m.jsonl", 0, [1])
    start = read_records(tmp_path / "deep" / "m.jsonl")[0]
    assert start["config"]["model"]["hidden_size"] == 8 and start["parameters"] == 100


def test_a_resumed_file_reads_as_one_run(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole, 0, range(1, 11))
    write(resumed, 0, range(1, 8), end=False)  # killed after 7, saved at 4
    write(resumed, 4, range(5, 11))
    assert measured(resumed) == measured(whole)


def test_a_longer_run_drops_the_end_of_the_shorter_one(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole, 0, range(1, 11))
    write(resumed, 0, range(1, 5))
    write(resumed, 4, range(5, 11))
    assert measured(resumed) == measured(whole)


def test_resuming_twice_changes_nothing_but_the_starts(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, range(1, 5))
    for _ in range(2):
        sink = JsonlSink(path)
        sink.start(CONFIG, facts(4))
        sink.validation(evaluation(4, at_end=True))
        sink.close()
    assert sum(record.get("at_end", False) for record in measured(path)) == 1
    assert [record["iteration"] for record in read_records(path) if record["kind"] == "start"] == [0, 4, 4]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 100_000), resumed=st.integers(1, 6))
def test_a_kill_at_any_byte_is_repaired(tmp_path_factory, cut, resumed):
    folder = tmp_path_factory.mktemp("torn")
    write(folder / "full.jsonl", 0, range(1, 7), end=False).close()
    content = (folder / "full.jsonl").read_bytes()
    first = content.index(b"\n") + 1
    torn = content[: first + cut % (len(content) - first)]
    path = folder / "m.jsonl"
    path.write_bytes(torn)
    prepare(path, resumed)
    kept = path.read_bytes()
    assert kept == b"" or kept.endswith(b"\n")
    kept = b"".join(line for line in kept.splitlines(True) if decode(line)["kind"] != "discarded")
    for line in kept.splitlines():
        assert decode(line)["iteration"] <= resumed
    before = [line for line in content.splitlines(True) if decode(line)["iteration"] <= resumed]
    assert kept == b"".join(before[: len(kept.splitlines())])
    assert len(kept.splitlines()) >= min(len(before), torn.count(b"\n"))
    assert [entry.name for entry in folder.iterdir() if entry.name.startswith(".")] == []


def test_the_time_of_removed_lines_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, range(1, 8), end=False).close()
    spike = "WARNING: loss spike: the loss rose to NAN in iterations 5 to 6"
    with path.open("ab") as file:
        file.write(encode({"kind": "start", "iteration": 7, "time": 8.0, "after_rollback": True}))
        file.write(encode({"kind": "message", "iteration": 7, "time": 9.0, "text": spike}))
    write(path, 4, [5, 6], end=False).close()  # 5, 6 and 7 again
    first = [record for record in read_records(path) if record["kind"] == "discarded"]
    assert [(one["iteration"], one["iterations"], one["starts"]) for one in first] == [(4, 3, 0)]
    assert first[0]["seconds"] == pytest.approx(0.3)
    prepare(path, 2)  # a rollback discards that start, too
    (sum_of_all,) = [record for record in read_records(path) if record["kind"] == "discarded"]
    assert (sum_of_all["iteration"], sum_of_all["iterations"], sum_of_all["starts"]) == (2, 7, 1)
    assert sum_of_all["spikes"] == [{"time": 9.0, "text": spike}]
    assert sum_of_all["seconds"] == pytest.approx(0.7)
    before = path.read_bytes()
    prepare(path, 2)
    assert path.read_bytes() == before


def test_seconds_of_records():
    average = {"kind": "validation", "name": "average-EMA", "seconds": 5.0}
    save = {"kind": "save", "seconds": 9.0, "blocking_seconds": 2.0}
    start, message = {"kind": "start", "startup_seconds": 3.0}, {"kind": "message"}
    assert [seconds_of(record) for record in (average, save, start, message)] == [0.0, 2.0, 3.0, 0.0]
    assert seconds_of({"kind": "validation", "name": "wiki", "seconds": 5.0}) == 5.0


def test_zeros_after_a_power_cut_are_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, [1, 2], end=False).close()
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 700 + b"\n" + b"\0" * 30)
    prepare(path, 2)
    assert path.read_bytes() == good


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 0, [1, 2, 3], end=False).close()
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join([*lines[:2], b'{"kind": "iter\n', *lines[2:]]))
    with pytest.raises(DataError, match=r"m\.jsonl is not a metrics file, or it is damaged: line 3 "):
        prepare(path, 2)


def test_a_foreign_file_is_never_truncated(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nof two lines\n")
    with pytest.raises(DataError, match=r"notes\.txt is not a metrics file, or it is damaged: line 1 "):
        prepare(path, 5)
    assert path.read_text(encoding="utf-8") == "my notes\nof two lines\n"


def test_a_fresh_start_moves_the_old_run_aside(tmp_path):
    path, told = tmp_path / "metrics.jsonl", []
    write(path, 0, [1, 2])
    old = path.read_bytes()
    sink = JsonlSink(path, notify=told.append)
    sink.start(CONFIG, facts())
    sink.close()
    assert (tmp_path / "metrics.previous-1.jsonl").read_bytes() == old
    assert "metrics.previous-1.jsonl" in told[0]
    assert measured(path) == []
    # Nothing was measured since: the next start goes on in the same file.
    sink = JsonlSink(path, notify=told.append)
    sink.start(CONFIG, facts())
    sink.close()
    assert len(told) == 1 and len(read_records(path)) == 2


def test_lines_are_written_before_the_file_is_closed(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = write(path, 0, [1], end=False)
    sink.message("saving checkpoint")
    assert measured(path)[-1] == {"kind": "message", "time": 0.0, "iteration": 1, "text": "saving checkpoint"}
    sink.close()


def test_messages_before_the_start_follow_it(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.message("WARNING: other data")
    assert not path.exists()
    sink.start(CONFIG, facts(start=4))
    sink.close()
    start, message = read_records(path)
    assert (start["kind"], message["kind"], message["text"]) == ("start", "message", "WARNING: other data")
    assert message["iteration"] == 4 and message["time"] <= start["time"]


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "none.jsonl")


def test_a_full_disk_is_a_training_error(tmp_path):
    sink = write(tmp_path / "m.jsonl", 0, [1], end=False)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    sink._file.close()
    sink._file = Full()
    with pytest.raises(TrainingError, match=r"m\.jsonl: No space left on device.*--metrics-file"):
        sink.iteration(report(2))


def test_an_unwritable_folder_is_a_training_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="--metrics-file"):
        JsonlSink(tmp_path / "file" / "m.jsonl").start(CONFIG, facts())
