"""Tests of --fallback-on-corrupt: loads an earlier checkpoint with a warning; without it, an error."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint.load import load_latest
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.manifest import CorruptCheckpointError, read_manifest


def damage(path, position, mask=1):
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def test_the_newest_undamaged_checkpoint_is_loaded_with_warnings(kit, tmp_path):
    for iteration in (1, 2, 3):
        kit.save(tmp_path, iteration)
    for iteration in (2, 3):
        damage(tmp_path / f"iter_000000{iteration}" / "__0_0.distcp", -1)
    loaded = kit.zeros_like(kit.tensors())
    path, scalars, skipped = load_latest(find_checkpoint(str(tmp_path)), kit.held(loaded), kit.world, fallback=True)
    assert path.name == "iter_0000001"
    assert scalars == {"iteration": 1}
    assert all(loaded[name].equal(tensor) for name, tensor in kit.tensors(1).items())
    assert [re.search(r"iter_\d+", message)[0] for message in skipped] == ["iter_0000003", "iter_0000002"]


def test_fallback_overwrites_tensors_of_a_damaged_checkpoint(kit, tmp_path):
    tensors = {iteration: {str(name): torch.randn(9) for name in range(5)} for iteration in (1, 2)}
    for iteration, state in tensors.items():
        kit.save(tmp_path, iteration, state)
    file = read_manifest(tmp_path / "iter_0000002").files["__0_0.distcp"]
    damage(tmp_path / "iter_0000002" / "__0_0.distcp", file.parts[-1].start)
    loaded = kit.zeros_like(tensors[1])
    with pytest.raises(CorruptCheckpointError):
        load_latest(find_checkpoint(str(tmp_path)), kit.held(loaded), kit.world)
    assert loaded["0"].equal(tensors[2]["0"])
    load_latest(find_checkpoint(str(tmp_path)), kit.held(loaded), kit.world, fallback=True)
    assert all(loaded[name].equal(tensor) for name, tensor in tensors[1].items())


def test_fallback_is_off_by_default(kit, tmp_path):
    for iteration in (1, 2):
        kit.save(tmp_path, iteration)
    damage(tmp_path / "iter_0000002" / "__0_0.distcp", 5)
    with pytest.raises(CorruptCheckpointError, match="iter_0000002"):
        load_latest(find_checkpoint(str(tmp_path)), kit.held(kit.tensors()), kit.world)


def test_if_all_are_damaged_the_oldest_is_named(kit, tmp_path):
    for iteration in (1, 2):
        kit.save(tmp_path, iteration)
        damage(tmp_path / f"iter_000000{iteration}" / ".metadata", 5)
    with pytest.raises(CorruptCheckpointError, match="iter_0000001"):
        held = kit.held(kit.tensors())
        load_latest(find_checkpoint(str(tmp_path)), held, kit.world, fallback=True)


def test_a_wrong_model_does_not_fall_back(kit, tmp_path):
    for iteration in (1, 2):
        kit.save(tmp_path, iteration)
    with pytest.raises(CheckpointError, match='does not contain the tensor "other"'):
        load_latest(find_checkpoint(str(tmp_path)), kit.held({"other": torch.zeros(1)}), kit.world, fallback=True)


@pytest.fixture(scope="module")
def checkpoint(kit, tmp_path_factory):
    return kit.save(tmp_path_factory.mktemp("save"), 1).path


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_or_missing_byte_is_detected_and_its_file_named(checkpoint, data):
    file = data.draw(st.sampled_from(sorted(checkpoint.iterdir())))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    if data.draw(st.booleans()):
        changed[position] ^= data.draw(st.integers(1, 255))
    else:
        del changed[position]
    try:
        file.write_bytes(changed)
        with pytest.raises(CorruptCheckpointError, match=file.name.replace(".", r"\.")):
            verify_checkpoint(checkpoint)
    finally:
        file.write_bytes(content)
    verify_checkpoint(checkpoint)


def test_an_unknown_manifest_format_is_not_reported_as_damage(kit, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_lite.runs.manifest.FORMAT_VERSION", 99)
    path = kit.save(tmp_path, 1).path
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99") as caught:
        read_manifest(path)
    assert not isinstance(caught.value, CorruptCheckpointError)
