"""Flag names in error messages: names each flag as the user gave it (alias, preset, DeepSpeed JSON), marks defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_lite.config.flag import Flag
from megatron_lite.config.given import Given
from megatron_lite.config.table import flags_by_field, flags_by_spelling, spelling
from megatron_lite.errors import ConfigError


def in_given_terms(error: ConfigError, given: Given) -> ConfigError:
    """Return the error of a rule, which names flags by their usual spelling, in the terms of the command line.

    "--train-iters 0" becomes "--train-iters 0 by default", "--micro-batch-size 4" becomes
    "train_micro_batch_size_per_gpu 4 in the DeepSpeed JSON".
    """
    problem, fix = error.problem, error.fix
    for key, declared in flags_by_field().items():
        for flag in declared:
            if flag.takes_value and not flag.also and flag.name in problem:
                problem, fix = _renamed(problem, fix, flag, given.origin_of(key))
    return error if problem == error.problem else ConfigError(problem, fix=fix, rule=error.rule)


def given_spellings(given: Given) -> dict[str, str]:
    """Return the flags that were given by an alias: the alias by the flag's usual name."""
    names = [origin.partition(" ")[0] for _, _, origin in given.items()]
    rows = [(name, flags_by_spelling().get(spelling(name))) for name in names]
    return {row.name: name for name, row in rows if row is not None and spelling(name) != row.name}


def with_spellings(error: ConfigError, spellings: Mapping[str, str]) -> ConfigError:
    """Return the error with flags named as they were given (given_spellings)."""
    problem, fix = error.problem, error.fix
    for name, spelled in spellings.items():
        alone = rf"(?<![\w-]){re.escape(name)}(?![\w-])"
        problem, fix = re.sub(alone, spelled, problem), re.sub(alone, spelled, fix)
    return ConfigError(problem, fix=fix, rule=error.rule)


def _renamed(problem: str, fix: str, flag: Flag, origin: str) -> tuple[str, str]:
    alone = rf"(?<![\w-]){re.escape(flag.name)}(?![\w-])"
    numbered = rf"{alone} \d[\d.e+-]*(?![\w.])"
    name, _, value = origin.partition(" ")
    if not value:  # derived from other flags, or not given at all
        return re.sub(numbered, lambda match: f"{match.group()} by default", problem), fix
    if spelling(name) == flag.name and " of --preset " not in origin:
        return problem, fix
    problem = re.sub(numbered, lambda _: origin, problem)
    row = flags_by_spelling().get(spelling(name))
    if row is None:  # an entry of the DeepSpeed JSON
        problem = re.sub(alone, lambda _: f"{name} of the DeepSpeed JSON", problem)
        fix = re.sub(alone, lambda _: name, fix)
    elif row is flag or row.name == flag.name:
        fix = re.sub(alone, lambda _: name, fix)
    return problem, fix
