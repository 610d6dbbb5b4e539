"""Benchmark of installed vendor kernels against PyTorch's: forward and backward of one layer's norm, attention, loss.

    python benchmarks/kernels.py --num-layers 1 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 \
        --micro-batch-size 4 --vocab-size 50257 --bf16

The flags are those of a run, and decide shapes, dtype, ALiBi, documents and conditions. Calls alternate (PyTorch's, the
vendor's, …), so that changes of the clock rate affect both; medians are compared. Prints one line for each kernel: its
time, PyTorch's, and the ratio (below 1: the kernel is faster).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_lite.backend.base import Backend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.kernels import CANDIDATES, Candidate, Function, Kernels, prepare
from megatron_lite.backend.select import select_backend
from megatron_lite.backend.vendors import WeightGradientKernel
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.model.attention import AttentionContext, SelfAttention
from megatron_lite.model.gpt import DTYPES
from megatron_lite.model.head import Head
from megatron_lite.model.layer import hidden_norm
from megatron_lite.model.positions import AttentionMask
from megatron_lite.parallel.gemm import accumulate_weight_gradient_
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams

DEFAULTS = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--global-batch-size", "64", "--train-iters", "1"]
CALLS = 50


def main(argv: list[str], calls: int = CALLS) -> int:
    """Measure every installed candidate."""
    config = parse_run([*DEFAULTS, "--lr", "1e-4", *argv]).config
    config = with_vocabulary(config, config.tokenizer.vocab_size or 50257)
    backend = select_backend(config.runtime, ParallelConfig(), Launch())
    shape = f"{config.batch.micro_batch_size} x {config.batch.seq_length} tokens"
    print(f"{backend.device_name()}, {config.precision.dtype}, {shape}")
    for function, candidates in CANDIDATES.items():
        for candidate in candidates:
            print(f"{function:<16} {candidate.name:<16} {measure(function, candidate, config, backend, calls)}")
    return 0


def measure(function: Function, candidate: Candidate, config: RunConfig, backend: Backend, calls: int) -> str:
    """Return the times of a candidate and of PyTorch, or why it cannot be measured."""
    kernel, reason = prepare(function, candidate, config, backend.device)
    if reason:
        return reason
    field = {"weight gradient": "weight_gradient"}.get(function, function)
    ours, theirs = (
        call_of(function, config, backend, replace(Kernels(), **chosen)) for chosen in ({}, {field: kernel})
    )
    times: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for number in range(calls + 3):
        for call in times:
            begin = backend.mark()
            call()
            end = backend.mark()
            backend.synchronize()
            if number >= 3:
                times[call].append(backend.seconds_between(begin, end) or 0.0)
    one, two = (1e3 * statistics.median(times[call]) for call in (theirs, ours))
    return f"{one:9.3f} ms   PyTorch {two:9.3f} ms   ratio {one / two:.2f}"


def call_of(function: Function, config: RunConfig, backend: Backend, kernels: Kernels) -> Callable[[], None]:
    """Return a forward and backward pass of one function at the run's shapes."""
    model, batch, dtype = config.model, config.batch, DTYPES[config.precision.dtype]
    mesh = build_mesh(backend, ParallelConfig())
    sharding = Sharding(mesh.tp, False, dtype, backend, kernels=kernels)
    shape = (batch.seq_length, batch.micro_batch_size)

    def values(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=backend.device).to(dtype)

    if function == "weight gradient":
        return weight_gradient(
            kernels.weight_gradient, values(*shape, model.ffn_hidden_size), values(*shape, model.hidden_size)
        )
    if function == "loss":
        head = filled(Head(model, sharding))
        x, weights = values(*shape, model.embedding_width), torch.ones(shape, device=backend.device)
        labels = torch.randint(model.vocab_size, shape, device=backend.device)

        def loss() -> None:
            head.weight.grad = None
            head.cross_entropy.losses_and_gradients(x, head.weight, labels, weights, add_nowhere)

        return loss
    if function == "norm":
        norm = filled(hidden_norm(model, sharding))
        x = values(*shape, model.hidden_size).requires_grad_()
        return lambda: backward(norm(x))
    rng = RngStreams(1, backend)
    attention = filled(SelfAttention(model, 0, sharding, rng, False))
    mask = None if kernels.attention is not None else AttentionMask(model, sharding)(shape[0])
    x = values(*shape, model.hidden_size).requires_grad_()
    return lambda: backward(attention(x, AttentionContext(mask=mask)))


def add_nowhere(weight: nn.Parameter, gradient: Tensor, x: Tensor, /, **options: object) -> None:
    """Compute a weight gradient as native does without a fused kernel, and drop it."""
    gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def weight_gradient(kernel: WeightGradientKernel | None, gradient: Tensor, x: Tensor) -> Callable[[], None]:
    """Return the addition of one product to an fp32 gradient."""
    out = torch.zeros(gradient.shape[-1], x.shape[-1], device=x.device)
    return lambda: accumulate_weight_gradient_(out, gradient, x, first=False, fused=kernel)


def filled(module: nn.Module) -> nn.Module:
    """Return the module with random parameters."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    return module


def backward(y: Tensor) -> None:
    """Run backward with a gradient of ones."""
    y.backward(torch.ones_like(y))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
