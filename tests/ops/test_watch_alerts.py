"""Tests of the alerts: each rule, and that each is sent once until it clears."""

import dataclasses
import json
import math

import pytest

from megatron_lite.ops.watch import RankTime, RunStatus
from megatron_lite.ops.watch_alerts import (
    ALERTS_NAME,
    KINDS,
    SPIKE_SECONDS,
    Alert,
    AlertRecord,
    Thresholds,
    find_alerts,
)
from megatron_lite.ops.watch_job import JobStatus

NOW = 1_800_000_000.0
HEALTHY = RunStatus(
    run="runs/a",
    job=JobStatus(state="running", reason="process 1 on n1"),
    iteration=1000,
    age=60.0,
    loss=2.0,
    validation={},
    checkpoint_size=1000,
    free=10_000,
    ranks=[RankTime(rank=rank, host=f"n{rank // 2}", seconds=1.0, ratio=1.0) for rank in range(4)],
)
LOSSES = [2.0] * 40


def kinds(losses=LOSSES, **changes):
    found = find_alerts(dataclasses.replace(HEALTHY, **changes), losses, Thresholds(), NOW)
    assert all(alert.kind in KINDS and alert.message.startswith("runs/a: ") for alert in found)
    return [alert.kind for alert in found]


def job(state, reason="it ended", **values):
    return JobStatus(state=state, reason=reason, **values)


def test_a_healthy_run_has_none():
    assert kinds() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"job": job("stopped", "error: no disk")}, ["not-running"]),
        ({"job": job("killed")}, ["not-running"]),
        ({"job": job("missing")}, ["not-running"]),
        ({"job": job("killed", queue_problem="squeue failed")}, []),
        ({"job": job("stopped", wanted=False)}, []),
        ({"job": job("completed", wanted=False), "free": 0}, []),
        ({"job": job("queued"), "age": 1e6}, []),
        ({"age": 1801.0}, ["stalled"]),
        ({"job": job("paused"), "age": 1801.0}, ["stalled"]),
        ({"job": job("starting"), "age": 1801.0, "iteration": None}, ["stalled"]),
        ({"loss": math.nan}, ["nan"]),
        (
            {"job": job("stopped", "error on n1, rank 0: Iteration 7 has loss nan and gradient norm")},
            ["not-running", "nan"],
        ),
        ({"losses": [*LOSSES, 5.0, 6.0, 7.0]}, ["spike"]),
        ({"losses": [*LOSSES, 5.0, 2.0, 7.0]}, []),
        ({"losses": [2.0, 5.0, 6.0, 7.0]}, []),
        ({"last_spike": (NOW - 60, "WARNING: loss spike: high")}, ["spike"]),
        ({"last_spike": (NOW - SPIKE_SECONDS - 1, "WARNING: loss spike: high")}, []),
        ({"free": 2099}, ["disk"]),
        ({"free": 2099, "keeps_all": False}, []),
        ({"free": 1099, "keeps_all": False}, ["disk"]),
        ({"ranks": [RankTime(rank=3, host="n1", seconds=2.0, ratio=1.31)]}, ["slow-rank"]),
    ],
)
def test_rules(changes, expected):
    assert kinds(**changes) == expected


def test_slow_ranks_are_named_by_host():
    ranks = [RankTime(rank=rank, host=f"n{rank // 8}", seconds=2.0, ratio=2.0) for rank in range(9)]
    found = find_alerts(dataclasses.replace(HEALTHY, ranks=ranks), LOSSES, Thresholds(), NOW)
    assert [alert.key for alert in found] == ["slow-rank n0", "slow-rank n1"]
    assert "rank 0, 1, 2, 3, 4, 5, 6, 7; rank 0 computes for 2.000 s, 2.00 times the median" in found[0].message


def test_an_alert_is_sent_once_until_it_clears_also_by_another_process(tmp_path):
    sent, notes = [], []

    def update(*alerts, works=True):
        AlertRecord(tmp_path, notes.append).update(alerts, lambda alert: sent.append(alert.key) or works)

    first, other = Alert("disk", "full"), Alert("slow-rank", "slow", "n1")
    update(first)
    update(first, other)
    update(first, other)
    assert sent == ["disk", "slow-rank n1"]
    assert json.loads((tmp_path / ALERTS_NAME).read_text())["disk"]["message"] == "full"
    update(other)
    update(first, other)
    assert sent == ["disk", "slow-rank n1", "disk"]
    update()
    update(first, works=False)
    update(first)
    assert sent[3:] == ["disk", "disk"] and notes == [], "an alert that could not be sent is sent again"


def test_a_damaged_record_and_a_folder_that_cannot_be_written(tmp_path):
    sent, notes = [], []
    (tmp_path / ALERTS_NAME).write_text("{")
    record = AlertRecord(tmp_path, notes.append)
    record.update([Alert("nan", "NaN")], lambda alert: sent.append(alert.key) or True)
    assert "cannot read" in notes[0] and sent == ["nan"]
    (tmp_path / ALERTS_NAME).unlink()
    (tmp_path / ALERTS_NAME).mkdir()
    record.update([], lambda alert: True)
    assert "cannot write" in notes[-1]
    missing = AlertRecord(tmp_path / "none", notes.append)
    for _ in range(2):
        missing.update([Alert("not-running", "missing")], lambda alert: sent.append(alert.key) or True)
    assert sent == ["nan", "not-running"]
