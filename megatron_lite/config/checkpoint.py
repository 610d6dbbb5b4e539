"""Checkpoint config: save folder and schedule, retention, --load options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SavePhase:
    """Save every `interval` iterations up to iteration `until` (0: to the end of the run)."""

    interval: int
    until: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, retention and loading."""

    save: str = ""
    phases: tuple[SavePhase, ...] = ()
    """--save-interval N is one phase; --save-schedule "10:100 18:1000 1500" is three."""
    save_optimizer: bool = True
    asynchronous: bool = False
    save_on_exit: bool = True
    """Save when a run stops early; the end of a run is always saved."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """After a save that failed (a full disk): stop, or train on. The last save of a job must succeed."""
    weights_only_every: int = 0
    """Save the weights alone every this many iterations, in the folder `weights` below --save; 0: never."""
    keep_last: int = 0
    """Checkpoints kept; 0: all."""
    keep_every: int = 0
    """Of older checkpoints, keep those of every this many iterations; 0: none."""
    keep_phases: tuple[SavePhase, ...] = ()
    """Of older checkpoints, keep those that this schedule would save."""
    load: str = ""
    load_iteration: int = 0
    """Iteration to load; 0: the one latest_checkpointed_iteration.txt names."""
    load_optimizer: bool = True
    finetune: bool = False
    """Load the weights only and start at iteration 0."""
    reset_progress: bool = False
    """--reset-iteration: load weights and optimizer state, but start at iteration 0 with nothing consumed."""
    exit_on_missing: bool = False
    """--exit-on-missing-checkpoint: an empty --load folder is an error instead of a fresh start."""
    override_schedule: bool = False
    """The command line's learning-rate schedule wins over the checkpoint's."""
    use_checkpoint_schedule: bool = False
    """The checkpoint's learning-rate schedule wins over the command line's."""
    fallback_on_corrupt: bool = False
    """Load the newest earlier checkpoint if the wanted one is damaged, saying so."""
    accept_changed: tuple[str, ...] = ()
    """What may differ from the run that wrote the checkpoint: tokenizer, data, code."""

    @property
    def in_one_folder(self) -> bool:
        """Whether --load and --save are the same folder: the command that starts such a run goes on with it."""
        return bool(self.load and self.save) and Path(self.load).resolve() == Path(self.save).resolve()
