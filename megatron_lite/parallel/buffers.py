"""Flat buffers of one rank: contiguous storage of parameters and fp32 gradients, divided into buckets.

Backward accumulates into the buffers, collectives work on ranges of them, and the optimizer updates them as a few long
tensors. The first gradient of an iteration overwrites that of the iteration before, so that buffers are never zeroed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.backend.group import Group
from megatron_lite.backend.vendors import WeightGradientKernel
from megatron_lite.parallel.buckets import Bucket, GradientReduction, ParameterGather, Slot, lay_out
from megatron_lite.parallel.fp8 import Fp8
from megatron_lite.parallel.gemm import accumulate_weight_gradient_
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.shared import SharedModule, belongs_to


@dataclass(frozen=True, eq=False)
class FlatBuffer:
    """Parameters with the same weight decay and learning rate, one after the other.

    Attributes:
        decay: whether weight decay applies to them.
        lr_factor: factor of their learning rate.
        buckets: ranges that cover the buffer; every parameter lies in one.
        values: [n] the parameters, in their own dtype.
        gradients: [n] their gradients in fp32.
    """

    decay: bool
    lr_factor: float
    buckets: tuple[Bucket, ...]
    values: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class ShardPiece:
    """Elements [start, stop) of a flattened parameter, at `position` of a shard."""

    parameter: NamedParameter
    start: int
    stop: int
    position: int


@dataclass(frozen=True, eq=False)
class Shard:
    """Range of a buffer that this rank's optimizer updates as one tensor.

    Attributes:
        decay: whether weight decay applies.
        lr_factor: factor of the learning rate.
        values: [n] view of the parameters.
        gradients: [n] view of their fp32 gradients, complete after ParameterBuffers.reduce.
        pieces: elements of parameters in it; between them is padding, which stays zero.
    """

    decay: bool
    values: Tensor
    gradients: Tensor
    pieces: tuple[ShardPiece, ...]
    lr_factor: float = 1.0


class ParameterBuffers:
    """Flat buffers that hold a rank's parameters and accumulate their gradients.

    One iteration is: begin; the backward passes; reduce; the optimizer's step on `shards`; gather.

    Replicas may run different numbers of backward passes, or none: every replica takes part in every reduction, in one
    fixed order. A bucket is reduced as soon as it and all before it have all their gradients, at the latest by reduce.

    Args:
        parameters: of this rank, in the order of the forward pass; all of one dtype. Frozen ones, which do not require
            a gradient, are in no buffer.
        dp: ranks that hold the same parameters, over dp and cp; gradients are summed over them.
        tp: group over which gradients of `sequence_parallel` parameters are summed as well.
        shared: modules that several stages hold; their gradients are summed over the stages' ranks.
        bucket_megabytes: size of a bucket's fp32 gradients.
        shard: ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054, P_os): each replica gets the reduced gradients of its
            slice of each bucket only, updates those parameters, and gathers the others.
        overlap: reduce buckets while backward runs; False: all in reduce.
        fused: kernel of accumulate_product for half precision; None: products are temporary tensors.
    """

    def __init__(
        self,
        parameters: Sequence[NamedParameter],
        *,
        dp: Group,
        tp: Group,
        shared: Mapping[str, SharedModule] | None = None,
        bucket_megabytes: int = 160,
        shard: bool = False,
        overlap: bool = True,
        fused: WeightGradientKernel | None = None,
    ) -> None:
        self.parameters = tuple(parameters)
        self._trained = [parameter for parameter in self.parameters if parameter.trained]
        self.shared = shared or {}
        self.members = {name: [p for p in self.parameters if belongs_to(p.name, name)] for name in self.shared}
        """Parameters of this rank in each shared module."""
        self.sharded = shard and dp.size > 1
        self._dp, self._tp = dp, tp
        self._fused = fused
        dtypes = {parameter.param.dtype for parameter in self.parameters}
        assert len(dtypes) == 1, f"parameters of one rank must share a dtype, not {dtypes}"
        self.dtype = dtypes.pop()
        classes = sorted({(has_decay(p), p.lr_factor) for p in self._trained}, reverse=True)
        self.buffers = [self._build(decay, factor, bucket_megabytes * 2**20 // 4) for decay, factor in classes]
        self.shards = self._shards()
        self._written: set[int] = set()
        # Aliases of a parameter have one view of the gradients in common.
        self._gradients = {
            id(param): gradient
            for buffer in self.buffers
            for bucket in buffer.buckets
            for slot in bucket.slots
            for gradient in [_view(buffer.gradients, slot)]
            for param in slot.parameter.uses
        }
        buckets = self._buckets_by_completion()
        self._reduction = GradientReduction(
            [(bucket, buffer.gradients) for bucket, buffer in buckets],
            dp=dp,
            scatter=self.sharded,
            overlap=overlap and dp.size > 1,
        )
        values = [(bucket, buffer.values) for bucket, buffer in buckets]
        self._gather = ParameterGather(values, dp) if self.sharded else None
        for parameter in self._trained:
            for param in parameter.uses:
                param.register_post_accumulate_grad_hook(self._move_gradient)

    def begin(self, backwards: int) -> None:
        """Begin an iteration with a number of micro-batches that this rank runs backward for (0 is valid).

        Gradients of the iteration before are invalid from here on. Without this call reductions do not overlap with
        backward: all of them start in reduce.
        """
        self._written.clear()
        if backwards == 0:
            self._zero_unwritten()
        self._reduction.begin(backwards)

    def accumulate(self, param: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient that did not pass through autograd's accumulation; it counts as one arrival."""
        if self._is_first(param):
            self.gradient(param).copy_(gradient)
        else:
            self.gradient(param).add_(gradient)
        self._reduction.arrived(param)

    def accumulate_product(
        self, weight: nn.Parameter, gradient: Tensor, x: Tensor, /, *, last: bool = True, fp8: Fp8 | None = None
    ) -> None:
        """Add gradientᵀ x to the gradient of a weight; see parallel/gemm.py.

        Args:
            weight: [o, i].
            gradient: [..., o], of the product's output.
            x: [..., i], the product's input.
            last: it counts as the arrival of the weight's gradient. False: more of this micro-batch follows.
            fp8: formats of the product; None: the dtype of `x`.
        """
        accumulate_weight_gradient_(
            self.gradient(weight), gradient, x, first=self._is_first(weight), fp8=fp8, fused=self._fused
        )
        if last:
            self._reduction.arrived(weight)

    def reduce(self) -> None:
        """Complete every shard's gradients: sums over replicas, sequence parts and copies of shared parameters."""
        self._zero_unwritten()
        self.finish_gather()
        self._reduction.finish()
        self._sum_over(self._tp, [p for p in self._trained if p.sequence_parallel])
        for name, entry in self.shared.items():
            self._sum_over(entry.group, self.members[name])

    def gather(self) -> None:
        """Start gathering the parameters that other replicas updated (ZeRO-1); without ZeRO-1 do nothing.

        Parameters of overlap_gather's units may be incomplete after it.
        """
        if self._gather is not None:
            self._gather.start()

    def finish_gather(self) -> None:
        """Wait until all parameters are up to date; needed before they are read outside of a unit's forward."""
        if self._gather is not None:
            self._gather.finish()

    def gather_gradients(self, names: Collection[str]) -> None:
        """Complete the gradients of the named parameters from the shards of all replicas (ZeRO-1), in place.

        A collective call; without ZeRO-1 gradients are complete. Those of other parameters are invalid afterwards, but
        for this rank's shards.
        """
        if not self.sharded:
            return
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                if any(slot.parameter.name in names for slot in bucket.slots):
                    own = bucket.slice_of(self._dp.rank, self._dp.size)
                    gradients = buffer.gradients
                    self._dp.all_gather_(gradients[bucket.start : bucket.stop], gradients[own.start : own.stop])

    def overlap_gather(self, units: Iterable[nn.Module]) -> None:
        """Overlap gathers with the next forward: each unit's forward first waits for the unit's own parameters.

        Args:
            units: modules whose parameters are read in their own forward only, such as layers. They cannot be compiled
                modules: a graph cannot hold a wait.
        """
        if self._gather is not None:
            self._gather.overlap_with(units)

    def gradient(self, param: nn.Parameter) -> Tensor:
        """Return a parameter's fp32 gradient, shaped like it: the view of the buffer that backward accumulates into."""
        return self._gradients[id(param)]

    def _build(self, decay: bool, lr_factor: float, bucket_elements: int) -> FlatBuffer:
        parameters = [p for p in self._trained if (has_decay(p), p.lr_factor) == (decay, lr_factor)]
        buckets = lay_out(
            parameters,
            bucket_elements=bucket_elements,
            parts=self._dp.size if self.sharded else 1,
            apart={
                member.name: name
                for name, entry in self.shared.items()
                if len(entry.ranks) > 1
                for member in self.members[name]
            },
        )
        device = parameters[0].param.device
        values = torch.zeros(buckets[-1].stop, dtype=self.dtype, device=device)
        for bucket in buckets:
            for slot in bucket.slots:
                view = _view(values, slot)
                view.copy_(slot.parameter.param.data)
                for param in slot.parameter.uses:
                    param.data = view
        # Only now, when the parameters' own memory is free.
        gradients = torch.zeros(buckets[-1].stop, dtype=torch.float32, device=device)
        return FlatBuffer(decay, lr_factor, tuple(buckets), values, gradients)

    def _buckets_by_completion(self) -> list[tuple[Bucket, FlatBuffer]]:
        """Return all buckets in the order in which backward completes them: first what forward uses last."""
        place = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        buckets = [(bucket, buffer) for buffer in self.buffers for bucket in buffer.buckets]
        return sorted(buckets, key=lambda entry: -min(place[id(slot.parameter)] for slot in entry[0].slots))

    def _shards(self) -> list[Shard]:
        shards = []
        for buffer in self.buffers:
            slots = [slot for bucket in buffer.buckets for slot in bucket.slots]
            ranges = [range(buffer.values.numel())]
            if self.sharded:
                ranges = [bucket.slice_of(self._dp.rank, self._dp.size) for bucket in buffer.buckets]
            for own in ranges:
                pieces = []
                for slot in slots:
                    start, stop = max(slot.start, own.start), min(slot.stop, own.stop)
                    if start < stop:
                        pieces.append(
                            ShardPiece(slot.parameter, start - slot.start, stop - slot.start, start - own.start)
                        )
                values, gradients = (flat[own.start : own.stop] for flat in (buffer.values, buffer.gradients))
                shards.append(Shard(buffer.decay, values, gradients, tuple(pieces), buffer.lr_factor))
        return shards

    def _is_first(self, param: nn.Parameter) -> bool:
        """Return whether the parameter has no gradient of this iteration yet, and record that it has one now."""
        gradient = id(self.gradient(param))
        first = gradient not in self._written
        self._written.add(gradient)
        return first

    def _zero_unwritten(self) -> None:
        """Zero the gradients of parameters that no backward pass of this iteration reached."""
        for parameter in self._trained:
            if self._is_first(parameter.param):
                self.gradient(parameter.param).zero_()

    def _move_gradient(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter) and param.grad is not None
        gradient, param.grad = param.grad, None
        self.accumulate(param, gradient)

    def _sum_over(self, group: Group, parameters: Sequence[NamedParameter]) -> None:
        """Sum this rank's shards of the parameters over `group`; all of its ranks hold the same ranges."""
        if group.size == 1 or not parameters:
            return
        wanted = {id(parameter) for parameter in parameters}
        parts = [
            shard.gradients[piece.position : piece.position + piece.stop - piece.start]
            for shard in self.shards
            for piece in shard.pieces
            if id(piece.parameter) in wanted
        ]
        if len(parts) == 1:
            group.all_reduce_(parts[0])
        elif parts:
            joined = torch.cat(parts)
            group.all_reduce_(joined)
            for part, total in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
                part.copy_(total)


def has_decay(parameter: NamedParameter) -> bool:
    """Return whether weight decay applies (Megatron's rule): to matrices, embeddings too; not to biases and norms."""
    return parameter.param.dim() > 1


def _view(flat: Tensor, slot: Slot) -> Tensor:
    return flat[slot.start : slot.stop].view(slot.parameter.param.shape)
