"""Training loop: iterations, reports, evaluations, saves and stop conditions."""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_lite.backend.agreement import broadcast_from_rank0
from megatron_lite.backend.job_end import find_job_end
from megatron_lite.config.run import RunConfig
from megatron_lite.lifecycle.stopping import SignalFlag, Stop, Stopper, agree, agree_and_gather
from megatron_lite.metrics.compute_time import ComputeTime
from megatron_lite.metrics.profiler import Profiler
from megatron_lite.metrics.report import ValidationReport
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.metrics.throughput import Throughput
from megatron_lite.metrics.timers import Timers
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.planner.disk import checkpoint_size
from megatron_lite.runs.metrics_file import AVERAGE
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.length import is_finished
from megatron_lite.schedules.microbatches import num_microbatches
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.saves import save_budget
from megatron_lite.train.batches import RunData
from megatron_lite.train.engine import Engine, LossSum
from megatron_lite.train.iterations import InFlight, settle, train_iteration
from megatron_lite.train.replica_check import check_replicas
from megatron_lite.train.state import RunState

Split = Literal["validation", "test"]
RECENT = 10
"""Iterations whose longest is taken for the next one's duration; --compile makes the first one long."""


@dataclass
class Run:
    """An assembled run (assemble.py makes it) and its progress."""

    config: RunConfig
    mesh: Mesh
    engine: Engine
    data: RunData
    state: RunState
    reporter: Reporter
    timers: Timers
    compute: ComputeTime
    profiler: Profiler
    throughput: Throughput
    progress: Progress
    """After all iterations begun; the one in flight counts as applied."""
    in_flight: InFlight | None = None
    last_settled: float = 0.0
    """time.perf_counter() when the outcome of an iteration was last read."""
    recent_iterations: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Seconds of the last iterations, whose longest is expected of the next."""
    longest_validation: float = 0.0
    """Seconds of the slowest validation so far, all datasets together; 0: there was none in this job."""
    rank_parts: Sequence[Sequence[float]] = ()
    """Seconds of the parts (compute_time.py) of the last measured iteration on each rank, until they are reported."""

    def agree(self, stop: Stop | None) -> Stop | None:
        """Return the stop of the first rank that has one; a collective call."""
        with self.mesh.backend.phases.enter("agreeing whether to stop"):
            return agree(self.mesh.world, stop)

    def agree_after_iteration(self, stop: Stop | None) -> Stop | None:
        """As agree; also gather the time by part of each rank, if the iteration was measured."""
        own = self.compute.take() if self.compute.measures else ()
        with self.mesh.backend.phases.enter("agreeing whether to stop"):
            agreed, gathered = agree_and_gather(self.mesh.world, stop, own)
        # The next iteration, which reports them, is settled after further ones have been agreed on.
        self.rank_parts = gathered or self.rank_parts
        return agreed

    def take_rank_parts(self) -> Sequence[Sequence[float]]:
        """Return the measured parts that have not been reported; (): there are none."""
        parts, self.rank_parts = self.rank_parts, ()
        return parts

    def finished(self) -> bool:
        """Return whether the run has reached its length, or ends early (--early-stopping-patience)."""
        return is_finished(self.config, self.progress) or self.state.best.exhausted

    def evaluates(self, split: Split) -> bool:
        """Return whether the run has data and iterations for an evaluation on `split`."""
        return bool((self.data.valid if split == "validation" else self.data.test) and self.config.training.eval_iters)


def train(run: Run, *, started: float | None = None) -> Stop:
    """Train from `run.progress` to the end of the run or an earlier stop, with evaluations and saves.

    Args:
        run: the assembled run.
        started: time.monotonic() when the job began, from which --exit-duration-in-mins counts; None: now.

    Returns:
        Why training ended. The last save is on the disk by then.

    Raises:
        TrainingError: a loss or gradient is not finite (bf16 and fp32; fp16 skips such an iteration), and no automatic
            rollback is left.
        CheckpointError: a save failed.
    """
    config, state, reporter, phases = run.config, run.state, run.reporter, run.mesh.backend.phases
    interval = config.training.eval_interval
    collects = config.runtime.manual_gc_interval
    with _stopper(run, started, saves=True) as stopper, _frozen_garbage(disable=collects > 0):
        first_iteration = run.progress.iteration
        stop = run.agree(stopper.before_iteration(run.progress))
        if stop is None and run.progress.validation_due and run.evaluates("validation"):
            reporter.message(f"running the unfinished validation after iteration {run.progress.iteration}")
            stop = _validate(run, stopper)

        while stop is None and not run.finished():
            plan = plan_iteration(config, run.progress, replica=run.mesh.dp.rank)
            run.profiler.before_iteration(plan.iteration)
            begun = time.monotonic()
            evaluates = bool(interval) and plan.iteration % interval == 0 and run.evaluates("validation")
            with phases.enter(f"iteration {plan.iteration}"):
                stop = train_iteration(run, plan)
                if stop is None and (evaluates or state.is_due(run.progress) or is_finished(config, run.progress)):
                    stop = settle(run)
            if collects and plan.iteration % collects == 0:
                gc.collect()
            run.recent_iterations.append(time.monotonic() - begun)
            if stop is not None:  # to roll back: what came after the checkpoint is discarded, so it is not saved
                state.finish()
                return stop
            run.profiler.after_iteration(plan.iteration)
            check_replicas(run.engine, config.training, plan.iteration, run.mesh.backend, reporter)
            if evaluates:
                stop = _validate(run, stopper)
            if stop is None:
                # A device that works behind the host may still have an iteration to do.
                ahead = 2 if run.mesh.backend.asynchronous else 1
                stop = stopper.after_iteration(
                    run.progress, save=state.seconds_to_save, iteration=ahead * max(run.recent_iterations)
                )
                # Reporting a failed background save is a collective call, so the ranks agree on it first.
                failed_save = Stop("error", "a background save failed")
                agreed = run.agree_after_iteration(failed_save if state.failed else stop)
                if agreed == failed_save:
                    state.finish()
                    agreed = run.agree(stop)
                stop = agreed
            finished = run.finished()
            if finished and stop is not None and stop.status == "exit_flag":
                stop = None  # the run ends here anyway, with its last evaluations
            if stop is not None:
                with phases.enter(f"iteration {plan.iteration}"):
                    if (rollback := settle(run)) is not None:
                        state.finish()
                        return rollback
                reporter.stopping()
            with phases.enter(f"saving iteration {plan.iteration}"):
                state.save_if_due(run.engine, run.progress, last=stop is not None or finished)

        if stop is None:
            reporter.stopping()
            if not is_finished(config, run.progress):
                reporter.message(state.best.describe())
            with phases.enter(f"saving iteration {run.progress.iteration}"):
                state.save(run.engine, run.progress, final=True)
            stop = _evaluate_at_end(run, stopper)
        stop = stop or Stop("completed", f"training is complete after {run.progress.iteration} iterations")
        state.finish(final=True)
    if stop.status == "time_limit" and run.progress.iteration == first_iteration:
        # An evaluation took all the time, and the next job would begin with the same one.
        stop = replace(stop, required_change=f"with a larger {stop.limit} or a smaller --eval-iters")
    return stop


def evaluate_only(run: Run, *, started: float | None = None) -> Stop:
    """Evaluate the loaded model on the validation and test data (--skip-train), or up to an earlier stop.

    Args and returns: as for train.
    """
    with _stopper(run, started, saves=False) as stopper:
        stop = run.agree(stopper.before_iteration(run.progress)) or _evaluate_at_end(run, stopper)
    return stop or Stop("evaluated", f"evaluation is complete at iteration {run.progress.iteration}")


@contextmanager
def _stopper(run: Run, started: float | None, *, saves: bool) -> Iterator[Stopper]:
    """Handle signals, find out when the Slurm job ends, and report when the run will stop; a collective call.

    Rank 0 alone asks Slurm; the other ranks learn of its decisions when they agree on a stop.
    """
    training, is_rank0 = run.config.training, run.mesh.world.rank == 0
    with ExitStack() as stack:
        flag = stack.enter_context(SignalFlag(announce=is_rank0, saves=saves)) if training.exit_signals else None
        job_end = find_job_end(_print_line) if is_rank0 and training.exit_before_job_end else None
        if job_end is not None:
            stack.enter_context(job_end)
        first_save = save_budget(0.0, checkpoint_size(run.config))
        stopper = Stopper(training, flag, started=started, job_end=job_end, first_save=first_save)
        save = run.state.seconds_to_save if saves else None
        line = broadcast_from_rank0(run.mesh.world, lambda: stopper.describe_time_limit(save=save))
        if line:
            run.reporter.message(line)
        yield stopper


@contextmanager
def _frozen_garbage(*, disable: bool) -> Iterator[None]:
    """Exclude the objects that exist from garbage collection; with `disable`, leave its times to the caller.

    A full collection passes over all objects of the process, for tenths of a second, and on each rank at another time:
    in an iteration, all ranks would wait for each of them.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    if disable:
        gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _validate(run: Run, stopper: Stopper) -> Stop | None:
    """Evaluate on the validation data between two iterations.

    Returns:
        None: it is done. Otherwise why it was not begun or not finished: then run.progress marks it as due, and the
        next job begins with it, on the same samples.
    """
    run.progress = replace(run.progress, validation_due=1)
    stop = run.agree(stopper.before_evaluation(evaluation=run.longest_validation, save=run.state.seconds_to_save))
    stop = stop or _evaluate(run, "validation", stopper)
    if stop is None:
        run.progress = replace(run.progress, validation_due=0)
    else:
        run.reporter.message(
            f"the validation after iteration {run.progress.iteration} is unfinished; the next start runs it first"
        )
    return stop


