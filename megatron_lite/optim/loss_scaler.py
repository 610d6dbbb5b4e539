"""Loss scales for fp16: constant, Megatron's dynamic rule and DeepSpeed's.

fp16 loses gradients below 6e-8, so the loss is multiplied by a scale and gradients are divided by it again. A dynamic
scale grows until gradients overflow, and backs off when they do; the two originals differ in when their tolerance of
overflows (the hysteresis) is refilled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.errors import TrainingError

PATIENCE = 20
"""Overflows in a row at the smallest scale with which MegatronScaler gives up: one batch may be odd, not twenty."""


class LossScaler(ABC):
    """A loss scale and the rule by which it follows overflows.

    Attributes:
        kind: names the rule in a checkpoint.
        scale: what the loss is multiplied by in the next backward.
    """

    kind: ClassVar[str]
    scale: float

    @abstractmethod
    def update(self, overflow: bool) -> None:
        """Counts one iteration. `overflow` must be what all ranks agreed on, so that their scales stay equal."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `load` needs to go on exactly here, as JSON values."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the result of `state`."""


class ConstantScaler(LossScaler):
    """A scale that never changes: --loss-scale, and 1 for bf16 and fp32."""

    kind = "constant"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def update(self, overflow: bool) -> None:
        """Changes nothing: an overflowing iteration is skipped, and the next has the same scale."""

    def state(self) -> dict[str, Any]:
        """Empty: the constant is the config's, so that a resumed run may change it."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to take over."""


class DynamicScaler(LossScaler):
    """A scale that follows overflows.

    Args:
        initial: the first scale.
        minimum: it never falls below this.
        window: good iterations after which it doubles.
        hysteresis: overflows that it takes to halve it.
    """

    def __init__(self, initial: float, minimum: float, window: int, hysteresis: int) -> None:
        self.scale = initial
        self._minimum = minimum
        self._window = window
        self._full_hysteresis = hysteresis
        self._hysteresis = hysteresis

    def _diverged(self, overflows: str) -> TrainingError:
        return TrainingError(
            "The loss scale cannot go below its minimum",
            found=f"{overflows} in fp16 at a loss scale of {self.scale:g}, which is --min-loss-scale",
            fix="The run has diverged: go on from an earlier checkpoint (--load-iteration) with a lower --lr, or use "
            "--bf16",
        )


class MegatronScaler(DynamicScaler):
    """Megatron's DynamicGradScaler: halve after `hysteresis` overflows, double after `window` good steps in a row.

    Overflows use up the hysteresis, and only a doubling refills it: so once it is used up, every further overflow
    halves the scale at once. Megatron goes on for ever when the smallest scale overflows, without ever stepping again;
    here PATIENCE overflows in a row end the run.
    """

    kind = "megatron"
    _growth = 0
    _overflows_at_minimum = 0

    def update(self, overflow: bool) -> None:
        """Counts one iteration.

        Raises:
            TrainingError: PATIENCE overflows in a row at the smallest scale: nothing is trained any more.
        """
        self._overflows_at_minimum = self._overflows_at_minimum + 1 if overflow and self.scale <= self._minimum else 0
        if self._overflows_at_minimum == PATIENCE:
            raise self._diverged(f"the gradients of {PATIENCE} iterations in a row overflow")
        if overflow:
            self._growth = 0
            self._hysteresis -= 1
            if self._hysteresis <= 0:
                self.scale = max(self.scale / 2, self._minimum)
            return
        self._growth += 1
        if self._growth == self._window:
            self._growth = 0
            self._hysteresis = self._full_hysteresis
            self.scale *= 2

    def state(self) -> dict[str, Any]:
        """Scale and both counters, under Megatron's names."""
        return {"scale": self.scale, "growth_tracker": self._growth, "hysteresis_tracker": self._hysteresis}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the result of `state`."""
        self.scale = float(state["scale"])
        self._growth = int(state["growth_tracker"])
        self._hysteresis = int(state["hysteresis_tracker"])


class DeepSpeedScaler(DynamicScaler):
    """DeepSpeed's DynamicLossScaler: doubles every `window` iterations counted from the last overflow.

    Two overflows that lie far apart use up the hysteresis as two in a row do; a doubling refills it, as in Megatron.
    """

    kind = "deepspeed"
    _iteration = 0
    _last_overflow = -1

    def update(self, overflow: bool) -> None:
        """Counts one iteration.

        Raises:
            TrainingError: an overflow at the smallest scale: a smaller one cannot help.
        """
        if not overflow:
            if (self._iteration - self._last_overflow) % self._window == 0:
                self._hysteresis = self._full_hysteresis
                self.scale *= 2
        else:
            if self._full_hysteresis == 1 or self._hysteresis == 1:
                self._halve()
            else:
                self._hysteresis -= 1
            self._last_overflow = self._iteration
        self._iteration += 1

    def _halve(self) -> None:
        if self.scale == self._minimum:
            raise self._diverged("gradients overflow")
        self.scale = max(self.scale / 2, self._minimum)

    def state(self) -> dict[str, Any]:
        """Scale and counters, under DeepSpeed's names."""
        return {
            "cur_scale": self.scale,
            "cur_iter": self._iteration,
            "last_overflow_iter": self._last_overflow,
            "cur_hysteresis": self._hysteresis,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the result of `state`."""
        self.scale = float(state["cur_scale"])
        self._iteration = int(state["cur_iter"])
        self._last_overflow = int(state["last_overflow_iter"])
        self._hysteresis = int(state["cur_hysteresis"])


def build_loss_scaler(precision: PrecisionConfig) -> LossScaler:
    """Returns the scaler of a run: constant 1 unless it is fp16."""
    if precision.dtype != "fp16":
        return ConstantScaler()
    if precision.loss_scale:
        return ConstantScaler(precision.loss_scale)
    rule = DeepSpeedScaler if precision.scaler == "deepspeed" else MegatronScaler
    return rule(
        precision.initial_loss_scale, precision.min_loss_scale, precision.loss_scale_window, precision.hysteresis
    )
