"""ZeRO section of the DeepSpeed JSON: stage, offloading, the --engine that these require, and entries for DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lite.config.deepspeed_entries import (
    OFFLOAD_KEYS,
    ZERO_DEFAULTS,
    ZERO_PASSED,
    ZERO_REFUSED,
    ZERO_RENAMED,
    ZERO_WITHOUT_EFFECT,
)
from megatron_lite.config.deepspeed_values import (
    not_boolean,
    read_number,
    read_section,
    read_whole,
    refuse_unknown,
    take_entry,
)
from megatron_lite.config.flag import FIELD
from megatron_lite.config.given import Given
from megatron_lite.errors import ConfigError

_PREFIX = "zero_optimization."
_STAGES = 3


def merge_zero_stage(entries: dict[str, Any], given: Given) -> None:
    """Take the ZeRO stage of the JSON, unless --zero-stage contradicts it."""
    zero = read_section(entries, "zero_optimization")
    if "stage" not in zero:
        return
    stage = read_whole(zero["stage"], f"{_PREFIX}stage")
    if not 0 <= stage <= _STAGES:
        raise ConfigError(f"{_PREFIX}stage in the DeepSpeed JSON is {stage}", fix='Write "stage": 0, 1, 2 or 3')
    take_entry(given, FIELD.command.zero_stage, stage, f"{_PREFIX}stage {stage}")


def choose_engine(entries: dict[str, Any], given: Given) -> None:
    """Choose the DeepSpeed engine if the ZeRO stage or offloading needs it."""
    origin = next(_needs_deepspeed(entries, given), "")
    if not origin:
        return
    if not given.has(FIELD.runtime.engine):
        given.give(FIELD.runtime.engine, "deepspeed", origin)
    elif given.run.runtime.engine != "deepspeed":
        given.refuse(
            f"{given.origin(FIELD.runtime.engine)} cannot run {origin}",
            rule="The native engine shards the optimizer state at most (ZeRO stage 1), and offloads nothing",
            fix="Remove --engine, or use stage 1 without offloading",
        )


def _needs_deepspeed(entries: dict[str, Any], given: Given) -> Iterator[str]:
    """Yield what the native engine cannot run."""
    if (given.run.command.zero_stage or 0) > 1:
        yield given.origin(FIELD.command.zero_stage)
    for name, value in _current_names(read_section(entries, "zero_optimization")):
        if name in OFFLOAD_KEYS and _offloads(value):
            yield f"{_PREFIX}{name} in the DeepSpeed JSON"


def _current_names(zero: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries with the present names."""
    for name, value in zero.items():
        if (present := ZERO_RENAMED.get(name)) in zero:
            raise ConfigError(
                f"{_PREFIX}{name} and {_PREFIX}{present} are both in the DeepSpeed JSON",
                rule="They are the former and the present name of one entry",
                fix=f"Remove {name}",
            )
        if name.startswith("cpu_offload") and name in ZERO_RENAMED and not isinstance(value, bool):
            raise not_boolean(f"{_PREFIX}{name}", value)
        if name.startswith("cpu_offload") and name in ZERO_RENAMED:
            yield ZERO_RENAMED[name], {"device": "cpu"} if value else {}
        else:
            yield ZERO_RENAMED.get(name, name), value


def _offloads(value: Any) -> bool:
    return bool(value) and not (isinstance(value, dict) and value.get("device", "none") in (None, "none"))


def read_zero(entries: dict[str, Any], given: Given) -> dict[str, Any]:
    """Return the section for DeepSpeed, with whole numbers where DeepSpeed expects them.

    Raises:
        ConfigError: a value cannot be read.
    """
    zero = read_section(entries, "zero_optimization")
    for name in zero.keys() & ZERO_RENAMED.keys():
        given.notes.append(f"DeepSpeed JSON: {_PREFIX}{name} is read as {ZERO_RENAMED[name]}")
    stage = given.run.command.zero_stage
    if stage is None:
        stage = int(given.run.parallel.distributed_optimizer)
        if given.run.runtime.engine == "deepspeed" and stage:
            given.give(FIELD.command.zero_stage, stage, given.origin(FIELD.parallel.distributed_optimizer))
    settings: dict[str, Any] = {"stage": stage}
    for name, value in _current_names(zero):
        if name in ZERO_PASSED:
            if name not in OFFLOAD_KEYS or _offloads(value):
                settings[name] = _typed(f"{_PREFIX}{name}", value, ZERO_PASSED[name], given)
        elif name in ZERO_WITHOUT_EFFECT:
            given.notes.append(f"DeepSpeed JSON: {_PREFIX}{name} has no effect: {ZERO_WITHOUT_EFFECT[name]}")
        elif name in ZERO_REFUSED:
            if value not in (ZERO_DEFAULTS.get(name, False), None, {}):
                given.refuse(f"{_PREFIX}{name} in the DeepSpeed JSON is not supported", fix=ZERO_REFUSED[name])
        elif name != "stage":
            refuse_unknown(name, _PREFIX, [*ZERO_PASSED, "stage"], given)
    if given.run.runtime.engine == "native":
        _note_native(settings, given)
    else:
        _check_offload(settings, given)
        _merge_flags(settings, given)
    return settings


