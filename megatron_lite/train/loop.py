"""Training loop: iterations, reports, evaluations, saves and stop conditions."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_lite.backend.agreement import broadcast_from_rank0
from megatron_lite.backend.job_end import find_job_end
from megatron_lite.config.counts import checkpoint_size
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import TrainingError
from megatron_lite.lifecycle.spikes import respond_to_spike
from megatron_lite.lifecycle.stopping import SignalFlag, Stop, Stopper, agree, agree_and_gather
from megatron_lite.metrics.compute_time import ComputeTime
from megatron_lite.metrics.profiler import Profiler
from megatron_lite.metrics.report import IterationReport, ValidationReport
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.metrics.throughput import Throughput
from megatron_lite.metrics.timers import Timers
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.iteration import IterationPlan, plan_iteration
from megatron_lite.schedules.learning_rate import learning_rate
from megatron_lite.schedules.length import is_finished, last_iteration, skipped_samples, tokens_at
from megatron_lite.schedules.microbatches import num_microbatches
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.saves import save_budget
from megatron_lite.train.batches import RunData
from megatron_lite.train.engine import Engine, LossSum, StepOutcome
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
    recent_iterations: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Seconds of the last iterations, whose longest is expected of the next."""
    longest_validation: float = 0.0
    """Seconds of the slowest validation so far, all datasets together; 0: there was none in this job."""
    rank_seconds: Sequence[float] | None = None
    """Compute seconds of each rank in the last iteration, if it was measured."""

    def agree(self, stop: Stop | None) -> Stop | None:
        """Return the stop of the first rank that has one; a collective call."""
        with self.mesh.backend.phases.enter("agreeing whether to stop"):
            return agree(self.mesh.world, self.mesh.backend.device, stop)

    def agree_after_iteration(self, stop: Stop | None) -> Stop | None:
        """As agree; also gather the compute time of each rank, if the iteration was measured."""
        own = self.compute.take() if self.compute.measures else None
        with self.mesh.backend.phases.enter("agreeing whether to stop"):
            agreed, gathered = agree_and_gather(self.mesh.world, self.mesh.backend.device, stop, own)
        self.rank_seconds = gathered or None
        return agreed

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
    with _stopper(run, started, saves=True) as stopper:
        first_iteration = run.progress.iteration
        stop = run.agree(stopper.before_iteration(run.progress))
        if stop is None and run.progress.validation_due and run.evaluates("validation"):
            reporter.message(f"running the unfinished validation after iteration {run.progress.iteration}")
            stop = _validate(run, stopper)

        while stop is None and not is_finished(config, run.progress):
            plan = plan_iteration(config, run.progress, replica=run.mesh.dp.rank)
            run.profiler.before_iteration(plan.iteration)
            begun = time.monotonic()
            with phases.enter(f"iteration {plan.iteration}"):
                stop = _train_iteration(run, plan)
            run.recent_iterations.append(time.monotonic() - begun)
            if stop is not None:  # to roll back: what came after the checkpoint is discarded, so it is not saved
                state.finish()
                return stop
            run.profiler.after_iteration(plan.iteration)
            check_replicas(run.engine, config.training, plan.iteration, run.mesh.backend, reporter)
            if interval and plan.iteration % interval == 0 and run.evaluates("validation"):
                stop = _validate(run, stopper)
            if stop is None:
                stop = stopper.after_iteration(
                    run.progress, save=state.seconds_to_save, iteration=max(run.recent_iterations)
                )
                # Reporting a failed background save is a collective call, so the ranks agree on it first.
                failed_save = Stop("error", "a background save failed")
                agreed = run.agree_after_iteration(failed_save if state.failed else stop)
                if agreed == failed_save:
                    state.finish()
                    agreed = run.agree(stop)
                stop = agreed
            finished = is_finished(config, run.progress)
            if finished and stop is not None and stop.status == "exit_flag":
                stop = None  # the run ends here anyway, with its last evaluations
            if stop is not None:
                reporter.stopping()
            with phases.enter(f"saving iteration {plan.iteration}"):
                state.save_if_due(run.engine, run.progress, last=stop is not None or finished)

        if stop is None:
            reporter.stopping()
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


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _train_iteration(run: Run, plan: IterationPlan) -> Stop | None:
    """Train one iteration, advance run.progress and report; return a Stop if the run is to be rolled back."""
    config, started = run.config, time.perf_counter()
    if plan.skip:
        run.progress = run.progress.advance(plan.global_batch, plan.tokens, applied=False)
        run.reporter.message(f"Skipped iteration {plan.iteration} due to --skip-train-iteration-range flag.")
        return None
    data, spikes = run.data.train, run.state.spikes
    assert data is not None, "a run that trains has training data"
    run.compute.begin(plan.iteration)
    with run.timers("train-step"):
        outcome = run.engine.train_step(plan, run.data.train_reader(plan))
    observed = (plan.iteration, outcome.loss, plan.first_sample, plan.global_batch)
    spike, error = None, None
    if not outcome.finite and config.stops_at_nan:
        error = _not_finite(run, plan, outcome)
        if config.training.auto_rollback:
            spike = spikes.not_finite(*observed)
    else:
        # A process that was paused must not report to a folder that another job has taken over.
        run.state.check_lock()
        run.progress = run.progress.advance(plan.global_batch, plan.tokens, applied=outcome.applied)
        if not outcome.applied:
            run.reporter.message(_overflow_message(config, plan, outcome))
        run.reporter.iteration(_report(run, plan, outcome, time.perf_counter() - started))
        spike = spikes.observe(*observed)
    stop = None
    if spike is not None:
        run.state.finish()  # a save under way may be the checkpoint to roll back to
        stop = respond_to_spike(spike, config, run.mesh.world, data, run.reporter)
    if stop is None and error is not None:
        raise error
    return stop


