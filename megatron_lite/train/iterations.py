"""Asynchronous training iterations: enqueues each one before the results of the previous one are read.

The device thus always has work while the host waits, reports and prepares. Whoever needs the outcome of every iteration
(a save, an evaluation, the end) settles the last one first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import TrainingError
from megatron_lite.lifecycle.spikes import respond_to_spike
from megatron_lite.lifecycle.stopping import Stop
from megatron_lite.metrics.compute_time import busy_seconds, mean_parts
from megatron_lite.metrics.report import IterationReport
from megatron_lite.optim.loss_scaler import DivergedError
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.learning_rate import learning_rate, weight_decay
from megatron_lite.schedules.length import last_iteration, skipped_samples, tokens_at
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.engine import PendingStep, StepOutcome

if TYPE_CHECKING:
    from megatron_lite.train.loop import Run


@dataclass(frozen=True)
class InFlight:
    """Iteration whose outcome has not been read.

    Attributes:
        plan: of the iteration.
        step: its work on the device.
        before: progress before it.
        started: time.perf_counter() when it was begun.
        ended: and when it was done, if the device works together with the host; None: when its outcome is known.
    """

    plan: IterationPlan
    step: PendingStep
    before: Progress
    started: float
    ended: float | None


def train_iteration(run: Run, plan: IterationPlan) -> Stop | None:
    """Enqueue an iteration and advance run.progress as if it were applied; settle the iteration before.

    Returns:
        The stop to roll back to a checkpoint, because of the iteration before.

    Raises:
        TrainingError: the iteration before has a loss or gradient that is not finite, and no rollback is left.
    """
    if plan.skip:
        if stop := settle(run):
            return stop
        run.progress = run.progress.advance(plan.global_batch, plan.tokens, applied=False)
        run.reporter.message(f"Skipped iteration {plan.iteration} due to --skip-train-iteration-range flag.")
        return None
    started, stops = time.perf_counter(), list[Stop | None]()
    run.compute.begin(plan.iteration)

    def rates() -> tuple[float, float]:
        # With fp16 the iteration before may have been skipped, and then the learning rate stays as it was.
        if run.config.precision.dtype == "fp16":
            stops.append(settle(run))
        return learning_rate(run.config, run.progress), weight_decay(run.config, run.progress)

    with run.timers("train-step"):
        step = run.engine.train_step(plan, run.data.train_reader(plan), rates)
    ended = None if run.mesh.backend.asynchronous else time.perf_counter()
    stops.append(settle(run))
    if stop := next(filter(None, stops), None):
        return stop
    run.in_flight = InFlight(plan, step, run.progress, started, ended)
    run.progress = run.progress.advance(plan.global_batch, plan.tokens, applied=True)
    # What is measured of single iterations belongs to this one.
    return settle(run) if run.timers.on or run.compute.measures else None


def settle(run: Run) -> Stop | None:
    """Wait for the iteration in flight, if there is one; correct run.progress and report.

    Returns and raises: as train_iteration.
    """
    flight, run.in_flight = run.in_flight, None
    if flight is None:
        return None
    config, plan, data, spikes = run.config, flight.plan, run.data.train, run.state.spikes
    assert data is not None, "a run that trains has training data"
    try:
        outcome = flight.step.outcome()
    except DivergedError as diverged:
        raise DivergedError(f"{diverged.problem}, up to iteration {plan.iteration}", fix=diverged.fix) from diverged
    # An iteration begins on the device when the one before has ended.
    finished = flight.ended or time.perf_counter()
    seconds, run.last_settled = finished - max(flight.started, run.last_settled), finished
    observed = (plan.iteration, outcome.loss, plan.first_sample, plan.global_batch)
    spike, error = None, None
    if not outcome.finite and config.stops_at_nan:
        run.progress = flight.before
        error = _not_finite(run, plan, outcome)
        if config.training.auto_rollback:
            spike = spikes.not_finite(*observed)
    else:
        # A process that was paused must not report to a folder that another job has taken over.
        run.state.check_lock()
        run.progress = flight.before.advance(plan.global_batch, plan.tokens, applied=outcome.applied)
        if not outcome.applied:
            run.reporter.message(_overflow_message(config, plan, outcome))
        run.reporter.iteration(_report(run, plan, outcome, seconds))
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
    last, parts = last_iteration(config), run.take_rank_parts()
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
        # One rank alone is compared with no other.
        rank_seconds=busy_seconds(parts) if len(parts) > 1 else None,
        parts=mean_parts(parts) or None,
    )


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
        f"Iteration {plan.iteration} has loss {outcome.loss} and gradient norm {outcome.grad_norm}, on samples "
        f"{positions[0]} to {positions[-1]}" + ("" if same else f" (numbers {numbers} of the training data)"),
        fix="Resume from the latest checkpoint (--load) with a lower --lr or a longer warm-up, or skip the samples "
        "with "
        f"--skip-train-iteration-range {plan.iteration}-{plan.iteration}. `megatron-lite data samples --iteration "
        f"{plan.iteration}` with the flags of this command shows them. The step was not applied, and no checkpoint "
        "contains it",
    )
