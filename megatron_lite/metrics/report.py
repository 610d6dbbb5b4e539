"""Report dataclasses passed from the training loop to the metric sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of an assembled run before its first iteration."""

    parameters: int
    """Trainable parameters of the whole model, without the padded vocabulary rows."""
    train_iterations: int
    start_iteration: int = 0
    """Iterations finished before this start: the iteration of the checkpoint, or 0."""
    validation_due: bool = False
    """True if the validation after start_iteration is unfinished and will be repeated."""
    world_size: int = 1
    data_parallel: int = 1
    device: str = "cpu"
    """Human-readable device name."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device in the dtype of the run; None: unknown."""
    dtype: str = "fp32"
    hosts: Sequence[str] = ()
    """Host of each rank."""
    command: Sequence[str] = ()
    """Command line of the job, without the program's name."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python, libraries and this program, and the operating system of the reporting rank."""
    startup_seconds: float = 0.0
    """From the start of the job, or from its automatic rollback, to the first iteration."""
    after_rollback: bool = False
    """True if the same job has trained before, and has rolled itself back (--auto-rollback)."""


@dataclass(frozen=True, kw_only=True)
class IterationReport:
    """One finished iteration. Times in seconds, memory in bytes, counts of this iteration only."""

    iteration: int
    """Iterations finished, this one included."""
    train_iterations: int
    consumed_train_samples: int
    consumed_train_tokens: int
    skipped_train_samples: int = 0
    """Total samples skipped by --skip-train-iteration-range."""
    losses: Mapping[str, float]
    """"lm loss" and, for a blend, "lm loss <source>" of each source, as means over samples."""
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
    """Total of all devices."""
    tflops_per_device: float | None = None
    """Model TFLOP/s per device, with the formula of throughput.py."""
    mfu: float | None = None
    """Model FLOP/s relative to the peak of the device, 0 to 1; None: unknown peak."""
    eta_seconds: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    """Allocated, max_allocated, reserved and max_reserved bytes of the device."""
    timers: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each timer."""
    rank_seconds: Sequence[float] | None = None
    """Compute seconds of each rank (compute_time.py) in the last measured iteration; 0: unknown."""
    parts: Mapping[str, float] | None = None
    """Seconds of the parts of the iteration before this one, as means over the ranks (compute_time.py)."""

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
    """Dataset name; empty for a single dataset."""
    at_end: bool = False
    """True for the evaluation at the end of the run, which a longer run would not have performed."""
    seconds: float = 0.0
    samples: int = 0


@dataclass(frozen=True)
class SaveRecord:
    """A complete save.

    Attributes:
        iteration: of the checkpoint.
        seconds: from the beginning of the save until the checkpoint is complete.
        size: bytes on disk.
        blocking_seconds: part of the seconds in which training paused.
    """

    iteration: int
    seconds: float
    size: int
    blocking_seconds: float
