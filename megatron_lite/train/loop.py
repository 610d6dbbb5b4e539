"""Training loop: iterations, reports, evaluations, saves and stop conditions."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from megatron_lite.config.run import RunConfig
from megatron_lite.data.serving.loader import Loader
from megatron_lite.errors import TrainingError
from megatron_lite.lifecycle.stopping import SignalFlag, Stop, Stopper, agree
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
from megatron_lite.train.batches import RunData
from megatron_lite.train.engine import Engine, LossSum, StepOutcome
from megatron_lite.train.replica_check import check_weights_if_due
from megatron_lite.train.spike_report import GoingBack, notice, way_out
from megatron_lite.train.state import RunState


@dataclass
class Run:
    """An assembled run: see assemble.py for who makes what."""

    config: RunConfig
    mesh: Mesh
    engine: Engine
    data: RunData
    state: RunState
    reporter: Reporter
    timers: Timers
    throughput: Throughput
    progress: Progress
    going_back: GoingBack | None = None
    longest_validation: float = 0.0
    """Seconds of the slowest validation so far, of all datasets together; 0: there was none in this job."""


def train(run: Run, *, started: float | None = None) -> Stop:
    """Trains from `run.progress` to the end of the run or an earlier stop, evaluating and saving on the way.

    Args:
        run: the assembled run.
        started: time.monotonic() when the job began, from which --exit-duration-in-mins counts; None: now.

    Returns:
        Why it ended. The last save is on the disk by then.

    Raises:
        TrainingError: a loss or gradient is not finite (bf16 and fp32; fp16 skips such an iteration), and the run may
            not go back.
        CheckpointError: a save failed.
    """
    config = run.config
    with SignalFlag(announce=run.mesh.world.rank == 0) if config.training.exit_signals else nullcontext() as flag:
        stopper = Stopper(config.training, flag, started=started)
        begun = run.progress.iteration
        stop = _agree(run, stopper.before_iteration(run.progress))
        if stop is None and run.progress.validation_due and _is_evaluated(run, "validation"):
            run.reporter.message(
                f"making the validation after iteration {run.progress.iteration}, left unfinished before"
            )
            stop = _validate(run, stopper)
        while stop is None and not is_finished(config, run.progress):
            if (back := _iterate(run)) is not None:
                run.state.finish()
                return back
            check_weights_if_due(run)
            iteration = run.progress.iteration
            interval = config.training.eval_interval
            if interval and iteration % interval == 0 and _is_evaluated(run, "validation"):
                stop = _validate(run, stopper)
            if stop is None:
                stop = _agree_after(run, stopper.after_iteration(run.progress, reserve=run.state.longest_save))
            if stop is not None and stop.status == "exit_flag" and is_finished(config, run.progress):
                stop = None  # it ends here anyway, and with its evaluations
            if stop is not None:
                run.reporter.stopping()
            last = stop is not None or is_finished(config, run.progress)
            run.state.save_if_due(run.engine, run.progress, last=last)
        if stop is None:
            run.reporter.stopping()
            run.state.save(run.engine, run.progress, final=True)
            stop = _evaluate_at_end(run, stopper) or Stop(
                "completed", f"training is complete after {run.progress.iteration} iterations"
            )
        run.state.finish(final=True)
        if stop.status == "time_limit" and run.progress.iteration == begun:
            # All the time went into an evaluation, with which the next job begins again.
            stop = replace(stop, again="with a larger --exit-duration-in-mins or a smaller --eval-iters")
        return stop


def evaluate_only(run: Run, *, started: float | None = None) -> Stop:
    """Evaluates the loaded model on the validation and test data (--skip-train), or up to an earlier stop.

    Args and returns: as train.
    """
    with (
        SignalFlag(announce=run.mesh.world.rank == 0, saves=False)
        if run.config.training.exit_signals
        else nullcontext() as flag
    ):
        stopper = Stopper(run.config.training, flag, started=started)
        stop = _agree(run, stopper.before_iteration(run.progress)) or _evaluate_at_end(run, stopper)
        return stop or Stop("evaluated", f"evaluation is complete at iteration {run.progress.iteration}")


def _is_evaluated(run: Run, split: str) -> bool:
    loaders = run.data.valid if split == "validation" else run.data.test
    return bool(loaders and run.config.training.eval_iters)


def _evaluate_at_end(run: Run, stopper: Stopper) -> Stop | None:
    if not _is_evaluated(run, "validation"):
        return evaluate(run, "test", stopper, at_end=True)
    stop = _agree(run, stopper.before_evaluation(evaluation=run.longest_validation, save=0.0))
    return stop or evaluate(run, "validation", stopper, at_end=True) or evaluate(run, "test", stopper, at_end=True)


def _validate(run: Run, stopper: Stopper) -> Stop | None:
    """Evaluates on the validation data between two iterations.

    Returns:
        None: it was made; else why it was not begun or not finished. Then run.progress says that it is due, so that the
        next job begins with it, on the same samples.
    """
    run.progress = replace(run.progress, validation_due=1)
    stop = _agree(
        run, stopper.before_evaluation(evaluation=run.longest_validation, save=run.state.longest_save)
    ) or evaluate(run, "validation", stopper)
    if stop is None:
        run.progress = replace(run.progress, validation_due=0)
    else:
        run.reporter.message(
            f"the validation after iteration {run.progress.iteration} is left unfinished; the next start makes it first"
        )
    return stop


def _agree(run: Run, stop: Stop | None) -> Stop | None:
    return agree(run.mesh.world, run.mesh.backend.device, stop)


def _agree_after(run: Run, stop: Stop | None) -> Stop | None:
    """The same after an iteration, where a save in the background may have failed: now is when that is dealt with.

    Raises:
        CheckpointError: it ends the run.
    """
    failed = Stop("error", "a save in the background failed")
    agreed = _agree(run, failed if run.state.failed else stop)
    if agreed != failed:
        return agreed
    run.state.finish()
    return _agree(run, stop)


def _iterate(run: Run) -> Stop | None:
    """One iteration: advances run.progress and reports; returns a Stop where the run is to go back before a spike."""
    plan = plan_iteration(run.config, run.progress, replica=run.mesh.dp.rank)
    started = time.perf_counter()
    if plan.skip:
        run.progress = run.progress.advance(plan.global_batch, plan.tokens, applied=False)
        run.reporter.message(f"Skipped iteration {plan.iteration} due to --skip-train-iteration-range flag.")
        return None
    with run.timers("train-step"):
        outcome = run.engine.train_step(plan, run.data.train_reader(plan))
    if not outcome.finite and run.config.stops_at_nan:
        if (back := way_out(run, plan, outcome.loss)) is not None:
            return back
        raise _not_finite(run, plan, outcome)
    run.state.check_lock()  # a process that was paused must not report to a folder that is another job's by now
    run.progress = run.progress.advance(plan.global_batch, plan.tokens, applied=outcome.applied)
    if not outcome.applied:
        run.reporter.message(_overflow(run.config, plan, outcome))
    run.reporter.iteration(_report(run, plan, outcome, time.perf_counter() - started))
    return notice(run, plan, outcome.loss)


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
        # As Megatron logs it: the rate that the next iteration will use, for its scheduler has stepped by now.
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
    )


def evaluate(run: Run, split: str, stopper: Stopper, *, at_end: bool = False) -> Stop | None:
    """Evaluates every dataset of a split on eval_iters global batches and reports the mean losses.

    Validation goes on in its data where the last one stopped, as Megatron's does, so that a resumed run evaluates on
    the same samples as an uninterrupted one.

    Returns:
        None, or why it was abandoned: the reason of any rank, agreed before each step. An abandoned one leaves
        run.progress as it was.
    """
    config = run.config
    if not _is_evaluated(run, split):
        return None
    loaders = run.data.valid if split == "validation" else run.data.test
    consumed = run.progress.consumed_valid_samples if split == "validation" else 0
    global_batch = final_batch_size(config.batch, config.parallel.dp)
    samples = config.training.eval_iters * global_batch
    save = run.state.longest_save if config.checkpoint.save and not at_end else 0.0
    begun = time.monotonic()
    for name, loader in loaders.items():
        started = time.perf_counter()
        loss = _mean_loss(run, loader, consumed, global_batch, lambda: stopper.in_evaluation(save=save))
        if isinstance(loss, Stop):
            if at_end:
                run.reporter.message(f"the evaluation on the {split} data is left unfinished")
            return loss
        run.state.check_lock()
        run.reporter.validation(
            ValidationReport(
                iteration=run.progress.iteration,
                consumed_train_samples=run.progress.consumed_train_samples,
                consumed_train_tokens=run.progress.consumed_train_tokens,
                losses={"lm loss": loss},
                split="validation" if split == "validation" else "test",
                name=name if len(loaders) > 1 else "",
                at_end=at_end,
                seconds=time.perf_counter() - started,
                samples=samples,
            )
        )
    if split == "validation":
        run.longest_validation = max(run.longest_validation, time.monotonic() - begun)
    if split == "validation" and not at_end:
        run.progress = replace(run.progress, consumed_valid_samples=consumed + samples)
    run.timers.take()  # its forwards are no part of the next iteration's times
    return None


def _mean_loss(
    run: Run, loader: Loader, consumed: int, global_batch: int, stop_now: Callable[[], Stop | None]
) -> float | Stop:
    config = run.config
    count = num_microbatches(global_batch, config.batch.micro_batch_size, config.parallel.dp, run.mesh.dp.rank)
    total, samples = 0.0, 0
    for step in range(config.training.eval_iters):
        if (stop := _agree(run, stop_now())) is not None:
            return stop
        read = run.data.reader(loader, consumed + step * global_batch, config.batch.seq_length)
        loss = run.engine.eval_step(count, read, config.batch.seq_length)
        total, samples = total + loss.sum, samples + loss.count
    return LossSum(total, samples).mean


def _overflow(config: RunConfig, plan: IterationPlan, outcome: StepOutcome) -> str:
    """What is said of an iteration that fp16 left out."""
    text = (
        f"iteration {plan.iteration}: the gradients overflowed in fp16 at a loss scale of {outcome.loss_scale:g}, so "
        "its step is skipped"
    )
    precision = config.precision
    if precision.loss_scale:
        return f"{text}; --loss-scale keeps that scale, and without it the scale would adapt"
    if outcome.loss_scale <= precision.min_loss_scale:
        return (
            f"{text}. No smaller scale is allowed (--min-loss-scale): unless this passes soon the run has diverged, "
            "and should go on from an earlier checkpoint (--load-iteration) with a lower --lr"
        )
    return text


def _not_finite(run: Run, plan: IterationPlan, outcome: StepOutcome) -> TrainingError:
    train_data = run.data.train
    assert train_data is not None
    places = train_data.positions(plan.first_sample, plan.global_batch)
    numbers = train_data.list_samples(plan.first_sample, plan.global_batch)
    return TrainingError(
        "Loss and gradients must be finite",
        found=f"iteration {plan.iteration} has loss {outcome.loss} and gradient norm {outcome.grad_norm}, on samples "
        f"{places[0]} to {places[-1]} (numbers {numbers} of the training data)",
        fix=f"No parameter was changed by it and no checkpoint holds it. `megatron-lite data samples --iteration "
        f"{plan.iteration}` with this command's flags shows these samples. Go on from the last checkpoint (--load) "
        f"with a lower --lr or longer warm-up, or leave them out with --skip-train-iteration-range "
        f"{plan.iteration}-{plan.iteration}",
    )
