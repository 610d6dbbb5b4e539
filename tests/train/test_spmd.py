"""Tests of the SPMD engine without its devices: reports of compilations, partitions, pieces in a checkpoint.

tests/xla trains on virtual devices (make test-xla).
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_lite.backend.xla import Compilations
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.rectangle import Rectangle
from megatron_lite.train.spmd import GraphRunner, StepShape
from megatron_lite.train.spmd_state import _pieces, _split_over_dp, partition_spec

SHAPE = StepShape(1, 8, 16, ("tokens", "labels"))


def reports(*steps):
    """Run steps, each a shape with the number of graphs compiled for it and read from the cache; return the reports."""
    counts, lines = [0, 0], []
    backend = SimpleNamespace(compilations=lambda: Compilations(*counts))
    runner = GraphRunner(backend, lines.append)
    for shape, compiled, cached in steps:
        backend.run_graph = lambda compiled=compiled, cached=cached: counts.__setitem__(
            slice(None), [counts[0] + compiled, counts[1] + cached]
        )
        runner.run("training step", shape)
    return lines


def test_a_compilation_is_reported_once():
    (line,) = reports((SHAPE, 1, 0), (SHAPE, 0, 0), (SHAPE, 0, 0))
    assert line.startswith("the training step of 1 micro-batch of 8 x 16 tokens was compiled in ")
    assert line.endswith("s (1 graph in this job)")


def test_a_graph_from_the_cache_is_no_compilation():
    (line,) = reports((SHAPE, 1, 1))
    assert "was read from the compilation cache in" in line


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (StepShape(2, 8, 16, SHAPE.parts), "because it has 2 micro-batches instead of 1"),
        (StepShape(1, 8, 32, SHAPE.parts), "because it has 32 tokens of a sample instead of 16"),
        (StepShape(1, 4, 16, SHAPE.parts), "because it has 4 samples of a micro-batch instead of 8"),
        (
            StepShape(1, 8, 16, (*SHAPE.parts, "loss_mask")),
            "because it has tokens, labels, loss_mask instead of tokens, labels",
        ),
        (SHAPE, "although a step of this shape ran before: another part of the graph has changed"),
    ],
)
def test_a_second_compilation_is_a_warning_with_its_reason(other, reason):
    _, line = reports((SHAPE, 1, 0), (other, 1, 0))
    assert line.startswith("WARNING: the training step of") and "(2 graphs in this job)" in line
    assert reason in line


def parameter(shape, global_shape, tp_dim):
    return NamedParameter("x", nn.Parameter(torch.zeros(shape)), global_shape, tp_dim, Rectangle.full(global_shape))


@pytest.mark.parametrize(
    ("shape", "global_shape", "tp_dim", "spec"),
    [
        ((8, 4), (8, 4), 0, ("tp", None)),
        ((8, 4), (8, 4), 1, (None, "tp")),
        ((8, 4), (2, 4, 4), 1, ("tp", None)),  # gate and up projection
        ((4,), (4,), None, (None,)),
    ],
)
def test_a_parameter_is_split_along_the_dim_that_it_declares(shape, global_shape, tp_dim, spec):
    assert partition_spec(parameter(shape, global_shape, tp_dim)) == spec


def test_state_is_split_along_a_free_dim_that_dp_divides():
    assert _split_over_dp(("tp", None), (8, 6), 2) == ("tp", "dp")
    assert _split_over_dp((None, None), (3, 6), 2) == (None, "dp")
    assert _split_over_dp((None, None), (3, 5), 2) == (None, None)
    assert _split_over_dp(("tp",), (8,), 2) == ("tp",)


@pytest.mark.parametrize(
    ("global_shape", "parts"),
    [((12, 4), [(0, 8), (8, 4)]), ((10, 4), [(0, 5), (5, 7)]), ((2, 6, 4), [(0, 4), (4, 8)])],
)
def test_pieces_cover_the_global_tensor_without_padding(global_shape, parts):
    """Parts of the rows of a [12, 4] tensor: complete, with two rows of padding, and as two matrices."""
    values = torch.arange(48.0).view(12, 4)
    named = parameter((12, 4), global_shape, 0)
    found = torch.full(global_shape, -1.0)
    for start, count in parts:
        for piece in _pieces(named, (start, 0), values[start : start + count]):
            found[tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.tensor.shape, strict=True))] = piece.tensor
    rows = global_shape[0] if len(global_shape) == 2 else 12
    assert torch.equal(found.view(-1, 4), values[:rows])
