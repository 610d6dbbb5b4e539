"""Tests of read plans: a rank reads its own parts once, and the ranks together verify the others."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import load as load_module
from megatron_lite.checkpoint import tiles
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.reading import CheckpointReader, ReadPlan
from megatron_lite.checkpoint.save import deduplicate, save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.manifest import CorruptCheckpointError, Provenance, read_manifest

SHAPES = {"fc1": (256, 64), "fc2": (64, 256), "gated": (2, 128, 64)}
SPLIT = {"fc1": 0, "fc2": 1, "gated": 1}
MIN_TILE = 2048


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "MIN_TILE", MIN_TILE)
        patch.setattr(tiles, "MAX_TILE", 8 * MIN_TILE)
        yield


@pytest.fixture(scope="module")
def path(kit, tmp_path_factory):
    tensors = {f"{layer}.{name}": torch.randn(shape) for layer in range(4) for name, shape in SHAPES.items()}
    return kit.save(tmp_path_factory.mktemp("one"), 1, tensors).path


def held(layers, tp=1, t=0, dp=1, d=0):
    """State of the layers on a rank under tensor parallelism, or its flat shard under ZeRO-1."""
    tensors = []
    for layer in layers:
        for name, shape in SHAPES.items():
            local = tuple(size // tp if dim == SPLIT[name] else size for dim, size in enumerate(shape))
            offset = tuple(t * local[dim] if dim == SPLIT[name] else 0 for dim in range(len(shape)))
            pieces = [Piece(offset, torch.zeros(local))]
            tensors.append(GlobalTensor(f"{layer}.{name}", shape, torch.float32, pieces, replica=(d, dp)))
    return deduplicate(tensors)


def plan(path, tensors):
    return CheckpointReader(path).plan([(tensor, tensor.name) for tensor in tensors])


def elements(tensors):
    return sum(piece.tensor.nbytes for tensor in tensors for piece in tensor.pieces)


def headers(plan):
    return 2000 * len(plan.parts)


@pytest.mark.parametrize("layout", [{"tp": 2, "t": 1}, {"tp": 4, "t": 2}])
def test_tensor_parallel_ranks_read_no_more_than_they_hold(path, layout):
    tensors = held(range(4), **layout)
    assert 0 < plan(path, tensors).size - elements(tensors) <= headers(plan(path, tensors))


def test_pipeline_stages_read_only_their_layers(path):
    tensors = held([2])
    assert 0 < plan(path, tensors).size - elements(tensors) <= headers(plan(path, tensors))


@pytest.mark.parametrize("d", range(4))
def test_a_zero1_shard_reads_at_most_one_extra_row_of_tiles_at_each_end(path, d):
    tensors = held(range(4), dp=4, d=d)
    row = max(prod(shape) * 4 / tiles.grid(shape, 4)[0] for shape in SHAPES.values())
    assert plan(path, tensors).size - elements(tensors) <= headers(plan(path, tensors)) + 2 * row


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rectangles_are_filled_and_nothing_else_is_read(path, data):
    reader = CheckpointReader(path)
    name = data.draw(st.sampled_from(sorted(reader.tensors)))
    shape = reader.tensors[name].shape
    pieces = []
    for _ in range(data.draw(st.integers(0, 3))):
        offset = tuple(data.draw(st.integers(0, size)) for size in shape)
        extent = [data.draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True)]
        pieces.append(Piece(offset, torch.zeros(extent)))
    whole = reader.read(name, Rectangle.full(shape))
    reading = reader.plan([(GlobalTensor(name, shape, torch.float32, pieces), name)])
    reading.read()
    for piece in pieces:
        where = tuple(slice(a, a + b) for a, b in zip(piece.offset, piece.tensor.shape, strict=True))
        assert piece.tensor.equal(whole[where])
    assert bool(reading.parts) == any(piece.tensor.numel() for piece in pieces)


def test_a_checkpoint_with_a_missing_piece_is_refused(path):
    manifest = read_manifest(path)
    saved = manifest.tensors["0.fc1"]
    fewer = {**manifest.tensors, "0.fc1": type(saved)(saved.shape, saved.dtype, saved.pieces[1:])}
    broken = type(manifest)(**{**vars(manifest), "tensors": fewer})
    with pytest.raises(CheckpointError, match=r"[\d,]+ of the 16,384 elements of the tensor 0\.fc1"):
        ReadPlan(path, broken, [(tensor, tensor.name) for tensor in held([0])])


def test_ranks_together_read_each_part_once(kit, path, tmp_path, on_ranks, monkeypatch):
    """Load two of four layers in two pipeline stages: parts that neither needs are verified by one rank."""

    def load(world):
        checked = []
        inner = load_module.verify_parts

        def counted(path, parts):
            checked.extend((path.name, part.start) for part in parts)
            inner(path, parts)

        monkeypatch.setattr(load_module, "verify_parts", counted)
        monkeypatch.setattr(load_module, "_check_none_left_over", lambda *_: None)
        tensors = held([world.rank])
        load_checkpoint(path, tensors, world)
        manifest = read_manifest(path)
        read = [(name, manifest.files[name].parts[part].start) for name, part in plan(path, tensors).parts]
        every = [part for parts in world.all_gather_object(checked + read) for part in parts]
        assert sorted(every) == sorted(
            (name, part.start) for name, file in manifest.files.items() for part in file.parts
        )

    on_ranks(2, load)


def test_damage_to_parts_that_no_rank_needs_fails_the_load(tmp_path, on_ranks):
    def tensors():
        pieces = [Piece((0,), torch.randn(64))]
        names = ("w", "optimizer.exp_avg.w", "optimizer.exp_avg_sq.w")
        return [GlobalTensor(name, (64,), torch.float32, pieces) for name in names]

    def load(world):
        mine = tensors() if world.rank == 0 else []
        path = save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), mine, world).path
        load_checkpoint(path, tensors(), world, weights_only=True)
        file = path / "__0_0.distcp"
        for part in read_manifest(path).files[file.name].parts:
            content = bytearray(file.read_bytes())
            world.barrier()
            if world.rank == 0:
                content[part.start + part.length - 1] ^= 1
                file.write_bytes(content)
            world.barrier()
            with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp is damaged"):
                load_checkpoint(path, tensors(), world, weights_only=True)
            world.barrier()
            if world.rank == 0:
                content[part.start + part.length - 1] ^= 1
                file.write_bytes(content)
            world.barrier()

    on_ranks(2, load)
