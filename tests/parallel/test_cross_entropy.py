"""Tests of vocabulary-parallel cross-entropy against F.cross_entropy, also for extreme logits."""

import pytest
import torch
from torch.nn import functional as F

from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.layout import partitions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy

VOCAB, PADDED = 45, 64


def inputs(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(6, 3, PADDED, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, VOCAB, (6, 3), generator=generator)
    weights = torch.randn(6, 3, generator=generator)  # of both signs
    return logits, labels, weights


def ours(backend, tp, *args):
    group = LocalGroup("tp")
    if tp > 1:
        group = backend.new_group("tp", partitions("tp", ParallelConfig(world_size=tp, tp=tp)))
    logits, labels, weights = inputs(*args)
    part = logits.chunk(tp, dim=-1)[group.rank].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(part * 1, labels, VOCAB, group)
    (losses * weights).sum().backward()
    return losses.detach(), part.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("args", [(), (torch.bfloat16,), (torch.float32, 100.0), (torch.float16, 50.0)], ids=str)
def test_equals_torch_over_the_unpadded_columns(on_ranks, tp, args):
    logits, labels, weights = inputs(*args)
    logits = logits.float().requires_grad_()
    expected = F.cross_entropy(logits[..., :VOCAB].flatten(0, 1), labels.flatten(), reduction="none").view(6, 3)
    (expected * weights).sum().backward()
    results = [ours(None, 1, *args)] if tp == 1 else on_ranks(tp, ours, tp, *args)
    for losses, _ in results:
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([part for _, part in results], dim=-1)
    assert gradient.dtype == (args[0] if args else torch.float32)
    assert not gradient[..., VOCAB:].any()
    torch.testing.assert_close(
        gradient, logits.grad.to(gradient.dtype), rtol=1e-5 if not args else None, atol=2e-6 if not args else None
    )


def test_a_second_backward_is_an_error():
    logits, labels, _ = inputs()
    losses = vocab_parallel_cross_entropy(logits.requires_grad_() * 1, labels, VOCAB, LocalGroup("tp")).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()
