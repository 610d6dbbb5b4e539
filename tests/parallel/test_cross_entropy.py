"""Tests of linear cross-entropy against F.cross_entropy over all logits: chunks, tp, masks, extreme logits, memory."""

import weakref

import pytest
import torch
from support.stage_backward import add_to_grad
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.layout import partitions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.parallel.cross_entropy import LinearCrossEntropy
from megatron_lite.parallel.gemm import accumulate_weight_gradient_

VOCAB, PADDED, LENGTH, SAMPLES, HIDDEN = 45, 64, 8, 3, 16


def inputs(dtype=torch.float32, scale=1.0):
    """Return hidden states, weight, labels and token weights of both signs, some 0."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(LENGTH, SAMPLES, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(PADDED, HIDDEN, generator=generator) * scale / 4).to(dtype)
    labels = torch.randint(0, VOCAB, (LENGTH, SAMPLES), generator=generator)
    weights = torch.randn(LENGTH, SAMPLES, generator=generator)
    weights[2] = 0
    return x, weight, labels, weights


def expected(dtype=torch.float32, scale=1.0):
    """Return losses, gradient of x and gradient of the weight in fp64, from the inputs in `dtype`."""
    x, weight, labels, weights = inputs(dtype, scale)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ weight.t())[..., :VOCAB]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(LENGTH, SAMPLES)
    (losses * weights).sum().backward()
    return losses.detach(), x.grad, weight.grad


def ours(backend, tp, split, chunk, *args):
    """Return losses, this rank's gradient of x and its gradient of its rows of the weight."""
    group = LocalGroup("tp")
    if tp > 1:
        group = backend.new_group("tp", partitions("tp", ParallelConfig(world_size=tp, tp=tp)))
    x, weight, labels, weights = inputs(*args)
    weight = nn.Parameter(weight.chunk(tp)[group.rank].clone())
    x = x.chunk(tp)[group.rank] if split else x
    function = LinearCrossEntropy(VOCAB, group, split, chunk)
    losses, gradient = function.losses_and_gradients(x, weight, labels, weights, add_to_grad)
    assert torch.equal(losses, function.losses(x, weight, labels))
    return losses, gradient, weight.grad


def assert_near(found, wanted, tolerance):
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


# With tp = 4, the last rank's rows are all padding, those of the third in part.
@pytest.mark.parametrize(("tp", "split"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize("chunk", [1, 9, 10**6])
@pytest.mark.parametrize(
    ("args", "tolerance", "of_gradients"),
    [
        ((torch.float64,), 1e-13, 1e-13),
        ((), 1e-6, 5e-6),
        ((torch.float32, 100.0), 1e-6, 1e-4),  # logits of 500, whose rounding error the softmax multiplies
        ((torch.bfloat16,), 0.01, 0.01),
    ],
    ids=["fp64", "fp32", "extreme", "bf16"],
)
def test_equals_torch_over_the_unpadded_columns(on_ranks, tp, split, chunk, args, tolerance, of_gradients):
    results = [ours(None, 1, split, chunk, *args)] if tp == 1 else on_ranks(tp, ours, tp, split, chunk, *args)
    losses, x_gradient, weight_gradient = expected(*args)
    for found, _, _ in results:
        assert found.dtype == torch.promote_types(args[0] if args else torch.float32, torch.float32)
        assert_near(found, losses, tolerance)
    gradients = [gradient for _, gradient, _ in results]
    assert_near(torch.cat(gradients) if split else gradients[-1], x_gradient, of_gradients)
    rows = torch.cat([gradient for _, _, gradient in results])
    assert not rows[VOCAB:].any()
    assert_near(rows, weight_gradient, of_gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_hidden(bad):
    x, weight, labels, weights = inputs()
    x[1, 1, 1] = bad
    function = LinearCrossEntropy(VOCAB, LocalGroup("tp"), False, 8)
    losses, gradient = function.losses_and_gradients(x, nn.Parameter(weight), labels, weights, add_to_grad)
    assert not losses[1, 1].isfinite() and not gradient[1, 1].isfinite().all()
    assert losses.isfinite().sum() == losses.numel() - 1


@pytest.mark.slow
def test_compiled_kernels_compute_the_same():
    x, weight, labels, weights = inputs()
    results = []
    for compiled in (False, True):
        function, parameter = LinearCrossEntropy(VOCAB, LocalGroup("tp"), False, 9), nn.Parameter(weight)
        if compiled:
            function.compile(backend="aot_eager", fullgraph=True)
        results.append((*function.losses_and_gradients(x, parameter, labels, weights, add_to_grad), parameter.grad))
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-6)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of storages that operations allocate, and their peak; `largest` elements of any tensor."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.largest = max(self.largest, leaf.numel())
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_one_chunk_of_logits(dtype):
    vocab, hidden, length, samples, chunk = 50304, 32, 256, 2, 128
    x, weight = torch.randn(length, samples, hidden, dtype=dtype), nn.Parameter(torch.randn(vocab, hidden, dtype=dtype))
    total = torch.zeros(vocab, hidden)
    labels = torch.randint(0, vocab - 47, (length, samples))

    def accumulate(weight, gradient, x, *, last=True):
        accumulate_weight_gradient_(total, gradient, x, first=False)

    with LiveBytes() as mode:
        function = LinearCrossEntropy(vocab - 47, LocalGroup("tp"), False, chunk)
        function.losses_and_gradients(x, weight, labels, torch.ones(length, samples), accumulate)
    logits, states = chunk * vocab * dtype.itemsize, length * samples * hidden * dtype.itemsize
    assert mode.largest == chunk * vocab
    assert logits < mode.peak <= 1.25 * logits + states
