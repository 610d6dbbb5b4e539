"""Tests of weight gradients accumulated in fp32 by a fused kernel: whole iterations."""

from __future__ import annotations

import pytest
import torch
from support.layout_matrix import SP, Cell, iterate, mesh_of

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.kernels import Kernels
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

CELLS = (
    Cell(dtype="bf16", recompute="full"),
    Cell(dtype="bf16", schedule="zb-h1"),
    Cell(dtype="bf16", tp=2, **SP),
    Cell(dtype="bf16", pp=2, model="llama"),
)


def train(backend, cell, fusion):
    """Three iterations with a stand-in kernel; losses and its calls as (iteration's first, fp32, half precision)."""
    config, calls = cell.config(), []

    def kernel(out, gradient, x, first):
        calls.append((first, out.dtype, x.dtype))
        if first:
            out.zero_()
        out.add_(gradient.float().t() @ x.float())

    mesh = mesh_of(backend, cell.tp, cell.pp)
    engine = build_engine(config, mesh, kernels=Kernels(weight_gradient=kernel if fusion else None))
    losses, norms, _ = iterate(config, mesh, engine, Progress(), 3)
    return losses, norms, calls


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_iterations_accumulate_every_matrix_through_the_kernel(cell, on_ranks):
    if cell.world == 1:
        alone = select_backend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch())
        fused, plain = ([train(alone, cell, fusion)] for fusion in (True, False))
    else:
        fused, plain = (on_ranks(cell.world, train, cell, fusion) for fusion in (True, False))
    assert fused[0][0] == pytest.approx(plain[0][0], rel=2e-3)
    assert fused[0][1] == pytest.approx(plain[0][1], rel=2e-2)
    matrices = 4 * cell.layers // cell.pp
    for rank, (_, _, calls) in enumerate(fused):
        head = cell.pp == 1 or rank == cell.world - 1
        micro_batches = 2 + 2 + 2  # of the first iterations of the ramp-up
        assert len(calls) == micro_batches * (matrices + head)
        assert {call[1:] for call in calls} == {(torch.float32, torch.bfloat16)}
        assert sum(call[0] for call in calls) in (3 * matrices, 3 * (matrices + head))
    assert not any(calls for _, _, calls in plain)
