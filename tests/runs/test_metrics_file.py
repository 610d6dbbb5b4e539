"""Tests of reading metrics.jsonl: durations of saves."""

from megatron_lite.runs.metrics_file import encode, slowest_save


def test_the_slowest_of_the_newest_saves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert slowest_save(path) == 0.0
    lines = [encode({"kind": "save", "iteration": number, "seconds": 100.0 / number}) for number in range(1, 31)]
    path.write_bytes(b"".join(lines) + encode({"kind": "message", "text": "save"}) + lines[0][:20])
    assert slowest_save(path) == 100.0 / 11
