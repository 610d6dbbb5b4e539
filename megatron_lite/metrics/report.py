"""Report dataclasses passed from the training loop to the metric sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known once the run is assembled, before its first iteration."""

    parameters: int
    """Trainable parameters of the whole model, without the padded vocabulary rows."""
    train_iterations: int
    start_iteration: int = 0
    """Iterations done before this start: the checkpoint's number, or 0."""
    validation_due: bool = False
    """Whether the validation after that iteration is still to be made: reports of an unfinished one do not count."""
    world_size: int = 1
    data_parallel: int = 1
    device: str = "cpu"
    """The device's name, for people."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device in the run's dtype; None where it is not known."""
    dtype: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class IterationReport:
    """One finished iteration. Times are in seconds, memory in bytes; counts are of this iteration alone."""

    iteration: int
    """Iterations finished, this one included."""
    train_iterations: int
    consumed_train_samples: int
    consumed_train_tokens: int
    skipped_train_samples: int = 0
    """Samples passed over so far by --skip-train-iteration-range."""
    losses: Mapping[str, float]
    """"lm loss" and, for a blend, one entry per source ("lm loss <source>"), each the mean over its samples."""
    learning_rate: float
    global_batch_size: int
    seq_length: int
    loss_scale: float = 1.0
    grad_norm: float | None = None
    num_zeros: int | None = None
    params_norm: float | None = None
    skipped: int = 0
    """1 if the optimizer's step was not applied (fp16 overflow)."""
    nan: int = 0
    """1 if the loss was not finite."""
    seconds: float
    tokens_per_second: float
    """Of the whole job, not of one device."""
    tflops_per_device: float | None = None
    """Model TFLOP/s: see throughput.py for the formula."""
    mfu: float | None = None
    """Model FLOP/s over the device's peak, 0 to 1; None where the peak is not known."""
    eta_seconds: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    """The device's allocated, max_allocated, reserved and max_reserved bytes."""
    timers: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent under each named timer."""

    @property
    def tokens(self) -> int:
        """Tokens of this iteration."""
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """One evaluation of one dataset."""

    iteration: int
    consumed_train_samples: int
    consumed_train_tokens: int = 0
    losses: Mapping[str, float]
    split: Literal["validation", "test"] = "validation"
    name: str = ""
    """The dataset's name where there are several; empty for the only one."""
    at_end: bool = False
    """The evaluation that ends a run, which a longer run would not have made."""
    seconds: float = 0.0
    samples: int = 0
