"""Finetuning config: frozen parameters, learning-rate factors, loss on answers, early stopping."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_lite.config.data import DataGroup
from megatron_lite.config.flag import Flag, Format, option
from megatron_lite.config.values import read_float, write_value
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


def read_patterns(args: Sequence[str]) -> tuple[str, ...]:
    """Read regular expressions of parameter names.

    Raises:
        ValueError: one cannot be compiled.
    """
    try:
        for arg in args:
            re.compile(arg)
    except re.error as error:
        raise ValueError(f"regular expressions ({error.pattern!r}: {error})") from None
    return tuple(args)


def read_factors(args: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Read REGEX=FACTOR pairs; the last = of each separates them.

    Raises:
        ValueError: not in that form, or a factor that is not above 0.
    """
    factors = []
    for arg in args:
        pattern, _, factor = arg.rpartition("=")
        if not pattern:
            raise ValueError("REGEX=FACTOR pairs, for example embedding=0.1")
        value = read_float(factor)
        if value <= 0:
            raise ValueError("factors above 0 (for parameters that are not trained: --freeze REGEX)")
        read_patterns([pattern])
        factors.append((pattern, value))
    return tuple(factors)


def write_factors(factors: tuple[tuple[str, float], ...]) -> list[str]:
    """Return the arguments of --lr-factors."""
    return [f"{pattern}={write_value(factor)}" for pattern, factor in factors]


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Settings that are usual when a trained model is trained further."""

    freeze: tuple[str, ...] = option(
        (),
        Flag(
            "--freeze",
            "Regular expressions: parameters in whose names one of them occurs are not trained.",
            format=Format(
                metavar="REGEX …", example="embedding 'layers\\.[0-5]\\.'", read=read_patterns, write=list, count="some"
            ),
        ),
    )
    lr_factors: tuple[tuple[str, float], ...] = option(
        (),
        Flag(
            "--lr-factors",
            "Factors of the learning rate of parameters in whose names a regular expression occurs; the first that "
            "occurs counts.",
            format=Format(
                metavar="REGEX=FACTOR …",
                example="embedding=0.1 'layers\\.[0-5]\\.=0.5'",
                read=read_factors,
                write=write_factors,
            ),
        ),
    )
    epochs: int = option(
        0, Flag("--epochs", "Passes over the training data, instead of --train-iters or --train-samples.")
    )
    control_codes: tuple[str, ...] = option(
        (),
        Flag(
            "--control-codes",
            "Control code of each training dataset, in order, with which preprocessing began its documents; each has a "
            "validation set of its own.",
            format=Format(metavar="CODE …", example="imdb pg19", read=tuple, write=list),
        ),
    )
    answer_loss: bool = option(
        False,
        Flag(
            "--answer-loss",
            "Loss on answers only, averaged over their tokens, from the loss masks that preprocessing writes beside "
            "prompts with completions and chats.",
            sets=True,
        ),
    )
    patience: int = option(
        0,
        Flag(
            "--early-stopping-patience",
            "Validations in a row without a lower loss after which the run ends (0: no early stopping).",
        ),
    )
    patience_threshold: float = option(
        0.0,
        Flag("--early-stopping-threshold", "A validation loss is lower for early stopping if by more than this."),
    )


def stopping_needs_validations(config: RunConfig) -> Iterator[ConfigError]:
    """Require validations during the run for early stopping and --save-best."""
    training, tuning = config.training, config.tuning
    flags = {
        f"--early-stopping-patience {tuning.patience}": tuning.patience,
        "--save-best": config.checkpoint.save_best,
    }
    missing = {
        f"--eval-interval {training.eval_interval}": training.eval_interval,
        f"--eval-iters {training.eval_iters}": training.eval_iters,
    }
    zero = next((flag for flag, number in missing.items() if not number), "")
    for flag in [flag for flag, given in flags.items() if given and zero]:
        yield ConfigError(
            f"{flag} needs the loss of validations during the run, and {zero} is given",
            fix=f"Give {zero.split()[0]} a number above 0, or remove {flag.split()[0]}",
        )
    if tuning.patience_threshold and not tuning.patience:
        yield ConfigError(
            f"--early-stopping-threshold {tuning.patience_threshold:g} has no effect without --early-stopping-patience",
            fix="Add --early-stopping-patience N, for example 3, or remove --early-stopping-threshold",
        )


def answers_need_datasets(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse --answer-loss for random tokens, which mark no answers."""
    if config.tuning.answer_loss and config.data.mock:
        yield ConfigError(
            "--answer-loss cannot be combined with --mock-data, whose random tokens hold no answers",
            fix="Remove --answer-loss, or give --data-path PREFIX with a dataset of prompts and completions",
        )


def epochs_can_be_counted(config: RunConfig) -> Iterator[ConfigError]:
    """Require data whose passes have a length for --epochs: files without weights."""
    epochs, data = config.tuning.epochs, config.data
    if not epochs or config.training.skip_train:
        return
    if data.mock:
        yield ConfigError(
            f"--epochs {epochs} cannot be combined with --mock-data, whose random tokens have no end",
            fix="Give --train-iters N instead of --epochs, or --data-path PREFIX instead of --mock-data",
        )
    sources = (*data.sources, *(source for group in data.train_groups for source in group.sources))
    if weighted := [source.path for source in sources if source.weight is not None]:
        yield ConfigError(
            f"--epochs {epochs} cannot be combined with weights of training datasets ({weighted[0]})",
            rule="An epoch reads each dataset once, whatever its weight",
            fix="Remove the weights, as in --data-path a b (weight auto in --train-weighted-split-paths), or give "
            "--train-iters N instead of --epochs",
        )


def control_codes_have_datasets(config: RunConfig) -> Iterator[ConfigError]:
    """Require a training and a validation dataset for each control code."""
    codes, data = config.tuning.control_codes, config.data
    if not codes:
        return
    flag = f"--control-codes {' '.join(codes)}"
    if len(set(codes)) < len(codes):
        twice = next(code for code in codes if codes.count(code) > 1)
        yield ConfigError(
            f"{flag} gives the code {twice} twice",
            fix="Give each dataset a code of its own; datasets with the same code can be merged (megatron-lite merge)",
        )
    sources = data.sources or tuple(source for group in data.train_groups for source in group.sources)
    if len(sources) != len(codes):
        yield ConfigError(
            f"{flag} gives {format_count(len(codes), 'code')} for {format_count(len(sources), 'training dataset')}",
            fix="Give one code for each dataset of --data-path or --train-data-path, in the same order",
        )
    if data.sources or config.training.skip_train:
        return
    if (found := len(validation_groups(config))) != len(codes):
        yield ConfigError(
            f"{flag} gives {format_count(len(codes), 'code')} for {format_count(found, 'validation dataset')}",
            rule="Each control code is validated on its own dataset",
            fix=f"Give --valid-data-path {format_count(len(codes), 'dataset')}, in the order of the codes",
        )


def validation_groups(config: RunConfig) -> tuple[DataGroup, ...]:
    """Return the validation sets: with --control-codes, one for each dataset of --valid-data-path."""
    codes, groups = config.tuning.control_codes, config.data.valid_groups
    if not codes or len(groups) != 1 or len(groups[0].sources) != len(codes):
        return groups
    pairs = zip(codes, groups[0].sources, strict=True)
    return tuple(DataGroup(name=code, sources=(replace(source, weight=None),)) for code, source in pairs)


RULES = (stopping_needs_validations, answers_need_datasets, epochs_can_be_counted, control_codes_have_datasets)
