"""Parameter sharding metadata: global name, global shape and local slice of each model parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from megatron_lite.backend.group import Group
from megatron_lite.config.selection import Selection
from megatron_lite.rectangle import Rectangle


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """Parameter of a stage with its place in the global tensor.

    The local tensor, viewed with the shape of `rectangle`, is that rectangle of the global tensor. Both shapes are
    without padded vocabulary rows. The first weight of a gated MLP is (2, ffn, h) globally, so that its tensor-parallel
    shard is one rectangle.
    """

    name: str
    """Global name, the same in every layout: layers are numbered over the whole model."""
    param: nn.Parameter
    global_shape: tuple[int, ...]
    tp_dim: int | None
    """Dim of global_shape that is split over tp; None: replicated over tp."""
    rectangle: Rectangle
    """This rank's part of the global tensor."""
    owned: bool = True
    """Whether norms count, and checkpoints save, this rank's copy of a parameter that several stages hold
    (parallel/shared.py); True for all other parameters."""
    sequence_parallel: bool = False
    """Replicated over tp, but each rank computes the gradient of its part of the sequence (or of the heads), so that
    gradients are summed over tp."""
    aliases: tuple[nn.Parameter, ...] = ()
    """Views of the same tensor that other layers or stages of this rank use (parallel/shared.py)."""
    passes: int = 1
    """Gradients that arrive per micro-batch: one for each backward pass that reaches the parameter, and one for the
    head's product."""
    lr_factor: float = 1.0
    """Factor of the learning rate (--lr-factors)."""

    @property
    def trained(self) -> bool:
        """Return whether the parameter is trained; frozen ones (--freeze) have neither gradient nor optimizer state."""
        return self.param.requires_grad

    @property
    def uses(self) -> tuple[nn.Parameter, ...]:
        """Return the parameter and its aliases."""
        return (self.param, *self.aliases)

    def local(self, tensor: Tensor | None = None) -> Tensor:
        """Return the parameter, or a tensor shaped like it (gradient, moment), without padding: a view.

        Args:
            tensor: as many elements as the parameter; None: the parameter's data.

        Returns:
            A view with the shape of `rectangle`.
        """
        shape = self.rectangle.shape
        padded = (self.param.data if tensor is None else tensor).view(self.param.shape)
        if len(shape) == padded.dim() and shape[0] < padded.shape[0]:
            padded = padded[: shape[0]]
        return padded.view(shape)


def vocabulary_parameter(name: str, param: nn.Parameter, vocab_size: int, group: Group) -> NamedParameter:
    """Return the named parameter of a [V/tp, h] table: this rank's rows of (vocab_size, h), none if all are padding."""
    rows, hidden = param.shape
    first = min(rows * group.rank, vocab_size)
    return NamedParameter(
        name=name,
        param=param,
        global_shape=(vocab_size, hidden),
        tp_dim=0,
        rectangle=Rectangle((first, 0), (min(rows * (group.rank + 1), vocab_size) - first, hidden)),
    )


def replicated_parameter(name: str, param: nn.Parameter, *, sequence_parallel: bool) -> NamedParameter:
    """Return the named parameter of a tensor that every tp rank holds."""
    shape = tuple(param.shape)
    return NamedParameter(
        name=name,
        param=param,
        global_shape=shape,
        tp_dim=None,
        rectangle=Rectangle.full(shape),
        sequence_parallel=sequence_parallel,
    )


def apply_selection(parameters: Sequence[NamedParameter], selection: Selection) -> list[NamedParameter]:
    """Freeze parameters of this rank, and return all of them with their learning-rate factors."""
    for parameter in parameters:
        for param in parameter.uses:
            param.requires_grad_(parameter.name not in selection.frozen)
    return [replace(parameter, lr_factor=selection.factors.get(parameter.name, 1.0)) for parameter in parameters]
