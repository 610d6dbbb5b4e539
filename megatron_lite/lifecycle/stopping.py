"""Stop conditions: limits given on the command line, a kill switch, signals; polled between steps."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_lite.backend.environment import host_name
from megatron_lite.backend.job_end import JobEnd
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import ConfigError
from megatron_lite.lifecycle.exit_status import REPEAT_SECONDS
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.saves import SAVE_SAFETY

if TYPE_CHECKING:
    from megatron_lite.backend.group import Group

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Rollback:
    """A rollback to perform: the checkpoint's iteration, and the positions [first, end) in the data order to skip."""

    iteration: int
    skip: tuple[int, int]


@dataclass(frozen=True)
class Stop:
    """A reason to end training now.

    Attributes:
        status: as in exit_status.json: completed, evaluated, exit_flag, time_limit, kill_switch, signal or error; or
            rollback, after which the job continues.
        message: the log line, in Megatron's words where it has them.
        required_change: what must change first, where the next start would stop for the same reason at once; or empty.
        rollback: the rollback to perform, if that is the reason.
        limit: the flag or option that set the limit, for status time_limit.
    """

    status: str
    message: str
    required_change: str = ""
    rollback: Rollback | None = None
    limit: str = ""


class SignalFlag:
    """Records the first SIGTERM, SIGINT or SIGUSR1 instead of ending the process, so that the step can be finished.

    A context manager that restores the old handlers on exit. A second SIGINT, more than REPEAT_SECONDS later, raises
    KeyboardInterrupt at once.

    Args:
        announce: print a line when a signal arrives (rank 0). If only another rank receives one, the line with which
            the job stops names that rank (agree).
        saves: the job saves when it stops; for that line.
    """

    def __init__(self, *, announce: bool = True, saves: bool = True) -> None:
        self._announce = announce
        self._saves = saves
        self._old: dict[signal.Signals, object] = {}
        self.received: signal.Signals | None = None
        self._received_at = 0.0

    def __enter__(self) -> SignalFlag:
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            if time.monotonic() - self._received_at < REPEAT_SECONDS:
                return
            raise KeyboardInterrupt
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        if not self._announce:
            return
        then = "saving and stopping" if self._saves else "stopping"
        again = " Press Ctrl-C again to stop at once, without saving." if number == signal.SIGINT else ""
        text = f"\n{self.received.name} received: finishing this step, then {then}.{again}\n"
        # os.write: the signal may interrupt a print, whose buffer is not reentrant.
        os.write(2, text.encode())