def _note_native(settings: Mapping[str, Any], given: Given) -> None:
    others = sorted(settings.keys() - {"stage"})
    if others:
        given.notes.append(
            f"DeepSpeed JSON: {_PREFIX}{{{','.join(others)}}} have no effect: the native engine runs ZeRO stages 0 and "
            "1, with buckets of --bucket-megabytes; --engine deepspeed would use them"
        )


def _typed(name: str, value: Any, kind: type, given: Given) -> Any:
    """Return an entry's value as DeepSpeed expects it."""
    if kind is int:
        return read_whole(value, name)
    if kind is float:
        return float(read_number(value, name))
    if kind is dict and isinstance(value, dict):
        return _offload(name, value, given)
    if not isinstance(value, kind):
        noun, example = {
            bool: ("true or false", "true"),
            str: ("a string", '"cpu"'),
            dict: ("an object", '{"device": "cpu"}'),
        }[kind]
        entry = name.rpartition(".")[2]
        raise ConfigError(
            f"{name} in the DeepSpeed JSON is {json.dumps(value)} instead of {noun}",
            fix=f'Write, for example, "{entry}": {example}',
        )
    return value


def _offload(name: str, section: Mapping[str, Any], given: Given) -> dict[str, Any]:
    known = OFFLOAD_KEYS[name.rpartition(".")[2]]
    found = {}
    for key, value in section.items():
        if key not in known:
            if value:
                refuse_unknown(key, f"{name}.", known, given)
        elif value is not None and value != "auto":
            found[key] = _typed(f"{name}.{key}", value, known[key], given)
    return found


def _check_offload(settings: Mapping[str, Any], given: Given) -> None:
    """Refuse offloading that the stage does not have, or without a place to offload to."""
    stage = settings["stage"]
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = settings.get(name)
        if section is None:
            continue
        device = section.get("device")
        if device == "nvme":
            given.refuse(
                f'{_PREFIX}{name}.device "nvme" in the DeepSpeed JSON is not supported',
                rule="Checkpoints are written from memory, and this state would be in files of DeepSpeed",
                fix='Write "device": "cpu", or use more ranks',
            )
        elif device != "cpu":
            given.refuse(f'{_PREFIX}{name}.device in the DeepSpeed JSON is "{device}"', fix='Write "device": "cpu"')
        if stage < least:
            given.refuse(
                f"{_PREFIX}{name} in the DeepSpeed JSON needs ZeRO stage {least} or more, and the stage is {stage}",
                fix=f"Use zero_optimization.stage {_STAGES}, or remove {name}",
            )


def _merge_flags(settings: dict[str, Any], given: Given) -> None:
    """Carry out the native engine's flags for gradient buckets by DeepSpeed's entries."""
    parallel = given.run.parallel
    values: tuple[tuple[object, str, Any], ...] = (
        (FIELD.parallel.bucket_megabytes, "reduce_bucket_size", parallel.bucket_megabytes * 2**20 // 4),
        (FIELD.parallel.overlap_grad_reduce, "overlap_comm", parallel.overlap_grad_reduce),
    )
    for field, entry, value in values:
        origin = given.origin(field)
        if origin and settings.setdefault(entry, value) != value:
            given.refuse(
                f"The command line and the DeepSpeed JSON contradict each other: {origin} and {_PREFIX}{entry} "
                f"{json.dumps(settings[entry])}",
                fix=f"Remove {origin.split()[0]}",
            )
    if origin := given.origin(FIELD.parallel.overlap_param_gather):
        given.notes.append(f"{origin} has no effect: DeepSpeed gathers parameters by zero_optimization's settings")
