"""Tests of reading metrics.jsonl while it grows and is replaced."""

import json
import math

from megatron_lite.ops import watch_metrics
from megatron_lite.ops.watch_metrics import MetricsReader
from megatron_lite.runs.metrics_file import SPIKE, encode


def iteration(number, loss=1.0, **values):
    return encode(
        {"kind": "iteration", "time": 100.0 + number, "iteration": number, "losses": {"lm loss": loss}, **values}
    )


def test_new_lines_are_read_and_a_torn_end_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    reader.refresh()
    assert not reader.recent
    torn = iteration(3)
    path.write_bytes(iteration(1) + iteration(2) + torn[:20])
    reader.refresh()
    assert [record["iteration"] for record in reader.recent] == [1, 2]
    with path.open("ab") as file:
        file.write(torn[20:])
    reader.refresh()
    assert [record["iteration"] for record in reader.recent] == [1, 2, 3] and reader.last_time == 103.0
    assert reader.curve == {"": [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]}


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.write_bytes(b"".join(iteration(number) for number in range(1, 9)))
    reader = MetricsReader(path)
    reader.refresh()
    aside.write_bytes(b"".join(iteration(number, 2.0) for number in range(1, 12)))
    aside.replace(path)
    reader.refresh()
    assert len(reader.recent) == 11 and reader.curve[""][0] == (1.0, 2.0)
    path.write_bytes(iteration(1))
    reader.refresh()
    assert len(reader.recent) == 1
    path.unlink()
    reader.refresh()
    assert not reader.recent and reader.curve == {}


def test_other_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "start", "time": 1.0, "iteration": 0, "parameters": 7},
        {"kind": "validation", "time": 2.0, "iteration": 5, "losses": {"lm loss": 3.0}},
        {"kind": "validation", "time": 2.0, "iteration": 5, "losses": {"lm loss": 4.0}, "split": "test"},
        {
            "kind": "message",
            "time": 3.0,
            "iteration": 5,
            "text": "WARNING: loss spike: the loss rose to 9.1E+00 in iterations 3 to 5, from",
        },
    ]
    nan = iteration(6, math.nan, rank_seconds=[0.1, 0.2])
    path.write_bytes(b"".join(encode(record) for record in records) + b"damaged\n" + nan)
    reader = MetricsReader(path)
    reader.refresh()
    assert reader.start["parameters"] == 7 and list(reader.rank_seconds) == [[0.1, 0.2]]
    assert reader.curve == {"validation": [(5.0, 3.0)]} and math.isnan(reader.recent[-1]["losses"]["lm loss"])
    assert [(when, match.group(2, 3)) for when, match in reader.spikes] == [(3.0, ("3", "5"))]


def test_a_long_file_is_sampled_except_for_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(watch_metrics, "CHUNK", 4000)
    monkeypatch.setattr(watch_metrics, "FULL_DETAIL", 2000)
    path = tmp_path / "metrics.jsonl"
    lines = [iteration(number) for number in range(1, 1001)]
    lines.insert(500, encode({"kind": "start", "time": 1.0, "iteration": 0}))
    path.write_bytes(b"".join(lines))
    reader = MetricsReader(path)
    reader.refresh()
    numbers = [int(x) for x, _ in reader.curve[""]]
    assert 40 < len(numbers) < 200 and numbers == sorted(numbers)
    assert numbers[-15:] == list(range(986, 1001)) and reader.start


def test_the_message_of_a_spike_is_recognized():
    source = (watch_metrics.Path(watch_metrics.__file__).parent.parent / "lifecycle/spikes.py").read_text("utf-8")
    fixed = "WARNING: loss spike: the loss rose to {spike.loss:.6E} in iterations {spike.first} to {spike.last}, from"
    assert fixed in source
    assert SPIKE.match(fixed.format(spike=type("Spike", (), {"loss": 9.0, "first": 3, "last": 5})))
    assert json.loads(iteration(1))["kind"] == "iteration" and iteration(1).startswith(watch_metrics._ITERATION)
