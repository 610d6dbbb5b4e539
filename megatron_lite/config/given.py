"""Parsed option values with their origin, and the notes, warnings and errors collected while parsing."""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.command import CommandOptions
from megatron_lite.config.data import DataConfig, TokenizerConfig
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import LrConfig, OptimizerConfig, PrecisionConfig, RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.paths import suggest_path
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.text_file import TextFileError, read_failure, read_text
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import ConfigError

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "batch": BatchConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "lr": LrConfig,
    "precision": PrecisionConfig,
    "recompute": RecomputeConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "checkpoint": CheckpointConfig,
    "metrics": MetricsConfig,
    "runtime": RuntimeConfig,
}
"""RunConfig's fields, by name."""


@cache
def field_types() -> dict[str, Any]:
    """Annotation of every "section.field", the command's own options included."""
    sections = {**SECTIONS, "command": CommandOptions}
    return {
        f"{section}.{name}": annotation
        for section, cls in sections.items()
        for name, annotation in get_type_hints(cls).items()
    }


@cache
def field_defaults() -> dict[str, Any]:
    """Default of every "section.field" that has one."""
    sections = {**SECTIONS, "command": CommandOptions}
    return {
        f"{section}.{field.name}": field.default
        for section, cls in sections.items()
        for field in fields(cls)
        if field.default is not MISSING
    }


class Given:
    """Collects what flags and files say, so that one pass can report everything that is wrong.

    Attributes:
        values: value by "section.field", for the fields that were given.
        origins: the spelling that gave each of them, for messages.
        notes: aliases translated, prefixes expanded, flags without effect: to be printed once.
        warnings: what is allowed but probably not meant.
        missing: what a run needs and a mere explanation does not (files that do not exist).
        unreadable: whether a value could not be read at all, so that rules would judge a value never meant.
        unknown: whether a flag could not be read at all, so that what seems to be missing may be what it means.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.errors: list[ConfigError] = []
        self.missing: list[ConfigError] = []
        self.unreadable = False
        self.unknown = False

    def give(self, field: str, value: Any, origin: str) -> None:
        """Set a field; a later call wins."""
        self.values[field] = value
        self.origins[field] = origin

    def value(self, field: str) -> Any:
        """The field's value as given, else its default, else 0 for a required one."""
        return self.values[field] if field in self.values else field_defaults().get(field, 0)

    def has(self, field: str) -> bool:
        """Whether the command line or a file named this field."""
        return field in self.values

    def read_file(self, path: str, flag: str) -> str | None:
        """Return the content of the text file that a flag names; None, with an error noted, if it cannot be read."""
        try:
            return read_text(path)
        except OSError as error:
            fix = f"Give {flag} a readable file" if Path(path).exists() else suggest_path(flag, path)
            self.missing.append(
                ConfigError(f"{flag} must name a readable file", found=read_failure(path, error), fix=fix)
            )
        except TextFileError as error:
            self.refuse(f"{flag} must name a UTF-8 text file", found=read_failure(path, error), fix="Convert the file")
        return None

    def refuse(self, problem: str, *, fix: str, rule: str = "", found: str = "") -> None:
        """Note an error and go on."""
        self.errors.append(ConfigError(problem, rule=rule, found=found, fix=fix))
