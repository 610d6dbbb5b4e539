"""Engine protocol: train step, evaluation step and state; implemented natively or by DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megatron_lite.backend.group import Group
from megatron_lite.model.batch import MicroBatch
from megatron_lite.optim.replicas import Mismatch
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.schedules.iteration import IterationPlan

T = TypeVar("T")
BatchReader = Callable[[int], MicroBatch]


@dataclass(frozen=True)
class LossSum:
    """Loss of some samples over all replicas: the sum of mean token losses of samples, and the number of samples.

    With per-token averaging, the sum of token losses and the number of unmasked tokens. Replicas may contribute
    different numbers, or none.
    """

    sum: float
    count: int

    @property
    def mean(self) -> float:
        """Return the mean loss of a sample, or of a token."""
        return self.sum / max(self.count, 1)


@dataclass(frozen=True)
class StepOutcome:
    """Result of one training iteration, equal on every rank.

    Attributes:
        loss: mean over the global batch of each sample's mean token loss.
        source_losses: mean loss of the batch's samples of each data source, by the source's number; empty for a single
            source.
        applied: the optimizer stepped. fp16 skips an iteration whose gradients overflowed.
        finite: loss and gradients were all finite.
        grad_norm: before clipping, over all parameters of all ranks.
    """

    loss: float
    source_losses: dict[int, float]
    applied: bool
    finite: bool
    grad_norm: float
    loss_scale: float
    num_zeros: int | None = None
    params_norm: float | None = None


class PendingStep(Protocol):
    """Training iteration whose work is enqueued on the device."""

    def outcome(self) -> StepOutcome:
        """Wait for the iteration, and return its result; to be called once, in the order of the iterations."""


Rates = Callable[[], tuple[float, float]]
"""Returns learning rate and weight decay of a step. It is called just before the step is enqueued: fp16 first needs the
outcome of the step before."""


class Engine(Protocol):
    """Trains and evaluates one rank's share of the model."""

    @property
    def world(self) -> Group:
        """All ranks that the engine spans."""

    def train_step(self, plan: IterationPlan, read: BatchReader, rates: Rates | None = None) -> PendingStep:
        """Enqueue one iteration: this replica's micro-batches, the gradient reduction and the optimizer's step.

        No value of the device is read. With fp16 the outcome of the iteration before must be taken before the
        optimizer's step, at the latest in `rates`; otherwise before the next iteration's outcome.

        Args:
            plan: of the iteration.
            read: reads this replica's micro-batches.
            rates: learning rate and weight decay; None: the plan's.
        """

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Use the moving average of the weights (--ema-decay) within the context; a collective call at both ends."""

    def eval_step(self, microbatches: int, read: BatchReader, seq_length: int) -> LossSum:
        """Run forwards only, on this replica's micro-batches; return the loss over all replicas."""

    def state_tensors(self) -> list[GlobalTensor]:
        """Return this rank's pieces of the named global tensors that a checkpoint holds, to be saved."""

    def fill(self, read: Callable[[list[GlobalTensor]], T]) -> T:
        """Load the tensors: call `read` with this rank's pieces, which it fills in place, and return its result."""

    def state_scalars(self) -> dict[str, Any]:
        """Return the rest of the state as JSON values: the loss scaler's counters."""

    def load_scalars(self, scalars: dict[str, Any]) -> list[str]:
        """Restore the result of state_scalars, after `fill`; a collective call.

        Returns:
            Messages for the log.
        """

    def compare_replicas(self) -> list[Mismatch]:
        """Find parameters whose replicas differ in any bit; the same on every rank; a collective call."""

    def repair_replicas(self, mismatches: Sequence[Mismatch]) -> None:
        """Overwrite differing replicas, and their optimizer state, with one of them; a collective call."""

    def close(self) -> None:
        """Remove the engine's temporary files, at the end of the run."""
