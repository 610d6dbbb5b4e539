"""Vocabulary-parallel cross-entropy: next-token loss over logits that are split over tp and padded.

Letters: s sequence, b micro-batch, V padded vocabulary, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from megatron_lite.backend.group import Group


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, group: Group) -> Tensor:
    """Return -log softmax(logits)[label] over the columns without padding, in fp32.

    Backward turns the saved probabilities into the gradient in place, so that one fp32 tensor [s, b, V/tp] suffices; a
    second backward is an error. Padded columns of `logits` are overwritten with -inf.

    Args:
        logits: [s, b, V/tp]; this rank's columns of the padded vocabulary.
        labels: [s, b] int64, below vocab_size.
        vocab_size: number of columns without padding.
        group: the tensor-parallel group.

    Returns:
        [s, b] fp32, the same on every rank.
    """
    first = logits.shape[-1] * group.rank
    if first + logits.shape[-1] > vocab_size:
        # exp(-inf) = 0: the functions below need no case for padding.
        logits.detach()[..., max(0, vocab_size - first) :].fill_(float("-inf"))
    if group.size == 1:
        return _CrossEntropy.apply(logits, labels)
    return _VocabParallelCrossEntropy.apply(logits, labels, first, group)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        index = labels.unsqueeze(-1)
        ctx.save_for_backward(log_probs, index)
        ctx.dtype = logits.dtype
        return -log_probs.gather(-1, index).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, index = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        # d loss / d logits = softmax - onehot(label)
        grad_logits = log_probs.exp_().mul_(grad)
        return grad_logits.scatter_add_(-1, index, -grad).to(ctx.dtype), None


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: Group) -> Tensor:
        columns = logits.shape[-1]
        maximum = logits.amax(dim=-1, keepdim=True).float()
        group.all_reduce_(maximum, op="max")
        shifted = logits.float() - maximum
        index = (labels - first).unsqueeze(-1)
        elsewhere = (index < 0) | (index >= columns)
        index = index.masked_fill(elsewhere, 0)
        target = shifted.gather(-1, index).masked_fill_(elsewhere, 0)
        probs = shifted.exp_()
        sums = torch.cat((probs.sum(dim=-1, keepdim=True), target), dim=-1)  # one collective for both
        group.all_reduce_(sums)
        total, target = sums.unbind(-1)
        ctx.save_for_backward(probs.div_(total.unsqueeze(-1)), index, elsewhere)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probs, index, elsewhere = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        grad_logits = probs.mul_(grad).scatter_add_(-1, index, (-grad).masked_fill(elsewhere, 0))
        return grad_logits.to(ctx.dtype), None, None, None
