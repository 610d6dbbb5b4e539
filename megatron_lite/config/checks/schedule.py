"""Validation rules for run length, learning rate, optimizer and precision."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checks.bounds import at_least, share
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def one_length(config: RunConfig) -> Iterator[ConfigError]:
    """A run is measured in iterations or in samples, unless it only evaluates."""
    training = config.training
    yield from at_least(
        0, train_iters=training.train_iters, train_samples=training.train_samples, train_tokens=training.train_tokens
    )
    if training.train_iters and training.train_samples:
        yield ConfigError(
            "A run's length is given in iterations or in samples",
            found=f"--train-iters {training.train_iters} and --train-samples {training.train_samples}",
            fix="Leave one of them out",
        )
    if not training.train_iters and not training.train_samples and not training.skip_train:
        yield ConfigError(
            "A run needs a length",
            found="neither --train-iters nor --train-samples",
            fix="Give one of them, or --skip-train to evaluate only",
        )


_UNITS = {"iterations": ("-samples", "-iters"), "samples": ("-iters", "-samples")}
"""What of a flag's name to replace in a run that is measured so."""


def lr_in_the_units_of_the_run(config: RunConfig) -> Iterator[ConfigError]:
    """Decay and warm-up are counted in what the run's length is counted in."""
    lr = config.lr
    by_iters = {
        "--lr-decay-iters": lr.decay_iters,
        "--lr-warmup-iters": lr.warmup_iters,
        "--lr-wsd-decay-iters": lr.wsd_decay_iters,
    }
    by_samples = {
        "--lr-decay-samples": lr.decay_samples,
        "--lr-warmup-samples": lr.warmup_samples,
        "--lr-wsd-decay-samples": lr.wsd_decay_samples,
    }
    for length, wrong, unit in (
        (config.training.train_iters, by_samples, "iterations"),
        (config.training.train_samples, by_iters, "samples"),
    ):
        flags = [f"{flag} {number}" for flag, number in wrong.items() if number]
        if length and flags:
            yield ConfigError(
                f"The learning rate of a run measured in {unit} is scheduled in {unit}",
                found=f"--train-{'iters' if unit == 'iterations' else unit} {length} and {', '.join(flags)}",
                fix=f"Give {', '.join(flag.split()[0].replace(*_UNITS[unit]) for flag in flags)} instead",
            )


def lr_bounds(config: RunConfig) -> Iterator[ConfigError]:
    """0 <= warmup_init, min_lr <= lr, and lr > 0 for a run that trains."""
    lr = config.lr
    if lr.lr <= 0 and not config.training.skip_train:
        fix = "Give --lr a number above 0, such as 3e-4"
        yield ConfigError("A run that trains has a learning rate", found=f"--lr {lr.lr:g}", fix=fix)
        return
    for flag, value in (("--min-lr", lr.min_lr), ("--lr-warmup-init", lr.warmup_init)):
        if not 0 <= value <= lr.lr:
            yield ConfigError(
                f"{flag} lies between 0 and --lr",
                found=f"{flag} {value:g}, --lr {lr.lr:g}",
                fix=f"Give {flag} a number from 0 to {lr.lr:g}, or raise --lr",
            )


def lr_spans(config: RunConfig) -> Iterator[ConfigError]:
    """Warm-up is given once and ends before the decay does."""
    lr, training = config.lr, config.training
    yield from at_least(
        0,
        lr_decay_iters=lr.decay_iters,
        lr_decay_samples=lr.decay_samples,
        lr_decay_tokens=lr.decay_tokens,
        lr_warmup_iters=lr.warmup_iters,
        lr_warmup_samples=lr.warmup_samples,
        lr_wsd_decay_iters=lr.wsd_decay_iters,
        lr_wsd_decay_samples=lr.wsd_decay_samples,
    )
    if lr.warmup_fraction is not None:
        yield from share(lr_warmup_fraction=lr.warmup_fraction)
        if lr.warmup_iters or lr.warmup_samples:
            yield ConfigError(
                "Warm-up is given as a fraction or as a number",
                found=f"--lr-warmup-fraction {lr.warmup_fraction:g} and {lr.warmup_iters or lr.warmup_samples}",
                fix="Leave one of them out",
            )
    unit = "samples" if training.train_samples else "iters"
    length = training.train_samples or training.train_iters
    decay = (lr.decay_samples if training.train_samples else lr.decay_iters) or length
    warmup = lr.warmup_samples if training.train_samples else lr.warmup_iters
    if warmup > decay and not lr.decay_tokens:
        yield ConfigError(
            "Warm-up ends before the decay does",
            found=f"--lr-warmup-{unit} {warmup}, decay over {decay}",
            fix=f"Give --lr-warmup-{unit} {decay} or less, or a longer --lr-decay-{unit}",
        )


