"""Retention: old checkpoints are deleted once newer ones are on the disk, and never sooner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.checkpoint import writing
from megatron_lite.config.checkpoint import SavePhase
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint, set_latest
from megatron_lite.runs.retention import Retention, expired


@given(st.sets(st.integers(1, 50)), st.integers(1, 50), st.integers(0, 10))
def test_the_newest_are_kept(iterations, newest, keep_last):
    gone = expired(iterations | {newest}, newest, Retention(keep_last))
    kept = sorted((iterations | {newest}) - set(gone))
    past = [iteration for iteration in kept if iteration <= newest]
    assert newest in kept
    assert {iteration for iteration in iterations if iteration > newest} <= set(kept)
    assert not keep_last or len(past) <= keep_last
    assert all(old < new for old in gone for new in past)
    assert keep_last or not gone


def names(root):
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def test_keep_last(kit, tmp_path):
    for iteration in (1, 2, 3):
        report = kit.save(tmp_path, iteration, keep_last=2)
    assert names(tmp_path) == ["iter_0000002", "iter_0000003"]
    assert report.removed == ("iter_0000001",)
    kit.save(tmp_path, 4)
    assert names(tmp_path) == ["iter_0000002", "iter_0000003", "iter_0000004"]


def test_a_failed_save_deletes_nothing(kit, tmp_path, monkeypatch):
    kit.save(tmp_path, 1)
    monkeypatch.setattr(writing, "set_latest", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="No space left"):
        kit.save(tmp_path, 2, keep_last=1)
    assert "iter_0000001" in names(tmp_path)


def test_after_a_rollback_later_checkpoints_do_not_push_out_the_new_ones(kit, tmp_path):
    for iteration in (10, 20, 30):
        kit.save(tmp_path, iteration)
    set_latest(tmp_path, 10)
    kit.save(tmp_path, 15, keep_last=1)
    assert find_checkpoint(str(tmp_path)).name == "iter_0000015"
    assert names(tmp_path) == ["iter_0000015", "iter_0000020", "iter_0000030"]


def test_folders_of_other_programs_stay(kit, tmp_path):
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    for iteration in (2, 3):
        kit.save(tmp_path, iteration, keep_last=1)
    assert names(tmp_path) == ["iter_0000001", "iter_0000003"]


@given(st.sets(st.integers(1, 60)), st.integers(1, 60), st.integers(1, 5), st.integers(0, 7), st.integers(1, 60))
def test_retention_matches_a_direct_computation(iterations, newest, last, every, spike):
    past = sorted(iteration for iteration in iterations | {newest} if iteration <= newest)
    phases = (SavePhase(interval=3, until=20), SavePhase(interval=11))
    kept = set(past) - set(expired(past, newest, Retention(last, every, phases, ((spike, spike + 2),))))
    wanted = set(past[-last:])
    wanted |= {i for i in past if every and i % every == 0}
    wanted |= {i for i in past if i % (3 if i <= 20 else 11) == 0}
    wanted |= set([i for i in past if i < spike][-1:]) | set([i for i in past if i >= spike + 2][:1])
    assert kept == wanted


def test_the_checkpoint_before_a_spike_is_kept_while_the_loss_is_high(kit, tmp_path):
    for iteration in (10, 20, 30, 40):
        kit.save(tmp_path, iteration, retention=Retention(1, spikes=((15, None),) if iteration > 10 else ()))
    assert names(tmp_path) == ["iter_0000010", "iter_0000040"]
    kit.save(tmp_path, 50, retention=Retention(1, spikes=((15, 35),)))
    assert names(tmp_path) == ["iter_0000010", "iter_0000040", "iter_0000050"]
    kit.save(tmp_path, 60, retention=Retention(1, spikes=((15, 35),)))
    assert names(tmp_path) == ["iter_0000010", "iter_0000040", "iter_0000060"]


def test_keep_every(kit, tmp_path):
    for iteration in range(1, 8):
        kit.save(tmp_path, iteration, retention=Retention(1, every=3))
    assert names(tmp_path) == ["iter_0000003", "iter_0000006", "iter_0000007"]
