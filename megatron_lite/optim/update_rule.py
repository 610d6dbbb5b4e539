"""Update rules: the interface, and torch's fused AdamW and SGD over flat main parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.parallel.buffers import Shard, ShardPiece
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import GlobalTensor

CHUNK = 1 << 22
"""Elements that a rule without a fused kernel updates at once: bounds the memory of its temporary tensors."""


@dataclass(frozen=True, eq=False)
class PieceState:
    """Optimizer state with one element for each element of a piece.

    Attributes:
        name: in checkpoints, without the parameter's: exp_avg.
        piece: elements of a parameter.
        tensor: [stop - start].
    """

    name: str
    piece: ShardPiece
    tensor: Tensor


class UpdateRule(ABC):
    """Optimizer step over shards of fp32 main parameters (Shard.values) with their fp32 gradients.

    Rules run on the device alone: no value is read on the host, unless torch has no fused kernel for the device.
    """

    @abstractmethod
    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters; a collective call for some rules. Gradients are invalid afterwards.

        Args:
            lr: learning rate, multiplied by the factor of each shard.
            weight_decay: of the shards with weight decay; 0 for the others. SGD's is added to the gradient, all others
                are decoupled from it.
            divisor: scalar on the device that gradients are divided by; None: 1.
            applies: bool scalar on the device. False: parameters and state stay as they are.
        """

    @abstractmethod
    def states(self) -> list[PieceState]:
        """Return this rank's state of single elements: views, or copies that `adopt` and `load` write back."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes of this rank's state on the device."""

    def vectors(self) -> list[GlobalTensor]:
        """Return this rank's state of rows and columns, as views."""
        return []

    def vectors_of(self, parameter: NamedParameter) -> list[Tensor]:
        """Return the state of rows and columns of one parameter, as views."""
        return []

    def adopt(self) -> None:
        """Take over what was written to the tensors of `states`, where they are copies."""
        return

    @abstractmethod
    def load(self, applied: int) -> None:
        """Set the number of steps so far, after the tensors of `states` and `vectors` were filled."""


def torch_optimizer(
    kind: Literal["adam", "sgd"], config: OptimizerConfig, rows: Sequence[tuple[Tensor, bool, float]], *, fused: bool
) -> torch.optim.Optimizer:
    """Create torch's AdamW or SGD, with a group for each combination of weight decay and learning-rate factor.

    Args:
        kind: which of the two.
        config: hyperparameters.
        rows: tensors to update, each with whether weight decay applies to it, and the factor of its learning rate.
        fused: whether to use torch's fused kernels.
    """
    groups = [
        {"params": [tensor for tensor, *own in rows if own == [decays, factor]], "decays": decays, "factor": factor}
        for decays, factor in dict.fromkeys((decays, factor) for _, decays, factor in rows)
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, fused=fused)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of the groups of torch_optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


