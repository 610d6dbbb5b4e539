"""Tests of save deduplication: replicas write equal parts of their common tensors, each element once."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.save import deduplicate, save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.manifest import Provenance

SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=6)


def held_by(shapes, replica, count, dtypes=(torch.float32, torch.bfloat16)):
    """State of one of `count` replicas: numbered elements, and in the end a tensor of this replica alone."""
    tensors = []
    for number, shape in enumerate(shapes):
        values = torch.arange(int(np.prod(shape))).reshape(shape).to(dtypes[number % len(dtypes)])
        piece = Piece(tuple(2 for _ in shape), values)
        whole = tuple(size + 2 for size in shape)
        tensors.append(GlobalTensor(f"{number}", whole, values.dtype, [piece], replica == 0, (replica, count)))
    own = torch.full((3,), float(replica))
    tensors.append(GlobalTensor("own", (3 * count,), own.dtype, [Piece((3 * replica,), own)]))
    tensors.append(GlobalTensor("copy", (3,), own.dtype, [Piece((0,), own)], False))
    return tensors


@given(SHAPES, st.integers(1, 5))
def test_each_element_has_one_writer(shapes, count):
    written = {f"{number}": np.zeros(tuple(size + 2 for size in shape), int) for number, shape in enumerate(shapes)}
    written["own"] = np.zeros(3 * count, int)
    for replica in range(count):
        shared = deduplicate(held_by(shapes, replica, count))
        assert not [piece for tensor in shared if tensor.name == "copy" for piece in tensor.pieces]
        for tensor in shared:
            for piece in tensor.pieces:
                assert tensor.write
                place = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.tensor.shape, strict=True))
                written[tensor.name][place] += 1
                if tensor.name != "own" and piece.tensor.numel():
                    inner = [a - 2 for a in piece.offset]
                    first = np.ravel_multi_index(inner, shapes[int(tensor.name)]) if inner else 0
                    assert piece.tensor.flatten()[0] == torch.tensor(int(first), dtype=tensor.dtype)
    for number, shape in enumerate(shapes):
        inner = tuple(slice(2, None) for _ in shape)
        assert (written[f"{number}"][inner] == 1).all()
        assert written[f"{number}"].sum() == np.prod(shape)
    assert (written["own"] == 1).all()


def test_parts_are_equal():
    shapes = [[1000, 16], [16], [2, 300, 16], [40, 16]]
    sizes = [
        sum(piece.tensor.nbytes for tensor in deduplicate(held_by(shapes, replica, 4))[:-2] for piece in tensor.pieces)
        for replica in range(4)
    ]
    assert max(sizes) - min(sizes) <= 2 * 16 * 4
    assert all(len(tensor.pieces) <= 3 for tensor in deduplicate(held_by(shapes, 1, 4)))


def test_replicas_save_and_one_rank_loads(tmp_path, on_ranks, kit):
    values = {"w": torch.randn(50, 8), "b": torch.randn(8), "s": torch.tensor(4.0)}

    def save(world):
        held = [
            GlobalTensor(
                name, tuple(x.shape), x.dtype, [Piece((0,) * x.dim(), x)], world.rank == 0, (world.rank, world.size)
            )
            for name, x in values.items()
        ]
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), held, world)

    on_ranks(3, save)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "iter_0000001").glob("*.distcp"))
    assert len(sizes) == 3
    loaded = kit.zeros_like(values)
    load_checkpoint(tmp_path / "iter_0000001", kit.held(loaded), kit.world)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
