"""Loss scalers for fp16: constant, Megatron's dynamic rule and DeepSpeed's.

fp16 rounds gradients below 6e-8 to zero, so the loss is multiplied by a scale, and gradients are divided by it before
the step. A dynamic scale is doubled until gradients overflow, and halved when they do. Megatron and DeepSpeed differ in
when the hysteresis, the number of overflows that it takes to halve the scale, is reset.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.errors import TrainingError

MAX_OVERFLOWS = 20
"""Overflows in a row at the smallest scale after which MegatronScaler ends the run: a single batch may be unusual."""


class LossScaler(ABC):
    """Loss scale, adapted after each iteration.

    Attributes:
        kind: name of the rule in a checkpoint.
        scale: factor on the loss of the next backward pass.
    """

    kind: ClassVar[str]
    scale: float

    @abstractmethod
    def update(self, overflow: bool) -> None:
        """Update the scale after an iteration; `overflow` must be equal on all ranks."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the state for `load`, as JSON values."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""


class ConstantScaler(LossScaler):
    """Constant scale: --loss-scale, or 1 for bf16 and fp32."""

    kind = "constant"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def update(self, overflow: bool) -> None:
        """Do nothing: an iteration with an overflow is skipped, and the next one has the same scale."""

    def state(self) -> dict[str, Any]:
        """Return no state: the constant is part of the config, so that a resumed run may change it."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""


class DivergedError(TrainingError):
    """Gradients overflow at the smallest loss scale."""


class DynamicScaler(LossScaler):
    """Scale that is halved after overflows and doubled after iterations without.

    Args:
        initial: first scale.
        minimum: smallest scale.
        window: iterations without an overflow after which the scale is doubled.
        hysteresis: overflows that it takes to halve the scale.
    """

    def __init__(self, initial: float, minimum: float, window: int, hysteresis: int) -> None:
        self.scale = initial
        self._minimum = minimum
        self._window = window
        self._full_hysteresis = hysteresis
        self._hysteresis = hysteresis

    def after(self, overflow: bool) -> float:
        """Return the scale that `update` would set."""
        following = copy.copy(self)
        try:
            following.update(overflow)
        except TrainingError:
            return self.scale  # raised by update itself
        return following.scale

    def _diverged(self, overflows: str) -> TrainingError:
        return DivergedError(
            f"The run has diverged: {overflows} in fp16, and the loss scale is at its minimum of {self.scale:g} "
            "(--min-loss-scale)",
            fix="Resume from a checkpoint before these iterations (--load-iteration N; `megatron-lite checkpoint list "
            "RUN` lists them) with a lower --lr, or train with --bf16",
        )


class MegatronScaler(DynamicScaler):
    """Megatron's DynamicGradScaler: halves after `hysteresis` overflows, doubles after `window` steps without one.

    Overflows decrement the hysteresis counter, and only doubling resets it: once it is zero, every further overflow
    halves the scale. When gradients overflow at the smallest scale, Megatron skips every step forever; here
    MAX_OVERFLOWS in a row end the run.
    """

    kind = "megatron"
    _growth = 0
    _overflows_at_minimum = 0

    def update(self, overflow: bool) -> None:
        """Update the scale after an iteration.

        Raises:
            TrainingError: MAX_OVERFLOWS overflows in a row at the smallest scale.
        """
        self._overflows_at_minimum = self._overflows_at_minimum + 1 if overflow and self.scale <= self._minimum else 0
        if self._overflows_at_minimum == MAX_OVERFLOWS:
            raise self._diverged(f"the gradients of {MAX_OVERFLOWS} iterations in a row overflow")
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
        """Return the scale and both counters, with Megatron's names."""
        return {"scale": self.scale, "growth_tracker": self._growth, "hysteresis_tracker": self._hysteresis}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.scale = float(state["scale"])
        self._growth = int(state["growth_tracker"])
        self._hysteresis = int(state["hysteresis_tracker"])


class DeepSpeedScaler(DynamicScaler):
    """DeepSpeed's DynamicLossScaler: doubles every `window` iterations, counted from the last overflow.

    Overflows decrement the hysteresis counter even if they are far apart; doubling resets it, as in Megatron.
    """

    kind = "deepspeed"
    _iteration = 0
    _last_overflow = -1

    def update(self, overflow: bool) -> None:
        """Update the scale after an iteration.

        Raises:
            TrainingError: overflow at the smallest scale.
        """
        if not overflow:
            if (self._iteration - self._last_overflow) % self._window == 0:
                self._hysteresis = self._full_hysteresis
                self.scale *= 2
        else:
            if self._full_hysteresis == 1 or self._hysteresis == 1:
                if self.scale == self._minimum:
                    raise self._diverged("gradients overflow")
                self.scale = max(self.scale / 2, self._minimum)
            else:
                self._hysteresis -= 1
            self._last_overflow = self._iteration
        self._iteration += 1

    def state(self) -> dict[str, Any]:
        """Return the scale and the counters, with DeepSpeed's names."""
        return {
            "cur_scale": self.scale,
            "cur_iter": self._iteration,
            "last_overflow_iter": self._last_overflow,
            "cur_hysteresis": self._hysteresis,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.scale = float(state["cur_scale"])
        self._iteration = int(state["cur_iter"])
        self._last_overflow = int(state["last_overflow_iter"])
        self._hysteresis = int(state["cur_hysteresis"])


def build_loss_scaler(precision: PrecisionConfig) -> LossScaler:
    """Create the loss scaler of a run: constant 1 unless the dtype is fp16."""
    if precision.dtype != "fp16":
        return ConstantScaler()
    if precision.loss_scale:
        return ConstantScaler(precision.loss_scale)
    rule = DeepSpeedScaler if precision.scaler == "deepspeed" else MegatronScaler
    return rule(
        precision.initial_loss_scale, precision.min_loss_scale, precision.loss_scale_window, precision.hysteresis
    )