class TorchRule(UpdateRule):
    """torch's AdamW or SGD, in one pass over main parameters, gradients and moments.

    Args:
        kind: which of the two.
        config: hyperparameters.
        shards: main parameters.
        fused: whether to use torch's fused kernels, which scale gradients and skip steps on the device. For others
            the gradients are scaled before, and the host reads whether the step is applied.
    """

    def __init__(
        self, kind: Literal["adam", "sgd"], config: OptimizerConfig, shards: Sequence[Shard], *, fused: bool
    ) -> None:
        self._shards = tuple(shards)
        self._steps: list[Tensor] = []
        self._fused = fused
        self._moments: list[dict[str, Tensor]] = []
        rows = [(shard.values, shard.decay, shard.lr_factor) for shard in shards]
        self._rule = torch_optimizer(kind, config, rows, fused=fused) if rows else None
        names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"} if kind == "adam" else {}
        if kind == "sgd" and config.sgd_momentum:
            names = {"momentum": "momentum_buffer"}
        for shard in self._shards:
            assert self._rule is not None
            main = shard.values
            main.grad = shard.gradients
            moments = {name: torch.zeros_like(main) for name in names}
            self._rule.state[main] = {names[name]: moment for name, moment in moments.items()}
            self._moments.append(moments)
            if kind == "adam":
                # Fused kernels read the step count on the device, other kernels on the host without synchronization.
                step = torch.zeros((), dtype=torch.float32, device=main.device if fused else "cpu")
                self._rule.state[main]["step"] = step
                self._steps.append(step)

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters; gradients are divided in place."""
        if self._rule is None or self._shards[0].values.is_meta:
            return  # on meta tensors torch's kernels would allocate what the fused ones do not
        set_rates(self._rule, lr, weight_decay)
        if self._fused:
            # Inputs of the fused kernels for mixed precision; torch's GradScaler passes them in the same way.
            self._rule.grad_scale = None if divisor is None else divisor.float()  # type: ignore[attr-defined]
            self._rule.found_inf = 1.0 - applies.float()  # type: ignore[attr-defined]
        else:
            if not applies.item():
                return
            for shard in self._shards:
                prepare(shard.gradients, divisor, applies)
        self._rule.step()

    def states(self) -> list[PieceState]:
        """Return the moments."""
        return states_of_shards(self._shards, self._moments)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the moments."""
        return sum(moment.nbytes for moments in self._moments for moment in moments.values())

    def load(self, applied: int) -> None:
        """Set Adam's step count, for its bias correction."""
        for step in self._steps:
            step.fill_(applied)


class Chain(UpdateRule):
    """Rules of different parameters, one after the other."""

    def __init__(self, *rules: UpdateRule) -> None:
        self._rules = rules

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters of all rules."""
        for rule in self._rules:
            rule.step(lr, weight_decay, divisor, applies)

    def states(self) -> list[PieceState]:
        """Return the state of all rules."""
        return [state for rule in self._rules for state in rule.states()]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the state of all rules."""
        return sum(rule.nbytes for rule in self._rules)

    def adopt(self) -> None:
        """Let each rule take over its state."""
        for rule in self._rules:
            rule.adopt()

    def load(self, applied: int) -> None:
        """Load each rule."""
        for rule in self._rules:
            rule.load(applied)


def states_of_shards(shards: Iterable[Shard], states: Iterable[dict[str, Tensor]]) -> list[PieceState]:
    """Return the pieces of flat state tensors.

    Args:
        shards: main parameters.
        states: for each shard, state tensors as long as it, by name.
    """
    return [
        PieceState(name, piece, state[piece.position : piece.position + piece.stop - piece.start])
        for shard, named in zip(shards, states, strict=True)
        for piece in shard.pieces
        for name, state in named.items()
    ]


def ranges_of(shards: Iterable[Shard], wanted: Callable[[NamedParameter], bool], *, joined: bool = True) -> list[Shard]:
    """Return the ranges of shards all of whose parameters are wanted, as shards.

    Args:
        shards: main parameters.
        wanted: whether a parameter is.
        joined: ranges are as long as possible; False: one for each piece.
    """
    found: list[Shard] = []
    for shard in shards:
        runs: list[list[ShardPiece]] = []
        joins = False
        for piece in shard.pieces:
            wants = wanted(piece.parameter)
            if wants and joins and joined:
                runs[-1].append(piece)
            elif wants:
                runs.append([piece])
            joins = wants
        for pieces in runs:
            begin, last = pieces[0].position, pieces[-1]
            end = last.position + last.stop - last.start
            moved = tuple(replace(piece, position=piece.position - begin) for piece in pieces)
            flat = shard.values[begin:end], shard.gradients[begin:end]
            found.append(Shard(shard.decay, *flat, moved, shard.lr_factor))
    return found


def prepare(gradients: Tensor, divisor: Tensor | None, applies: Tensor) -> None:
    """Divide gradients in place; set them to zero if the step is not applied, since they may not be finite."""
    if divisor is not None:
        gradients.div_(divisor)
    gradients.masked_fill_(applies.logical_not(), 0.0)
