"""Learning-rate config: schedule by iterations, samples or tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import Flag, option
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]


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


def refuse_a_rate_beside_relative_steps(given: Given) -> None:
    """Refuse flags of the learning rate with Adafactor's relative steps, which have no other schedule."""
    origins = [origin for (section, _), _, origin in given.items() if section == "lr"]
    if given.run.optimizer.adafactor_relative_step and origins:
        given.refuse(
            f"{', '.join(origins)} {'have' if len(origins) > 1 else 'has'} no effect with --adafactor-relative-step, "
            "whose learning rate follows from the number of steps",
            fix=f"Remove {', '.join(origin.split()[0] for origin in origins)}, or --adafactor-relative-step",
        )


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
    if config.optimizer.adafactor_relative_step:
        return
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
    if config.awaits_epochs:
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
    if lr.style != "WSD" or config.awaits_epochs:
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


RESOLVERS = (refuse_a_rate_beside_relative_steps,)
RULES = (lr_in_the_units_of_the_run, lr_bounds, lr_spans, wsd_has_a_decay)