def wsd_has_a_decay(config: RunConfig) -> Iterator[ConfigError]:
    """WSD's last phase has a length, within the whole decay."""
    lr, training = config.lr, config.training
    if lr.style != "WSD":
        return
    unit = "samples" if training.train_samples else "iters"
    phase = lr.wsd_decay_samples if training.train_samples else lr.wsd_decay_iters
    decay = (
        (lr.decay_samples or training.train_samples)
        if training.train_samples
        else (lr.decay_iters or training.train_iters)
    )
    if not 0 < phase <= decay:
        yield ConfigError(
            "The decay phase of WSD lies within the schedule",
            found=f"--lr-wsd-decay-{unit} {phase} of {decay}",
            fix=f"Give --lr-wsd-decay-{unit} 1 to {decay}: the length of the last phase, when the rate falls",
        )


def weight_decay_has_both_ends(config: RunConfig) -> Iterator[ConfigError]:
    """A weight decay that changes needs its start and end."""
    optimizer = config.optimizer
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if optimizer.weight_decay_style == "constant":
        if start is not None or end is not None:
            yield ConfigError(
                "A constant weight decay is --weight-decay",
                found="--start-weight-decay or --end-weight-decay with --weight-decay-incr-style constant",
                fix="Give --weight-decay-incr-style linear or cosine, or leave them out",
            )
    elif start is None or end is None or start < 0 or end < start:
        yield ConfigError(
            "A weight decay that rises has a start and an end, 0 <= start <= end",
            found=f"--start-weight-decay {start}, --end-weight-decay {end}",
            fix="Give both, as --start-weight-decay 0.01 --end-weight-decay 0.1",
        )


def optimizer_constants(config: RunConfig) -> Iterator[ConfigError]:
    """Constants of the update rule."""
    optimizer = config.optimizer
    yield from share(open_end=True, adam_beta1=optimizer.adam_beta1, adam_beta2=optimizer.adam_beta2)
    yield from at_least(0, clip_grad=optimizer.clip_grad, weight_decay=optimizer.weight_decay)
    yield from at_least(0, adam_eps=optimizer.adam_eps, sgd_momentum=optimizer.sgd_momentum)


def loss_scale_bounds(config: RunConfig) -> Iterator[ConfigError]:
    """A dynamic scale moves between its minimum and its start."""
    precision = config.precision
    yield from at_least(0, loss_scale=precision.loss_scale)
    yield from at_least(1, loss_scale_window=precision.loss_scale_window, hysteresis=precision.hysteresis)
    if not 0 < precision.min_loss_scale <= precision.initial_loss_scale:
        yield ConfigError(
            "The loss scale starts above its positive minimum",
            found=f"--initial-loss-scale {precision.initial_loss_scale:g}, --min-loss-scale "
            f"{precision.min_loss_scale:g}",
            fix="Give --min-loss-scale a number above 0 (1 if not given) and --initial-loss-scale at least that",
        )


def intervals(config: RunConfig) -> Iterator[ConfigError]:
    """Intervals and limits are not negative."""
    training, metrics = config.training, config.metrics
    yield from at_least(
        0,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        check_weight_hash_across_dp_replicas_interval=training.weight_check_interval,
        exit_interval=training.exit_interval,
        exit_after_iters=training.exit_after_iters,
        exit_samples=training.exit_samples,
        exit_duration_in_mins=training.exit_duration_minutes,
        num_threads=config.runtime.num_threads,
        seed=config.runtime.seed,
    )
    yield from at_least(1, log_interval=metrics.log_interval, tensorboard_log_interval=metrics.tensorboard_log_interval)


def repairs_need_checks(config: RunConfig) -> Iterator[ConfigError]:
    """Weights are repaired where they are compared."""
    training = config.training
    if training.on_weight_mismatch == "repair" and not training.weight_check_interval:
        yield ConfigError(
            "--on-weight-mismatch repair needs weights that are compared",
            found="no --check-weight-hash-across-dp-replicas-interval",
            fix="Give that interval, or leave --on-weight-mismatch out",
        )


def skipped_ranges_are_apart(config: RunConfig) -> Iterator[ConfigError]:
    """Skipped ranges of iterations rise and do not overlap."""
    previous = 0
    for first, last in sorted(config.training.skip_iteration_ranges):
        if first < 1 or last < first or first <= previous:
            yield ConfigError(
                "Skipped ranges start at 1, rise and do not overlap",
                found=f"--skip-train-iteration-range {first}-{last}" + (f" after {previous}" if previous else ""),
                fix="Give ranges FIRST-LAST from iteration 1 on that do not touch, as 101-200 251-300",
            )
        previous = max(previous, last)


RULES = (
    one_length,
    lr_in_the_units_of_the_run,
    lr_bounds,
    lr_spans,
    wsd_has_a_decay,
    weight_decay_has_both_ends,
    optimizer_constants,
    loss_scale_bounds,
    intervals,
    repairs_need_checks,
    skipped_ranges_are_apart,
)
