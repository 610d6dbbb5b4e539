"""Conversion between a command line and RunConfig; reports all errors of a command line at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron_lite.config.apply import apply
from megatron_lite.config.checkpoint import SavePhase
from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.flags.table import flags_by_field
from megatron_lite.config.given import SECTIONS, Given
from megatron_lite.config.launcher import read_command
from megatron_lite.config.names import name_warnings
from megatron_lite.config.resolve import resolve
from megatron_lite.config.rules import violations
from megatron_lite.config.run import RunConfig
from megatron_lite.config.values import write_value
from megatron_lite.config.words import read_words
from megatron_lite.errors import ConfigError, ConfigErrors


@dataclass(frozen=True)
class ParsedRun:
    """A command line, understood.

    Attributes:
        config: what it asks for.
        notes: aliases translated, prefixes expanded, flags without effect; for one rank to print once.
        warnings: what is allowed, but probably not meant.
        missing: files that flags name and that do not exist: fatal to a run, not to an explanation.
    """

    config: RunConfig
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[ConfigError, ...] = ()


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether --help or -h is among the words."""
    return any(word in ("-h", "--help") for word in argv)


def save_folder(argv: Sequence[str]) -> str:
    """Return the --save folder of a training command line, however wrong the rest is; empty: it is no job with one."""
    given = Given()
    apply(read_words(argv, given), given)
    return "" if given.value("runtime.dry_run") else str(given.value("checkpoint.save"))


def parse_run(argv: Sequence[str], *, world_size: int | None = None) -> ParsedRun:
    """Read a training command line.

    Args:
        argv: the words after the program's name.
        world_size: ranks that the launcher started; None: unknown, then --world-size or one replica.

    Raises:
        ConfigError: one thing is wrong.
        ConfigErrors: several things are wrong; it holds them all.
    """
    given = Given()
    apply(read_words(argv, given), given)
    config = resolve(given, world_size)
    if config is not None and not given.unreadable:
        given.errors += violations(config)
    raise_all(given.errors)
    assert config is not None
    return ParsedRun(
        config,
        tuple(dict.fromkeys(given.notes)),
        (*given.warnings, *name_warnings(config)),
        tuple(given.missing),
    )


def parse_command(argv: Sequence[str]) -> ParsedRun:
    """Read a command line as people copy it: training flags, or the whole command that starts the job.

    The number of ranks is --world-size, or else what the launcher's words say.

    Raises:
        ConfigError, ConfigErrors: as parse_run and read_command.
    """
    command = read_command(argv)
    return parse_run(command.flags, world_size=command.world_size)


def raise_all(errors: Iterable[ConfigError]) -> None:
    """Raise what is wrong: nothing, the one error, or all of them together."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigErrors(found)


def to_argv(config: RunConfig) -> list[str]:
    """The command line that parse_run reads back as `config`, in the table's order and spelling.

    Fields that have their default are left out, and so are those that follow from others.
    """
    chosen = {field: value for field, value in _leaves(config) if field not in DERIVED and value != _default(field)}
    given = Given()
    apply(read_words(_write(chosen), given), given)
    reread = resolve(given, None)
    assert reread is not None and not given.errors, given.errors
    derived = dict(_leaves(reread))
    return _write({field: value for field, value in _leaves(config) if field in chosen or derived[field] != value})


DERIVED = frozenset(
    f"model.{name}"
    for name in ("num_query_groups", "head_dim", "ffn_hidden_size", "max_position_embeddings", "qkv_bias")
)
"""Fields that a command line usually leaves to others."""


def _leaves(config: RunConfig) -> list[tuple[str, Any]]:
    return [
        (f"{section}.{field.name}", getattr(getattr(config, section), field.name))
        for section, cls in SECTIONS.items()
        for field in fields(cls)
    ]


def _default(field: str) -> Any:
    section, name = field.split(".")
    default = next(item.default for item in fields(SECTIONS[section]) if item.name == name)
    return None if default is MISSING else default


def _write(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    if "batch.step_schedule" in values:
        # Written in tokens; reading divides by the sequence length again.
        pairs = ((start * values["batch.seq_length"], batch) for start, batch in values["batch.step_schedule"])
        words += ["--step-batch-size-schedule", " ".join(f"{tokens}:{batch}" for tokens, batch in pairs)]
    if "model.num_query_groups" in values:
        words.append("--group-query-attention")
    match values.get("checkpoint.phases"):
        case (SavePhase(interval=interval, until=0),):
            words += ["--save-interval", str(interval)]
            values = {field: value for field, value in values.items() if field != "checkpoint.phases"}
    for field, flags in flags_by_field().items():
        if field in values:
            words += _write_field(flags, values[field])
    return words


def _write_field(flags: tuple[Flag, ...], value: Any) -> list[str]:
    for flag in flags:
        if not flag.takes_value and not flag.also and flag.sets == value:
            return [flag.name]
    flag = next(flag for flag in flags if flag.takes_value and not flag.also)
    words = flag.write(value) if flag.write else [write_value(value)]
    if len(words) == 1 and words[0].startswith(("--", "@")):
        return [f"{flag.name}={words[0]}"]
    return [flag.name, *words]
