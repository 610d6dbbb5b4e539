"""Learning-rate and weight-decay schedules, with Megatron's formulas.

Steps are samples when the run is measured in samples. Otherwise they are iterations, each counted as one final global
batch: without a ramp-up that is Megatron's own unit, so the numbers agree to the last bit; with one, decay and warm-up
still end at the iterations that the flags name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.config.optimizer import WsdDecayStyle
from megatron_lite.config.run import RunConfig
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.length import iteration_at, tokens_at
from megatron_lite.schedules.progress import Progress


@dataclass(frozen=True)
class LrSteps:
    """The schedule's landmarks, in its steps (see the module's text)."""

    warmup: float
    decay: int
    wsd_decay: int
    total: int
    """Length of the run, over which weight decay changes."""


def lr_steps(config: RunConfig) -> LrSteps:
    """Where warm-up and decay end, in samples or in iterations * final global batch."""
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
    """Learning rate of the iteration that follows `progress` (0, or warmup_init, at the start of a warm-up)."""
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
    """Weight decay of the iteration that follows `progress`: from start to end over the whole run."""
    optimizer = config.optimizer
    start = optimizer.weight_decay if optimizer.start_weight_decay is None else optimizer.start_weight_decay
    end = optimizer.weight_decay if optimizer.end_weight_decay is None else optimizer.end_weight_decay
    total, step = lr_steps(config).total, _applied_steps(config, progress)
    if optimizer.weight_decay_style == "constant" or step > total or not total:
        return end
    ratio = step / total
    coefficient = ratio if optimizer.weight_decay_style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
    return start + coefficient * (end - start)


def _applied_steps(config: RunConfig, progress: Progress) -> int:
    if config.training.train_samples:
        return progress.applied_samples
    return progress.applied_iterations * final_batch_size(config.batch, config.parallel.dp)


def _decayed(config: RunConfig, progress: Progress, steps: LrSteps) -> float:
    """Share of the decay that is over, from 0 at the end of the warm-up; more than 1 past its end.

    Under --lr-decay-tokens tokens are counted instead of steps, from those that a run without a skipped iteration has
    consumed when its warm-up ends.
    """
    done: float
    all_of_it: float
    if config.lr.decay_tokens:
        warm = int(steps.warmup)
        unit = 0 if config.training.train_samples else final_batch_size(config.batch, config.parallel.dp)
        start = tokens_at(config, warm // unit if unit else iteration_at(config, warm))
        done, all_of_it = max(0, progress.applied_tokens - start), config.lr.decay_tokens - start
    else:
        done, all_of_it = _applied_steps(config, progress) - steps.warmup, steps.decay - steps.warmup
    if done > all_of_it:
        return math.inf
    return done / all_of_it if all_of_it else 0.0


def _wsd_coefficient(style: WsdDecayStyle, ratio: float) -> float:
    """Warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395): what is left of the rate at `ratio` of the last phase."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**ratio - 1.0
    return 1.0 - math.sqrt(ratio)
