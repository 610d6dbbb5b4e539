"""Linear cross-entropy: output projection to the vocabulary and next-token loss, chunk by chunk along the sequence.

The gradient of a chunk's logits is computed with its loss, in place, and multiplied into the gradients of hidden states
and weight before the next chunk, so that only one chunk's logits exist at a time. The idea is that of Liger Kernel's
fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2); the vocabulary may be split over tp.

Letters: s sequence, b micro-batch, h hidden, V padded vocabulary, tp size of the tensor-parallel group, c tokens of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.backend.group import Group, Work
from megatron_lite.backend.vendors import LossKernel
from megatron_lite.config.runtime import LOSS_BLOCKS
from megatron_lite.parallel.gemm import Accumulate, input_gradient, linear


@dataclass
class LinearCrossEntropy:
    """Cross-entropy of logits x Wᵀ, without the padded columns; all logits at once are never in memory.

    Attributes:
        vocab_size: rows without padding, over all ranks.
        group: the tensor-parallel group.
        split_sequence: whether hidden states are split over the group along the sequence.
        chunk: c.
        kernel: a vendor's; None: this module's. It needs a group of one rank.
    """

    vocab_size: int
    group: Group
    split_sequence: bool
    chunk: int
    kernel: LossKernel | None = None
    _statistics: Callable[..., Tensor] = field(default_factory=lambda: _in_blocks(_statistics))
    _to_gradient_: Callable[..., Tensor] = field(default_factory=lambda: _in_blocks(_to_gradient_))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run the kernels through torch.compile (called with these arguments), which needs no temporary tensors."""
        self._statistics = torch.compile(_statistics, *args, **kwargs)
        self._to_gradient_ = torch.compile(_to_gradient_, *args, **kwargs)

    @torch.no_grad()
    def losses(self, x: Tensor, weight: nn.Parameter, labels: Tensor) -> Tensor:
        """Return -log softmax(x Wᵀ)[label] of each token.

        Args:
            x: [s, b, h]; with split_sequence [s/tp, b, h].
            weight: [V/tp, h], this rank's rows of the padded vocabulary.
            labels: [s, b] int64, below vocab_size.

        Returns:
            [s, b] in fp32 (fp64 for fp64), the same on every rank.
        """
        return self._run(x, weight, labels)

    @torch.no_grad()
    def losses_and_gradients(
        self, x: Tensor, weight: nn.Parameter, labels: Tensor, token_weights: Tensor, accumulate: Accumulate
    ) -> tuple[Tensor, Tensor]:
        """Return the losses, and the gradient of their weighted sum with respect to `x`.

        Args:
            x: [s, b, h]; with split_sequence [s/tp, b, h].
            weight: [V/tp, h], this rank's rows of the padded vocabulary.
            labels: [s, b] int64, below vocab_size.
            token_weights: [s, b] fp32, factors of the losses in the sum.
            accumulate: adds the gradient of the weight, unless it is frozen. A kernel that also projects leaves it to
                autograd instead.

        Returns:
            [s, b] as for losses, and a tensor like `x`.
        """
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        return self._run(x, weight, labels, (token_weights, gradient, accumulate)), gradient

    def _run(
        self,
        x: Tensor,
        weight: nn.Parameter,
        labels: Tensor,
        training: tuple[Tensor, Tensor, Accumulate] | None = None,
    ) -> Tensor:
        """Return the losses; in training, given (token weights, gradient of x to fill, accumulate), the gradients."""
        if self.kernel is not None and self.kernel.projects:
            return self._by_projecting_kernel(self.kernel, x, weight, labels, training)
        group, rows = self.group, weight.shape[0]
        parts = group.size if self.split_sequence else 1
        length, samples, _ = x.shape
        # Position i of `x` is position j * length + i of the sequence on rank j: a chunk has the same positions of
        # every rank's part, so that its gradient is reduce-scattered without a copy.
        labels = labels.unflatten(0, (parts, length))
        losses = torch.empty(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        step = max(1, self.chunk // (parts * samples))
        for start in range(0, length, step):
            own = slice(start, min(start + step, length))
            inputs = group.all_gather(x[own]) if parts > 1 else x[own]
            # XLA would gather samples that are split over the mesh to flatten them.
            tokens = inputs if x.device.type == "xla" else inputs.flatten(0, 1)
            column = labels[:, own].reshape(*tokens.shape[:-1], 1) - rows * group.rank
            elsewhere = (column < 0) | (column >= rows)
            chunk = _Chunk(linear(tokens, weight), column.masked_fill_(elsewhere, 0), elsewhere)
            self._mask_padding(chunk.logits)
            of_chunk = None
            if training is not None:
                of_chunk = training[0].unflatten(0, (parts, length))[:, own].reshape(column.shape)
            if self.kernel is None:
                combined = self._combine(self._statistics(*chunk))
                found = _losses(*combined)
                if of_chunk is not None:
                    self._to_gradient_(*chunk, *combined, of_chunk)
            else:
                found, chunk = _by_kernel(self.kernel, chunk, of_chunk)
            losses[:, own] = found.view(parts, -1, samples)
            if training is not None:
                _, gradient, accumulate = training
                work = self._reduce(input_gradient(chunk.logits, weight).view(inputs.shape), gradient[own])
                if weight.requires_grad:  # overlaps with the reduction
                    accumulate(weight, chunk.logits, inputs, last=own.stop == length)
                if work is not None:
                    work.wait()
            del chunk  # before the next one is allocated
        return losses.flatten(0, 1)

    def _by_projecting_kernel(
        self,
        kernel: LossKernel,
        x: Tensor,
        weight: nn.Parameter,
        labels: Tensor,
        training: tuple[Tensor, Tensor, Accumulate] | None,
    ) -> Tensor:
        """Return the losses of all tokens in one call, which gets no padded rows; arguments as for _run."""
        assert self.group.size == 1
        if training is None:
            return kernel.call(x.flatten(0, 1), weight[: self.vocab_size], labels.flatten()).view(labels.shape)
        token_weights, gradient, _ = training
        with torch.enable_grad():
            leaf = x.detach().flatten(0, 1).requires_grad_()
            losses = kernel.call(leaf, weight[: self.vocab_size], labels.flatten())
            torch.autograd.backward(
                losses, token_weights.flatten(), inputs=[leaf, weight] if weight.requires_grad else [leaf]
            )
        assert leaf.grad is not None
        gradient.copy_(leaf.grad.view(x.shape))
        return losses.detach().view(labels.shape)

    def _mask_padding(self, logits: Tensor) -> None:
        """Set the padded columns to -inf: exp(-inf) = 0, so that the kernels need no case for padding."""
        columns = logits.shape[-1]
        end = self.vocab_size - columns * self.group.rank
        if end < columns and logits.device.type == "xla":
            logits.masked_fill_(torch.arange(columns, device=logits.device) >= end, float("-inf"))
        elif end < columns:
            logits[..., max(0, end) :].fill_(float("-inf"))

    def _combine(self, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [c, 1] each over all columns: maximum, sum of exp(logit - maximum), label's logit; one collective."""
        if self.group.size == 1:
            maximum, total, target = statistics.unsqueeze(-1).unbind(0)
            return maximum, total, target
        of_ranks = self.group.all_gather(statistics.unsqueeze(0)).unsqueeze(-1)
        maxima, totals, targets = of_ranks.unbind(1)
        maximum = maxima.amax(0)
        return maximum, (totals * (maxima - maximum).exp_()).sum(0), targets.sum(0)

    def _reduce(self, summand: Tensor, out: Tensor) -> Work | None:
        """Start to sum a chunk's gradient over the ranks into `out`; their columns are different."""
        if self.split_sequence and self.group.size > 1:
            return self.group.reduce_scatter_(out, summand, async_op=True)
        out.copy_(summand)
        return self.group.all_reduce_(out, async_op=True)


class _Chunk(NamedTuple):
    """Logits [c, V/tp] of a chunk, and [c, 1] the column of each label, or that it is another rank's."""

    logits: Tensor
    column: Tensor
    elsewhere: Tensor


def _by_kernel(kernel: LossKernel, chunk: _Chunk, token_weights: Tensor | None) -> tuple[Tensor, _Chunk]:
    """Return losses [c] by a kernel, and the chunk; given token weights [c, 1], with the gradient of its logits."""
    labels = chunk.column.squeeze(-1)
    if token_weights is None:
        return kernel.call(chunk.logits, labels), chunk
    with torch.enable_grad():
        leaf = chunk.logits.requires_grad_()
        losses = kernel.call(leaf, labels)
        (gradient,) = torch.autograd.grad(losses, leaf, token_weights.squeeze(-1))
    return losses.detach(), chunk._replace(logits=gradient)


def _losses(maximum: Tensor, total: Tensor, target: Tensor) -> Tensor:
    return total.log() + (maximum - target)


def _in_blocks(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel applied to one block of rows at a time; its results are joined along their last dim."""

    def run(*args: Tensor) -> Tensor:
        if args[0].device.type == "xla":  # which fuses the kernel's operations
            return kernel(*args)
        rows = -(-args[0].shape[0] // LOSS_BLOCKS)
        parts = [kernel(*block) for block in zip(*(arg.split(rows) for arg in args), strict=True)]
        return torch.cat(parts, dim=-1)

    return run


def _statistics(logits: Tensor, column: Tensor, elsewhere: Tensor) -> Tensor:
    """Return [3, c]: the maximum of each row, the sum of exp(logit - maximum), the label's logit (elsewhere: 0)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # The maximum is finite even if all of a rank's columns are padding: inf - inf would be NaN.
    maximum = logits.amax(-1, keepdim=True).to(dtype).clamp_(min=torch.finfo(dtype).min)
    total = (logits - maximum).exp_().sum(-1)
    target = logits.gather(-1, column).to(dtype).masked_fill_(elsewhere, 0)
    return torch.stack((maximum.squeeze(-1), total, target.squeeze(-1)))


def _to_gradient_(
    logits: Tensor,
    column: Tensor,
    elsewhere: Tensor,
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    token_weights: Tensor,
) -> Tensor:
    """Overwrite logits [c, V/tp] with d loss / d logits = (softmax - onehot(label)) times the token's weight.

    The arguments are [c, 1]. Returns an empty tensor.
    """
    torch.mul((logits - maximum).exp_(), token_weights / total, out=logits)
    # Computed in fp32: in bf16, softmax - 1 would be rounded to a few bits.
    at_label = ((target - maximum).exp_() / total - 1) * token_weights
    at_label = torch.where(elsewhere, logits.gather(-1, column), at_label.to(logits.dtype))
    logits.scatter_(-1, column, at_label)
    return logits.new_empty(0)
