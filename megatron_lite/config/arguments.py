"""Conversion of a training command line to a validated RunConfig and back; collects all errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megatron_lite.config import (
    batch,
    checkpoint,
    curriculum_rules,
    data,
    deepspeed_nvme,
    devices,
    engines,
    fp8,
    kernels,
    learning_rate,
    metrics,
    model_rules,
    optimizer,
    parallel,
    pipeline_rules,
    profiling,
    runtime,
    tokenizer,
    training,
    tuning,
    xla,
)
from megatron_lite.config.checkpoint import SavePhase
from megatron_lite.config.command_line import read_command_line
from megatron_lite.config.deepspeed_json import merge_deepspeed
from megatron_lite.config.flag import FIELD, Flag, Key, key_of
from megatron_lite.config.given import Given
from megatron_lite.config.launcher import read_command
from megatron_lite.config.names import name_warnings
from megatron_lite.config.origins import given_spellings, in_given_terms
from megatron_lite.config.run import CommandLine, RunConfig
from megatron_lite.config.table import SECTIONS, field_metadata, flags_by_field, required_fields
from megatron_lite.config.values import write_value
from megatron_lite.errors import ConfigError, ConfigErrors

Rule = Callable[[RunConfig], Iterator[ConfigError]]

RESOLVERS: tuple[Callable[[Given], None], ...] = (
    merge_deepspeed,
    *parallel.RESOLVERS,
    *model_rules.RESOLVERS,
    *optimizer.RESOLVERS,
    *learning_rate.RESOLVERS,
    *fp8.RESOLVERS,
    *runtime.RESOLVERS,
    *kernels.RESOLVERS,
    *checkpoint.RESOLVERS,
    *data.RESOLVERS,
    *xla.RESOLVERS,
)
"""Derive fields from others, in this order: DeepSpeed's JSON first, since others depend on its values."""
RULES: tuple[Rule, ...] = (
    *model_rules.RULES,
    *batch.RULES,
    *curriculum_rules.RULES,
    *training.RULES,
    *tuning.RULES,
    *learning_rate.RULES,
    *optimizer.RULES,
    *parallel.RULES,
    *pipeline_rules.RULES,
    *data.RULES,
    *tokenizer.RULES,
    *checkpoint.RULES,
    *profiling.RULES,
    *fp8.RULES,
    *metrics.RULES,
    *engines.RULES,
    *deepspeed_nvme.RULES,
    *kernels.RULES,
    *devices.RULES,
    *xla.RULES,
)


