"""Optimizer, learning-rate, precision and recomputation configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import frexp
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import FIELD, Flag, option
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class LrConfig:
    """Learning rate by progress. *_iters go with train_iters, *_samples with train_samples; 0: derived or none."""

    lr: float = option(0.0, Flag("--lr", "Largest learning rate."))
    min_lr: float = option(0.0, Flag("--min-lr", "Smallest learning rate, at the end of the decay."))
    style: DecayStyle = option("linear", Flag("--lr-decay-style", "Shape of the learning rate's decay."))
    decay_iters: int = option(0, Flag("--lr-decay-iters", "Iterations until --min-lr (0: the length of the run)."))
    decay_samples: int = option(0, Flag("--lr-decay-samples", "Samples until --min-lr (0: the length of the run)."))
    decay_tokens: int = option(0, Flag("--lr-decay-tokens", "Tokens until --min-lr, instead of either (0: none)."))
    warmup_iters: int = option(0, Flag("--lr-warmup-iters", "Iterations of linear warm-up."))
    warmup_samples: int = option(0, Flag("--lr-warmup-samples", "Samples of linear warm-up."))
    warmup_fraction: float | None = option(
        None,
        Flag(
            "--lr-warmup-fraction",
            "Warm-up as a share of the decay's length, instead of a number.",
            aliases=("--warmup",),
            most=1,
        ),
    )
    warmup_init: float = option(0.0, Flag("--lr-warmup-init", "Learning rate at which warm-up starts."))
    wsd_style: WsdDecayStyle = option("exponential", Flag("--lr-wsd-decay-style", "Shape of the decay phase of WSD."))
    wsd_decay_iters: int = option(0, Flag("--lr-wsd-decay-iters", "Iterations of the decay phase of WSD."))
    wsd_decay_samples: int = option(0, Flag("--lr-wsd-decay-samples", "Samples of the decay phase of WSD."))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and its constants."""

    kind: Literal["adam", "sgd"] = option(
        "adam",
        Flag(
            "--optimizer",
            "Update rule; adam is AdamW (decoupled weight decay), as in Megatron.",
            choices={"adamw": "adam"},
        ),
    )
    adam_beta1: float = option(0.9, Flag("--adam-beta1", "Decay of the first moment.", below=1))
    adam_beta2: float = option(0.999, Flag("--adam-beta2", "Decay of the second moment.", below=1))
    adam_eps: float = option(1e-8, Flag("--adam-eps", "Added to the denominator.", above=0))
    sgd_momentum: float = option(0.9, Flag("--sgd-momentum", "Momentum of SGD.", most=1))
    clip_grad: float = option(1.0, Flag("--clip-grad", "Largest global gradient norm (0: no clipping)."))
    weight_decay: float = option(0.01, Flag("--weight-decay", "Decay of the weights that are matrices."))
    start_weight_decay: float | None = option(
        None, Flag("--start-weight-decay", "Weight decay at the start of the run.")
    )
    end_weight_decay: float | None = option(None, Flag("--end-weight-decay", "Weight decay at the end of the run."))
    weight_decay_style: WeightDecayStyle = option(
        "constant", Flag("--weight-decay-incr-style", "Shape of the weight decay's rise from start to end.")
    )
    check_for_nan: bool = option(
        True,
        Flag(
            "--check-for-nan-in-loss-and-grad",
            "Stop at a loss or gradient that is not finite; fp16 skips the iteration instead.",
            sets=True,
        ),
        Flag(
            "--no-check-for-nan-in-loss-and-grad", "Continue after a loss or gradient that is not finite.", sets=False
        ),
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Type of the parameters in forward and backward. The optimizer's state and gradients are always fp32."""

    dtype: Dtype = option(
        "fp32",
        Flag("--fp16", "Half precision with loss scaling.", sets="fp16"),
        Flag("--bf16", "bfloat16.", sets="bf16"),
        Flag("--fp32", "Single precision.", sets="fp32"),
    )
    loss_scale: float = option(
        0.0,
        Flag("--loss-scale", "Constant loss scale for fp16 (0: dynamic)."),
        Flag("--dynamic-loss-scale", "The default for fp16.", sets=0.0, means="--loss-scale 0"),
    )
    initial_loss_scale: float = option(2.0**32, Flag("--initial-loss-scale", "First value of the dynamic loss scale."))
    min_loss_scale: float = option(
        1.0, Flag("--min-loss-scale", "Smallest dynamic loss scale.", aliases=("--min-scale",), above=0)
    )
    loss_scale_window: int = option(
        1000, Flag("--loss-scale-window", "Iterations without overflow after which the loss scale doubles.", least=1)
    )
    hysteresis: int = option(2, Flag("--hysteresis", "Overflows after which the loss scale is halved.", least=1))
    scaler: Literal["megatron", "deepspeed"] = option(
        "megatron",
        Flag(
            "--loss-scaler",
            "Rule of dynamic loss scaling: DeepSpeed's resets the hysteresis at other times (the default under "
            "--deepspeed).",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation recomputation (Korthikanti et al. 2022, arXiv:2205.05198)."""

    granularity: Literal["none", "full", "selective"] = option(
        "none",
        Flag("--recompute-granularity", "Activations to recompute in backward."),
        Flag(
            "--checkpoint-activations",
            "Full recomputation, layer by layer.",
            sets="full",
            means="--recompute-granularity full --recompute-method uniform",
        ),
        Flag(
            "--recompute-activations",
            "Recompute the core of attention only.",
            sets="selective",
            means="--recompute-granularity selective",
        ),
    )
    method: Literal["uniform", "block"] = option(
        "uniform",
        Flag("--recompute-method", "Layers that full recomputation applies to; see --recompute-num-layers."),
        Flag(
            "--activations-checkpoint-method",
            "Old name of --recompute-method; full recomputation.",
            also=((FIELD.recompute.granularity, "full"),),
            means="--recompute-granularity full --recompute-method …",
        ),
    )
    num_layers: int = option(
        1,
        Flag(
            "--recompute-num-layers",
            "Layers of one recomputed unit (uniform), or recomputed layers of a stage (block).",
            aliases=("--checkpoint-num-layers", "--activations-checkpoint-num-layers"),
            least=1,
        ),
    )


def note_idle_recompute_flags(given: Given) -> None:
    """Note flags of recomputation that have no effect without --recompute-granularity."""
    if given.run.recompute.granularity == "none":
        for origin in map(given.origin, (FIELD.recompute.num_layers, FIELD.recompute.method)):
            if origin:
                given.notes.append(
                    f"{origin} has no effect: nothing is recomputed without --recompute-granularity full"
                )


def warn_of_inexact_loss_scale(given: Given) -> None:
    """Warn of a constant loss scale that is not a power of 2: scaling by it rounds."""
    scale = given.run.precision.loss_scale
    if scale > 0 and frexp(scale)[0] != 0.5:
        given.warnings.append(
            f"{given.origin(FIELD.precision.loss_scale)} is a constant loss scale and no power of 2, so scaling "
            "rounds; without it the scale is dynamic"
        )


RESOLVERS = (note_idle_recompute_flags, warn_of_inexact_loss_scale)


def lr_in_the_units_of_the_run(config: RunConfig) -> Iterator[ConfigError]:
    """Require decay and warm-up in the unit of the run's length."""
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
    for length, others, unit, other in (
        (config.training.train_iters, by_samples, "iters", "samples"),
        (config.training.train_samples, by_iters, "samples", "iters"),
    ):
        wrong = [f"{flag} {number}" for flag, number in others.items() if number]
        if length and wrong:
            replacements = (flag.split()[0].replace(f"-{other}", f"-{unit}") for flag in wrong)
            yield ConfigError(
                f"{', '.join(wrong)} cannot be combined with --train-{unit} {length}",
                rule=f"The learning-rate schedule is in {'iterations' if unit == 'iters' else unit}, as the length of "
                "the run",
                fix=f"Use {', '.join(replacements)} instead",
            )


def lr_bounds(config: RunConfig) -> Iterator[ConfigError]:
    """Require lr > 0 of a run that trains, and warmup_init, min_lr <= lr."""
    lr = config.lr
    if lr.lr <= 0 and not config.training.skip_train:
        yield ConfigError(
            f"The learning rate is {lr.lr:g} (--lr {lr.lr:g})", fix="Give --lr a number above 0, such as 3e-4"
        )
        return
    for flag, value in (("--min-lr", lr.min_lr), ("--lr-warmup-init", lr.warmup_init)):
        if value > lr.lr:
            yield ConfigError(
                f"{flag} {value:g} is larger than --lr {lr.lr:g}",
                fix=f"Give {flag} a number from 0 to {lr.lr:g}, or raise --lr",
            )


def lr_spans(config: RunConfig) -> Iterator[ConfigError]:
    """Require one length of the warm-up, within the decay."""
    lr, training = config.lr, config.training
    if config.tuning.epochs and not config.epoch_samples:
        return  # the length is known once the data are opened
    absolute = f"--lr-warmup-iters {lr.warmup_iters}" if lr.warmup_iters else f"--lr-warmup-samples {lr.warmup_samples}"
    if lr.warmup_fraction is not None and (lr.warmup_iters or lr.warmup_samples):
        yield ConfigError(
            f"The learning-rate warm-up has two lengths: --lr-warmup-fraction {lr.warmup_fraction:g} and {absolute}",
            fix=f"Remove --lr-warmup-fraction, or {absolute.split()[0]}",
        )
    unit = "samples" if training.train_samples else "iters"
    length = training.train_samples or training.train_iters
    decay = (lr.decay_samples if training.train_samples else lr.decay_iters) or length
    warmup = lr.warmup_samples if training.train_samples else lr.warmup_iters
    if warmup > decay and not lr.decay_tokens:
        yield ConfigError(
            f"The learning-rate warm-up is longer than the whole schedule of warm-up and decay (--lr-warmup-{unit} "
            f"{warmup}, "
            f"schedule of {decay} {'iterations' if unit == 'iters' else unit})",
            fix=f"Use --lr-warmup-{unit} {decay} or less, or a longer --lr-decay-{unit}",
        )


def wsd_has_a_decay(config: RunConfig) -> Iterator[ConfigError]:
    """Require a length of WSD's decay phase, within the whole schedule."""
    lr, training = config.lr, config.training
    if lr.style != "WSD" or (config.tuning.epochs and not config.epoch_samples):
        return
    if training.train_samples:
        unit, phase, decay = "samples", lr.wsd_decay_samples, lr.decay_samples or training.train_samples
    else:
        unit, phase, decay = "iters", lr.wsd_decay_iters, lr.decay_iters or training.train_iters
    if not 0 < phase <= decay:
        yield ConfigError(
            f"--lr-decay-style WSD (warm-up, stable, decay) needs the length of its decay: --lr-wsd-decay-{unit} "
            f"{phase}"
            if not phase
            else f"The WSD decay is longer than the whole schedule of {decay} "
            f"{'iterations' if unit == 'iters' else unit} (--lr-wsd-decay-{unit} {phase})",
            fix=f"Give --lr-wsd-decay-{unit} a number from 1 to {decay}: the last part of the schedule, in which the "
            "learning rate falls",
        )


def weight_decay_has_both_ends(config: RunConfig) -> Iterator[ConfigError]:
    """Require a start and an end of a weight decay that rises."""
    optimizer = config.optimizer
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if optimizer.weight_decay_style == "constant":
        ends = (("--start-weight-decay", start), ("--end-weight-decay", end))
        if given := [flag for flag, value in ends if value is not None]:
            yield ConfigError(
                f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect with --weight-decay-incr-style "
                "constant, the default",
                fix="Add --weight-decay-incr-style linear or cosine, or give --weight-decay instead",
            )
    elif start is None or end is None or end < start:
        missing = [
            flag for flag, value in (("--start-weight-decay", start), ("--end-weight-decay", end)) if value is None
        ]
        yield ConfigError(
            f"--weight-decay-incr-style {optimizer.weight_decay_style} raises the weight decay, but "
            + (
                f"its start {start:g} is above its end {end:g} (--start-weight-decay, --end-weight-decay)"
                if start is not None and end is not None
                else f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not given"
            ),
            fix="Give both, the start below the end, for example --start-weight-decay 0.01 --end-weight-decay 0.1",
        )


def loss_scale_starts_above_its_minimum(config: RunConfig) -> Iterator[ConfigError]:
    """Require a dynamic loss scale that starts at or above its minimum."""
    precision = config.precision
    if precision.min_loss_scale > precision.initial_loss_scale:
        yield ConfigError(
            f"The loss scale starts below its minimum (--initial-loss-scale {precision.initial_loss_scale:g}, "
            f"--min-loss-scale {precision.min_loss_scale:g})",
            fix=f"Use --initial-loss-scale {precision.min_loss_scale:g} or more, or a smaller --min-loss-scale",
        )


def recompute_fits(config: RunConfig) -> Iterator[ConfigError]:
    """Require a recomputed unit that is not larger than the model."""
    recompute, layers = config.recompute, config.model.num_layers
    if recompute.granularity == "full" and recompute.num_layers > layers:
        yield ConfigError(
            f"Cannot recompute {recompute.num_layers} layers of a model with {layers} (--recompute-num-layers "
            f"{recompute.num_layers}, --num-layers {layers})",
            fix=f"Use --recompute-num-layers 1 to {layers}",
        )


RULES = (
    lr_in_the_units_of_the_run,
    lr_bounds,
    lr_spans,
    wsd_has_a_decay,
    weight_decay_has_both_ends,
    loss_scale_starts_above_its_minimum,
    recompute_fits,
)