class Stopper:
    """Decides between steps whether the run ends, from the config, the clock, the kill switch and signals.

    Args:
        config: the limits.
        flag: the signals received; None: signals are not handled.
        started: the clock's value when the job began; None: now.
        job_end: end of the Slurm job, on the rank that knows it.
        first_save: seconds to leave for a save before the Slurm job's end while no save of the run was measured.
        clock: seconds, from any origin; injected by tests.
    """

    def __init__(
        self,
        config: TrainingConfig,
        flag: SignalFlag | None = None,
        *,
        started: float | None = None,
        job_end: JobEnd | None = None,
        first_save: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._flag = flag
        self._clock = clock
        self._started = clock() if started is None else started
        self._job_end = job_end
        self._first_save = first_save
        self._iterations_here = 0

    def describe_time_limit(self, *, save: float | None) -> str:
        """Return a start-up line on when the time limit stops the run, and because of what; empty: there is no limit.

        Args:
            save: as for after_iteration.

        Raises:
            ConfigError: the margin is as long as the Slurm job.
        """
        limit = 60 * self._config.exit_duration_minutes
        by_flag = limit - (self._clock() - self._started) - (save or 0.0) if limit else math.inf
        left = self._job_end.seconds_left() if self._job_end is not None else None
        if self._job_end is None or left is None:
            return self._describe_flag(by_flag) if limit else ""
        margin, budget = self._config.job_end_margin, self._save_budget(save)
        if margin >= left + (self._clock() - self._started):
            raise ConfigError(
                f"Slurm job {self._job_end.job} ends in {left:.0f} s (at {_clock(left)}), and --job-end-margin-in-secs "
                f"{margin:g} reserves all of it, so no time is left for training",
                fix="Submit the job with a longer time limit (sbatch --time), or use a smaller "
                "--job-end-margin-in-secs",
            )
        by_slurm = left - margin - budget
        if by_flag < by_slurm:
            return self._describe_flag(by_flag)
        kept = f"{budget:.0f} s for the save and {margin:g} s after it (--job-end-margin-in-secs)"
        if by_slurm <= 0:
            return (
                f"WARNING: {self._job_end}, leaves too little time to keep {kept} free: the run stops after one "
                "iteration. Request a longer --time from sbatch"
            )
        return f"  time limit  {_at(by_slurm)}, because of {self._job_end}: {kept} are kept free"

    def _describe_flag(self, left: float) -> str:
        minutes = self._config.exit_duration_minutes
        return f"  time limit  {_at(left)}, because of --exit-duration-in-mins {minutes:g}"

    def before_iteration(self, progress: Progress) -> Stop | None:
        """Return a reason not to begin the first iteration: one that holds after any restart, or a signal."""
        if stop := self._requested_stop():
            return stop
        config = self._config
        if config.exit_samples and progress.consumed_train_samples >= config.exit_samples:
            message = f"exiting program after {progress.consumed_train_samples} samples (--exit-samples)"
            return Stop("exit_flag", message, "with a larger --exit-samples")
        return None

    def after_iteration(self, progress: Progress, *, save: float | None = 0.0, iteration: float = 0.0) -> Stop | None:
        """Return the reason to stop after an iteration; None: continue.

        Args:
            progress: after the iteration.
            save: seconds that the save will take, by the slowest one so far; 0: unknown; None: there is no --save.
            iteration: seconds that the next iteration will take, by recent ones.
        """
        self._iterations_here += 1
        config = self._config
        if stop := self.before_iteration(progress):
            return stop
        if stop := self._time_limit(save=save, step=iteration):
            return stop
        if config.exit_interval and progress.iteration % config.exit_interval == 0:
            return Stop("exit_flag", f"exiting program at iteration {progress.iteration} (--exit-interval)")
        if config.exit_after_iters and self._iterations_here >= config.exit_after_iters:
            return Stop("exit_flag", f"exiting program after {self._iterations_here} iterations (--exit-after-iters)")
        return None

    def before_evaluation(self, *, evaluation: float, save: float | None) -> Stop | None:
        """Return the reason not to begin an evaluation; None: begin.

        Args:
            evaluation: seconds that it is expected to take; 0: unknown.
            save: seconds that the save after it will take; 0: unknown; None: none follows.
        """
        if stop := self._requested_stop():
            return stop
        return self._time_limit(save=save, evaluation=evaluation) if evaluation else None

    def in_evaluation(self, *, save: float | None, step: float = 0.0) -> Stop | None:
        """Return the reason to abandon an evaluation between two of its steps; None: continue.

        Args:
            save: as for before_evaluation.
            step: seconds that the next step will take.
        """
        return self._requested_stop() or self._time_limit(save=save, step=step)

    def _requested_stop(self) -> Stop | None:
        if self._flag is not None and self._flag.received is not None:
            return Stop("signal", f"exiting program after receiving {self._flag.received.name}")
        path = self._config.kill_switch_path
        if path and Path(path).exists():
            return Stop("kill_switch", f"Detected kill switch at {path}. Exiting", f"once {path} is gone")
        return None

    def _time_limit(self, *, save: float | None, evaluation: float = 0.0, step: float = 0.0) -> Stop | None:
        limit = self._config.exit_duration_minutes
        minutes = (self._clock() - self._started) / 60.0
        reserve = evaluation + (save or 0.0)
        purpose = "the evaluation and the save" if evaluation else "the save"
        if limit and minutes + reserve / 60.0 > limit:
            left = f", leaving {reserve:.0f} s for {purpose}" if minutes <= limit else ""
            message = f"exiting program after {minutes:.1f} minutes{left}"
            return Stop("time_limit", message, limit="--exit-duration-in-mins")
        if self._job_end is None:
            return None
        reserve, margin = evaluation + self._save_budget(save), self._config.job_end_margin
        needed = reserve + margin + step
        seconds = self._job_end.seconds_left(needed=needed)
        if seconds is None or seconds >= needed:
            return None
        message = (
            f"exiting program {max(0.0, seconds):.0f} s before the end of Slurm job {self._job_end.job}, leaving "
            f"{reserve:.0f} s for {purpose} and {margin:g} s after it (--job-end-margin-in-secs)"
        )
        return Stop("time_limit", message, limit="--time of the Slurm job")

    def _save_budget(self, save: float | None) -> float:
        """Return the seconds to leave for a save before Slurm kills the job; save: as for before_evaluation."""
        return 0.0 if save is None else SAVE_SAFETY * save or self._first_save


def _at(left: float) -> str:
    """Return when a time limit takes effect, in so many seconds."""
    return f"stops by {_clock(left)}"


def _clock(left: float) -> str:
    """Return the local time in so many seconds."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))


def agree(world: Group, stop: Stop | None) -> Stop | None:
    """Return the stop of the first rank that has one, on every rank: signals and clocks differ. A collective call."""
    return agree_and_gather(world, stop)[0]


def agree_and_gather(
    world: Group, stop: Stop | None, own: Sequence[float] = ()
) -> tuple[Stop | None, Sequence[Sequence[float]]]:
    """Agree on a stop, and gather some numbers of each rank in the same reduction; a collective call.

    The reduction is of host memory (gloo), so that it does not wait for the device.

    Args:
        world: all ranks.
        stop: this rank's reason to stop.
        own: this rank's numbers, 0 or more, as many on all ranks; empty: nothing is gathered.

    Returns:
        The stop of the first rank that has one, and the numbers of each rank; [] if nothing is gathered.
    """
    if world.size == 1:
        return stop, [own] if own else []
    import torch  # here, so that the module imports without it

    count = len(own)
    reduced = torch.zeros(1 + world.size * count)
    if stop is not None:
        reduced[0] = 1.0
    if own:
        reduced[1 + world.rank * count :][:count] = torch.tensor(own)
    world.all_reduce_(reduced, "max")
    any_stop, *gathered = reduced.tolist()
    ranks = [gathered[rank * count :][:count] for rank in range(world.size)] if own else []
    return (_first_stop(world, stop) if any_stop else None), ranks


def _first_stop(world: Group, stop: Stop | None) -> Stop:
    stops = world.all_gather_object(None if stop is None else (host_name(), stop))
    rank, (host, first) = next((rank, found) for rank, found in enumerate(stops) if found is not None)
    if first.status == "signal" and rank != 0:
        return replace(first, message=f"{first.message} (on {host}, rank {rank})")
    return first


def resume_hint(config: RunConfig, stop: Stop, iteration: int, saved: int | None) -> str | None:
    """Return a line on how to resume a run that stopped; None: the run is complete.

    Args:
        config: the run's.
        stop: the reason.
        iteration: the last finished iteration.
        saved: the iteration of the checkpoint that a start from --save finds; None: there is none.
    """
    options = config.checkpoint
    if stop.status == "completed":
        return None
    if not options.save:
        return "  nothing was saved: give --save and --load to resume a run"
    if saved is None:
        return f"  {options.save} holds no checkpoint: the same command starts where this one did"
    changes = [] if options.in_one_folder else [f"with --load {options.save}"]
    flags = {
        "--load-iteration": options.load_iteration,
        "--finetune": options.finetune,
        "--reset-iteration": options.reset_progress,
    }
    changes += [f"without {flag}" for flag, given in flags.items() if given]
    changes += [stop.required_change] if stop.required_change else []
    lost = f"; iterations up to {iteration} are not saved" if saved < iteration else ""
    return f"  the same command resumes from iteration {saved}{' ' * bool(changes)}{', '.join(changes)}{lost}"