@dataclass(frozen=True)
class ParsedRun:
    """A parsed training command line.

    Attributes:
        config: the run's configuration.
        notes: aliases translated, prefixes expanded, flags without effect; for one rank to print once.
        warnings: what is allowed, but probably not meant.
        missing: files that flags name and that do not exist: fatal to a run, not to an explanation.
        spellings: aliases by which flags were given, by the flag's usual name.
    """

    config: RunConfig
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[ConfigError, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return True if --help or -h is among the arguments."""
    return any(arg in ("-h", "--help") for arg in argv)


def save_folder(argv: Sequence[str]) -> str:
    """Return the --save folder of a training command line, however wrong the rest is; empty: none, or a dry run."""
    given = Given()
    read_command_line(argv, given)
    return "" if given.run.runtime.dry_run else given.run.checkpoint.save


def is_dry_run(argv: Sequence[str]) -> bool:
    """Return whether a training command line has --dry-run, however wrong the rest is."""
    given = Given()
    read_command_line(argv, given)
    return given.run.runtime.dry_run


def parse_run(argv: Sequence[str], *, world_size: int | None = None) -> ParsedRun:
    """Read a training command line.

    Args:
        argv: the arguments after the program's name.
        world_size: ranks that the launcher started; None: unknown, then --world-size or one replica.

    Raises:
        ConfigError: one thing is wrong.
        ConfigErrors: several things are wrong; it holds them all.
    """
    given = Given(world_size)
    read_command_line(argv, given)
    config = _resolve(given)
    if config is not None and not given.unreadable:
        given.errors += [in_given_terms(error, given) for rule in RULES for error in rule(config)]
    raise_all(given.errors)
    assert config is not None
    return ParsedRun(
        config,
        tuple(dict.fromkeys(given.notes)),
        (*given.warnings, *name_warnings(config)),
        tuple(given.missing),
        given_spellings(given),
    )


def parse_layout(argv: Sequence[str], *, world_size: int | None = None) -> CommandLine:
    """Read the flags of a training command line that need no model: layout, device, folders.

    Args:
        argv: training flags, which may leave out the shape of the model and batch: these fields are 0 then.
        world_size: ranks that the launcher started; None: unknown.

    Raises:
        ConfigError, ConfigErrors: flags are wrong.
    """
    given = Given(world_size)
    read_command_line(argv, given)
    for resolve in parallel.RESOLVERS:
        resolve(given)
    raise_all(given.errors)
    return given.run


def _resolve(given: Given) -> RunConfig | None:
    """Derive fields and files from what was given; None if a required field is missing."""
    for resolve in RESOLVERS:
        resolve(given)
    missing = [flags_by_field()[key][0].name for key in required_fields() if given.value_of(key) is None]
    if missing:
        if not given.unreadable and not given.unknown:
            given.refuse(
                f"Required {'flags are' if len(missing) > 1 else 'flag is'} missing: {', '.join(missing)}",
                fix=f"Add {' '.join(f'{flag} N' for flag in missing)}",
            )
        return None
    batch.resolve_global_batch(given)
    return RunConfig(**given.sections())


def parse_command(argv: Sequence[str]) -> ParsedRun:
    """Read a command line as copied from a shell: training flags, or the whole command that starts the job.

    The number of ranks is --world-size, else the launcher's.

    Raises:
        ConfigError, ConfigErrors: as parse_run and read_command.
    """
    command = read_command(argv)
    return parse_run(command.flags, world_size=command.world_size)


def raise_all(errors: Iterable[ConfigError]) -> None:
    """Raise the one error, or all of several together; nothing if there are none."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigErrors(found)


def to_argv(config: RunConfig) -> list[str]:
    """Return the command line that parse_run reads back as `config`, in the order and spelling of the flag table.

    Fields that have their default are left out, and so are those that are derived from others.
    """
    leaves = _leaves(config)
    derived = field_metadata("derived")
    chosen = {key: value for key, value in leaves.items() if key not in derived and value != _default(key)}
    given = Given()
    read_command_line(write_fields(chosen), given)
    reread = _resolve(given)
    assert reread is not None and not given.errors, given.errors
    reread_leaves = _leaves(reread)
    return write_fields({key: value for key, value in leaves.items() if key in chosen or reread_leaves[key] != value})


def _leaves(config: RunConfig) -> dict[Key, Any]:
    return {
        (section, entry.name): getattr(getattr(config, section), entry.name)
        for section, kind in SECTIONS.items()
        for entry in fields(kind)
    }


def _default(key: Key) -> Any:
    section, name = key
    default = SECTIONS[section].__dataclass_fields__[name].default
    return None if default is MISSING else default


def write_fields(values: dict[Key, Any]) -> list[str]:
    """Return the arguments that give fields their values; none of them has a default that no flag sets."""
    args: list[str] = []
    if schedule := values.get(key_of(FIELD.batch.step_schedule)):
        length = values[key_of(FIELD.batch.seq_length)]
        args += ["--step-batch-size-schedule", batch.write_step_schedule(schedule, length)]
    if key_of(FIELD.model.num_query_groups) in values:
        args.append("--group-query-attention")
    phases = key_of(FIELD.checkpoint.phases)
    match values.get(phases):
        case (SavePhase(interval=interval, until=0),):
            args += ["--save-interval", str(interval)]
            values = {key: value for key, value in values.items() if key != phases}
    for key, declared in flags_by_field().items():
        if key in values and declared:
            args += write_field(declared, values[key])
    return args


def write_field(declared: tuple[Flag, ...], value: Any) -> list[str]:
    """Return the arguments that give a field its value.

    Args:
        declared: the field's flags.
        value: not the default of a field whose flags only set constants.
    """
    for flag in declared:
        if not flag.takes_value and not flag.also and flag.sets == value:
            return [flag.name]
    flag = next(flag for flag in declared if flag.takes_value and not flag.also)
    args = flag.format.write(value) if flag.format and flag.format.write else [write_value(value)]
    if len(args) == 1 and args[0].startswith(("--", "@")):
        return [f"{flag.name}={args[0]}"]
    return [flag.name, *args]