def _evaluate_at_end(run: Run, stopper: Stopper) -> Stop | None:
    if run.evaluates("validation"):
        iteration = run.progress.iteration
        if run.state.best.has_observed(iteration) and not run.config.training.skip_train:
            run.reporter.message(
                f"additional validation at the end of the run, on the samples after those of the validation of "
                f"iteration {iteration}; only the latter counts for the best checkpoint and early stopping"
            )
        stop = run.agree(stopper.before_evaluation(evaluation=run.longest_validation, save=None))
        if stop := stop or _evaluate(run, "validation", stopper, at_end=True):
            return stop
    return _evaluate(run, "test", stopper, at_end=True)


def _evaluate(run: Run, split: Split, stopper: Stopper, *, at_end: bool = False) -> Stop | None:
    """Evaluate a split with the weights, and with their moving average if there is one; report the losses.

    Each validation begins in its data where the previous one ended, as in Megatron, so that a resumed run evaluates
    the same samples as an uninterrupted one.

    Returns:
        None: it is done. Otherwise why it was abandoned, agreed by all ranks before each step; run.progress is as
        before.
    """
    if not run.evaluates(split):
        return None
    config, begun = run.config, time.monotonic()
    found = _evaluate_weights(run, split, stopper, at_end=at_end)
    if isinstance(found, Stop):
        return found
    if config.optimizer.ema_decay:
        with run.engine.averaged_weights():
            other = _evaluate_weights(run, split, stopper, at_end=at_end, label="EMA")
        if isinstance(other, Stop):
            return other
    if split == "validation":
        if not config.training.skip_train:
            run.state.validated(run.progress.iteration, found)
        run.longest_validation = max(run.longest_validation, time.monotonic() - begun)
        if not at_end:
            samples = config.training.eval_iters * final_batch_size(config.batch, config.parallel.dp)
            run.progress = replace(run.progress, consumed_valid_samples=run.progress.consumed_valid_samples + samples)
    run.timers.take()  # the evaluation's forwards do not count in the next iteration
    return None


