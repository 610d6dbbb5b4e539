"""Training config: run length, evaluation, skipped iterations, exit conditions, loss spikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, evaluation and early exits. Exactly one of train_iters and train_samples is not 0."""

    train_iters: int = 0
    train_samples: int = 0
    train_tokens: int = 0
    """Stop once this many tokens were trained on (an additional limit); 0: no limit."""
    skip_train: bool = False
    """Evaluate only."""
    eval_interval: int = 1000
    """Iterations between validations; 0: only one, at the end."""
    eval_iters: int = 100
    """Global batches of one validation; 0: none."""
    skip_iteration_ranges: tuple[tuple[int, int], ...] = ()
    """Inclusive ranges of iterations whose samples are consumed but not trained on."""

    spike_factor: float = 0.0
    """A loss of more than this many times the recent median is too high; 0: spikes are not looked for."""
    spike_patience: int = 3
    """Iterations in a row with too high a loss that make a spike."""
    auto_rollback: int = 0
    """How often a run may go back before a spike by itself, leaving out its samples; 0: never."""

    weight_check_interval: int = 0
    """Iterations between comparisons of the replicas' weights; 0: none."""
    on_weight_mismatch: Literal["stop", "repair"] = "stop"
    """When replicas of a weight differ: end the run, or overwrite them with one of them and go on."""

    exit_interval: int = 0
    """Exit after an iteration that this divides (absolute, as Megatron means it); 0: never."""
    exit_after_iters: int = 0
    """Exit after this many iterations of this job."""
    exit_samples: int = 0
    """Exit once this many samples were consumed in total."""
    exit_duration_minutes: float = 0.0
    """Exit (saving first) once the job has run this long."""
    kill_switch_path: str = ""
    """Exit (saving first) once a file of this name exists."""
    exit_signals: bool = True
    """SIGTERM, SIGINT and SIGUSR1 end the run after the current iteration, saving first."""
