"""Learning-rate and weight-decay schedules, with Megatron's formulas.

The unit of a step is one sample for runs with --train-samples. For runs with --train-iters it is one iteration, counted
as one final global batch. Without a ramp-up that is Megatron's unit, and the values agree bit for bit; with a ramp-up,
warm-up and decay end at the iterations given by the flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.config.learning_rate import WsdDecayStyle
from megatron_lite.config.run import RunConfig
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.length import iteration_at, tokens_at
from megatron_lite.schedules.progress import Progress


@dataclass(frozen=True)
class LrSteps:
    """Milestones of the schedule, in steps as defined in the module docstring."""

    warmup: float
    decay: int
    wsd_decay: int
    total: int
    """Length of the run, the range of the weight-decay schedule."""


def lr_steps(config: RunConfig) -> LrSteps:
    """Return the ends of warm-up and decay, in samples or in iterations * final global batch."""
    lr, training = config.lr, config.training
    if training.train_samples:
        total, decay = training.train_samples, lr.decay_samples or training.train_samples
        warmup, wsd_decay = lr.warmup_samples, lr.wsd_decay_samples
    else:
        unit = final_batch_size(config.batch, config.parallel.dp)
        total, decay = training.train_iters * unit, (lr.decay_iters or training.train_iters) * unit
        warmup, wsd_decay = lr.warmup_iters * unit, lr.wsd_decay_iters * unit
    fraction = lr.warmup_fraction
    return LrSteps(warmup if fraction is None else fraction * decay, decay, wsd_decay, total)


def learning_rate(config: RunConfig, progress: Progress) -> float:
    """Return the learning rate of the iteration after `progress`; a warm-up starts at warmup_init (default 0)."""
    if config.optimizer.adafactor_relative_step:
        return _relative_step(progress.applied_iterations + 1, warmup=config.optimizer.adafactor_warmup_init)
    lr, steps, step = config.lr, lr_steps(config), _applied_steps(config, progress)
    if steps.warmup > 0 and step <= steps.warmup:
        return lr.warmup_init + (lr.lr - lr.warmup_init) * step / steps.warmup
    if lr.style == "constant":
        return lr.lr
    ratio = _decayed(config, progress, steps)
    if ratio > 1:
        return lr.min_lr
    if lr.style == "inverse-square-root":
        return max(lr.min_lr, lr.lr * max(steps.warmup, 1) ** 0.5 / max(step, 1) ** 0.5)
    if lr.style == "linear":
        coefficient = 1.0 - ratio
    elif lr.style == "cosine":
        coefficient = 0.5 * (math.cos(math.pi * ratio) + 1.0)
    else:
        start = steps.decay - steps.wsd_decay
        coefficient = 1.0 if step <= start else _wsd_coefficient(lr.wsd_style, (step - start) / steps.wsd_decay)
    return lr.min_lr + coefficient * (lr.lr - lr.min_lr)


def weight_decay(config: RunConfig, progress: Progress) -> float:
    """Return the weight decay of the iteration after `progress`, which goes from start to end over the whole run."""
    optimizer = config.optimizer
    start = optimizer.weight_decay if optimizer.start_weight_decay is None else optimizer.start_weight_decay
    end = optimizer.weight_decay if optimizer.end_weight_decay is None else optimizer.end_weight_decay
    total, step = lr_steps(config).total, _applied_steps(config, progress)
    if optimizer.weight_decay_style == "constant" or step > total or not total:
        return end
    ratio = step / total
    coefficient = ratio if optimizer.weight_decay_style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
    return start + coefficient * (end - start)


def _relative_step(step: int, *, warmup: bool) -> float:
    """Return Adafactor's relative step size (Shazeer & Stern 2018, section 9) at a step, counted from 1."""
    return min(1e-6 * step if warmup else 1e-2, step**-0.5)


def _applied_steps(config: RunConfig, progress: Progress) -> int:
    if config.training.train_samples:
        return progress.applied_samples
    return progress.applied_iterations * final_batch_size(config.batch, config.parallel.dp)


def _decayed(config: RunConfig, progress: Progress, steps: LrSteps) -> float:
    """Return the completed share of the decay: 0 at the end of the warm-up, infinity past the end of the decay.

    With --lr-decay-tokens the unit is tokens instead of steps, counted from the end of the warm-up of a run without
    skipped iterations.
    """
    done: float
    length: float
    if config.lr.decay_tokens:
        warm = int(steps.warmup)
        unit = 0 if config.training.train_samples else final_batch_size(config.batch, config.parallel.dp)
        start = tokens_at(config, warm // unit if unit else iteration_at(config, warm))
        done, length = max(0, progress.applied_tokens - start), config.lr.decay_tokens - start
    else:
        done, length = _applied_steps(config, progress) - steps.warmup, steps.decay - steps.warmup
    if done > length:
        return math.inf
    return done / length if length else 0.0


def _wsd_coefficient(style: WsdDecayStyle, ratio: float) -> float:
    """Return the factor of warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395) at `ratio` of its decay phase."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**ratio - 1.0
    return 1.0 - math.sqrt(ratio)