def _evaluate_weights(run: Run, split: Split, stopper: Stopper, *, at_end: bool, label: str = "") -> Stop | float:
    """Evaluate every dataset of a split on eval_iters global batches; report the mean losses, and their average.

    Args:
        run: with the weights to evaluate.
        split: of the data.
        stopper: may end it.
        at_end: whether it is the evaluation at the end of the run.
        label: of the weights, in reports; empty: those that are trained.

    Returns:
        The average over the datasets. Or why it was abandoned.
    """
    config = run.config
    loaders = run.data.valid if split == "validation" else run.data.test
    consumed = run.progress.consumed_valid_samples if split == "validation" else 0
    global_batch = final_batch_size(config.batch, config.parallel.dp)
    samples = config.training.eval_iters * global_batch
    count = num_microbatches(global_batch, config.batch.micro_batch_size, config.parallel.dp, run.mesh.dp.rank)
    save = None if at_end else run.state.seconds_to_save
    longest_step = max(run.recent_iterations, default=0.0)
    begun, means = time.monotonic(), list[float]()

    def report(name: str, loss: float, seconds: float, num_samples: int) -> None:
        run.reporter.validation(
            ValidationReport(
                iteration=run.progress.iteration,
                consumed_train_samples=run.progress.consumed_train_samples,
                consumed_train_tokens=run.progress.consumed_train_tokens,
                losses={"lm loss": loss},
                split=split,
                name="-".join(part for part in (name, label) if part),
                at_end=at_end,
                seconds=seconds,
                samples=num_samples,
            )
        )

    with run.mesh.backend.phases.enter(f"evaluation ({split})"):
        for name, loader in loaders.items():
            started = time.perf_counter()
            loss = LossSum(0.0, 0)
            for step in range(config.training.eval_iters):
                step_begun = time.monotonic()
                if (stop := run.agree(stopper.in_evaluation(save=save, step=longest_step))) is not None:
                    if at_end:
                        run.reporter.message(f"the evaluation on the {split} data is unfinished")
                    return stop
                read = run.data.reader(loader, consumed + step * global_batch, config.batch.seq_length)
                batch = run.engine.eval_step(count, read, config.batch.seq_length)
                loss = LossSum(loss.sum + batch.sum, loss.count + batch.count)
                longest_step = max(longest_step, time.monotonic() - step_begun)
            run.state.check_lock()
            means.append(loss.mean)
            report(name if len(loaders) > 1 else "", loss.mean, time.perf_counter() - started, samples)
    average = sum(means) / len(means)
    if len(means) > 1:
        report(AVERAGE, average, time.monotonic() - begun, samples * len(means))
    return average
