"""Validation of a RunConfig: runs all rules of config/checks/ and collects their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_lite.config.checks import batch, checkpoint, data, model, parallel, schedule
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, ConfigErrors

Rule = Callable[[RunConfig], Iterator[ConfigError]]

RULES: tuple[Rule, ...] = (
    *model.RULES,
    *batch.RULES,
    *schedule.RULES,
    *parallel.RULES,
    *data.RULES,
    *checkpoint.RULES,
)


def violations(config: RunConfig) -> list[ConfigError]:
    """Every rule that the run breaks. If a size makes no sense on its own, only that is reported."""
    nonsense = [*model.sizes_are_positive(config), *batch.sizes_are_positive(config)]
    nonsense += parallel.sizes_are_positive(config)
    return nonsense or [error for rule in RULES for error in rule(config)]


def validate(config: RunConfig) -> None:
    """Check a run that did not come from a command line.

    Raises:
        ConfigError: it breaks one rule.
        ConfigErrors: it breaks several.
    """
    errors = violations(config)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigErrors(errors)