def _report(run: Run, plan: IterationPlan, outcome: StepOutcome, seconds: float) -> IterationReport:
    config, progress, train_data = run.config, run.progress, run.data.train
    assert train_data is not None
    last = last_iteration(config)
    rates = run.throughput.measure(
        seconds=seconds,
        tokens=plan.tokens,
        seq_length=plan.seq_length,
        remaining_tokens=max(0, tokens_at(config, last) - progress.consumed_train_tokens),
    )
    losses = {"lm loss": outcome.loss}
    losses |= {f"lm loss {train_data.names[source]}": loss for source, loss in outcome.source_losses.items()}
    return IterationReport(
        iteration=progress.iteration,
        train_iterations=last,
        consumed_train_samples=progress.consumed_train_samples,
        consumed_train_tokens=progress.consumed_train_tokens,
        skipped_train_samples=skipped_samples(config, progress.iteration),
        losses=losses,
        # As in Megatron's log: the rate of the next iteration, because Megatron's scheduler has stepped by now.
        learning_rate=learning_rate(config, progress),
        global_batch_size=plan.global_batch,
        seq_length=plan.seq_length,
        loss_scale=outcome.loss_scale,
        grad_norm=outcome.grad_norm,
        num_zeros=outcome.num_zeros,
        params_norm=outcome.params_norm,
        skipped=0 if outcome.applied else 1,
        nan=0 if outcome.finite else 1,
        seconds=seconds,
        tokens_per_second=rates.tokens_per_second,
        tflops_per_device=rates.tflops_per_device,
        mfu=rates.mfu,
        eta_seconds=rates.eta_seconds,
        memory=run.mesh.backend.memory_stats() if config.metrics.log_memory or progress.iteration == 1 else {},
        timers=run.timers.take(),
        rank_seconds=run.rank_seconds,
    )


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
        stop = run.agree(stopper.before_evaluation(evaluation=run.longest_validation, save=None))
        if stop := stop or _evaluate(run, "validation", stopper, at_end=True):
            return stop
    return _evaluate(run, "test", stopper, at_end=True)


def _evaluate(run: Run, split: Split, stopper: Stopper, *, at_end: bool = False) -> Stop | None:
    """Evaluate every dataset of a split on eval_iters global batches, and report the mean losses.

    Each validation begins in its data where the previous one ended, as in Megatron, so that a resumed run evaluates
    the same samples as an uninterrupted one.

    Returns:
        None: it is done. Otherwise why it was abandoned, agreed by all ranks before each step; run.progress is as
        before.
    """
    config = run.config
    if not run.evaluates(split):
        return None
    loaders = run.data.valid if split == "validation" else run.data.test
    consumed = run.progress.consumed_valid_samples if split == "validation" else 0
    global_batch = final_batch_size(config.batch, config.parallel.dp)
    samples = config.training.eval_iters * global_batch
    count = num_microbatches(global_batch, config.batch.micro_batch_size, config.parallel.dp, run.mesh.dp.rank)
    save = None if at_end else run.state.seconds_to_save
    longest_step = max(run.recent_iterations, default=0.0)
    begun = time.monotonic()
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
            run.reporter.validation(
                ValidationReport(
                    iteration=run.progress.iteration,
                    consumed_train_samples=run.progress.consumed_train_samples,
                    consumed_train_tokens=run.progress.consumed_train_tokens,
                    losses={"lm loss": loss.mean},
                    split=split,
                    name=name if len(loaders) > 1 else "",
                    at_end=at_end,
                    seconds=time.perf_counter() - started,
                    samples=samples,
                )
            )
    if split == "validation":
        run.longest_validation = max(run.longest_validation, time.monotonic() - begun)
        if not at_end:
            run.progress = replace(run.progress, consumed_valid_samples=consumed + samples)
    run.timers.take()  # the evaluation's forwards do not count in the next iteration
    return None


def _overflow_message(config: RunConfig, plan: IterationPlan, outcome: StepOutcome) -> str:
    text = (
        f"iteration {plan.iteration}: the gradients overflowed in fp16 at a loss scale of {outcome.loss_scale:g}, so "
        "its step is skipped"
    )
    precision = config.precision
    if precision.loss_scale:
        return f"{text}; --loss-scale keeps the scale constant, and without it the scale adapts"
    if outcome.loss_scale <= precision.min_loss_scale:
        return (
            f"{text}. The scale is at its minimum (--min-loss-scale): unless this passes soon the run has diverged, "
            "and should resume from an earlier checkpoint (--load-iteration) with a lower --lr"
        )
    return text


def _not_finite(run: Run, plan: IterationPlan, outcome: StepOutcome) -> TrainingError:
    data = run.data.train
    assert data is not None
    positions = data.positions(plan.first_sample, plan.global_batch)
    numbers = data.list_samples(plan.first_sample, plan.global_batch)
    same = list(positions) == list(data.samples(plan.first_sample, plan.global_batch))
    return TrainingError(
        f"The loss or gradient is not finite: iteration {plan.iteration} has loss {outcome.loss} and gradient norm "
        f"{outcome.grad_norm}, on samples "
        f"{positions[0]} to {positions[-1]}" + ("" if same else f" (numbers {numbers} of the training data)"),
        fix="Resume from the latest checkpoint (--load) with a lower --lr or a longer warm-up, or skip the samples "
        "with "
        f"--skip-train-iteration-range {plan.iteration}-{plan.iteration}. `megatron-lite data samples --iteration "
        f"{plan.iteration}` with the flags of this command shows them. The step was not applied, and no checkpoint "
        "contains it",
    )
