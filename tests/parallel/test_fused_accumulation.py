"""Tests of weight gradients accumulated in fp32 by a fused kernel: choice, arguments, whole iterations."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.layout_matrix import SP, Cell, iterate, mesh_of

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.parallel import gemm
from megatron_lite.parallel.gemm import find_fused_kernel
from megatron_lite.schedules.progress import Progress
from megatron_lite.train import assemble

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXTENSION = "fused_weight_gradient_mlp_cuda"


def product(x, gradient, out):
    """Stand-in for apex's wgrad_gemm_accum_fp32."""
    out.add_(gradient.float().t() @ x.float())


def install(monkeypatch, function):
    monkeypatch.setitem(sys.modules, EXTENSION, SimpleNamespace(wgrad_gemm_accum_fp32=function))


def fail(x, gradient, out):
    raise RuntimeError("built for another torch")


@pytest.mark.parametrize(("function", "works"), [(product, True), (fail, False), (lambda x, g, out: None, False)])
def test_an_extension_is_tried_before_it_is_used(monkeypatch, function, works):
    install(monkeypatch, function)
    assert gemm._works(gemm._apex_kernel, torch.bfloat16, CPU) is works


def test_a_missing_extension_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, EXTENSION, None)
    assert not gemm._works(gemm._apex_kernel, torch.bfloat16, CPU)


@pytest.mark.parametrize("works", [("_apex_kernel", "_torch_kernel"), ("_torch_kernel",), ()])
def test_apex_comes_before_torch(monkeypatch, works):
    monkeypatch.setattr(gemm, "_works", lambda kernel, dtype, device: kernel.__name__ in works)
    found = find_fused_kernel(torch.bfloat16, CUDA)
    assert (found.__name__ if found else None) == (works[0] if works else None)


def test_cpus_and_fp32_have_no_fused_kernel(monkeypatch):
    monkeypatch.setattr(gemm, "_works", lambda *args: True)
    assert find_fused_kernel(torch.bfloat16, CPU) is None
    assert find_fused_kernel(torch.float32, CUDA) is None


def test_apex_gets_contiguous_operands_and_a_zeroed_buffer(monkeypatch):
    seen = []

    def record(x, gradient, out):
        seen.append((x.is_contiguous(), gradient.is_contiguous(), out.abs().sum().item()))
        product(x, gradient, out)

    install(monkeypatch, record)
    out, x, gradient = torch.ones(4, 6), torch.randn(6, 8).t(), torch.randn(4, 8).t()
    gemm._apex_kernel(out, gradient, x, True)
    gemm._apex_kernel(out, gradient, x, False)
    assert seen[0] == (True, True, 0.0) and seen[1][:2] == (True, True)
    torch.testing.assert_close(out, 2 * gradient.t() @ x)


def test_torch_accumulates_into_the_buffer(monkeypatch):
    assert torch.ops.aten.addmm.dtype_out is not None
    seen = []

    def record(base, a, b, *, beta, out_dtype, out):
        seen.append((beta, out_dtype, out is base))
        out.mul_(beta).add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", record)
    assert gemm._works(gemm._torch_kernel, torch.bfloat16, CPU)
    assert seen == [(0, torch.float32, True), (1, torch.float32, True)]


CELLS = (
    Cell(dtype="bf16", recompute="full"),
    Cell(dtype="bf16", schedule="zb-h1"),
    Cell(dtype="bf16", tp=2, **SP),
    Cell(dtype="bf16", pp=2, model="llama"),
)


def train(backend, cell, fusion):
    """Three iterations with a stand-in kernel; losses and its calls as (iteration's first, fp32, half precision)."""
    config, calls = cell.config(), []
    runtime = dataclasses.replace(config.runtime, gradient_accumulation_fusion=fusion)
    config = dataclasses.replace(config, runtime=runtime)

    def kernel(out, gradient, x, first):
        calls.append((first, out.dtype, x.dtype))
        if first:
            out.zero_()
        product(x, gradient, out)

    mesh = mesh_of(backend, cell.tp, cell.pp)
    with mock.patch.object(assemble, "find_fused_kernel", lambda dtype, device: kernel):
        engine = assemble.build_engine(config, mesh)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_has_a_fused_kernel(dtype):
    assert find_fused_kernel(dtype, CUDA) is not None
