"""ZeRO section of the DeepSpeed JSON: stage, offloading, the --engine they need, and entries passed on unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lite.config.deepspeed_values import take_entry
from megatron_lite.config.flag import FIELD
from megatron_lite.config.given import Given

_PREFIX = "zero_optimization."
_STAGES = 3
OFFLOADING = ("offload_optimizer", "offload_param")
"""Sections of offloading."""
NVME_ONLY = frozenset(
    {"nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init"}
)
"""Entries of these sections that DeepSpeed reads for device nvme only."""


def merge_zero_stage(entries: dict[str, Any], given: Given) -> None:
    """Take the ZeRO stage of the JSON, unless --zero-stage contradicts it."""
    zero = entries.get("zero_optimization", {})
    if "stage" in zero:
        take_entry(given, FIELD.command.zero_stage, zero["stage"], f"{_PREFIX}stage {zero['stage']}")


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
    zero = entries.get("zero_optimization", {})
    for name in filter(zero.get, OFFLOADING):
        if _offloads(zero[name]):
            yield f"{_PREFIX}{name} in the DeepSpeed JSON"


def _offloads(section: Mapping[str, Any]) -> bool:
    return section.get("device", "none") != "none"


def read_zero(entries: dict[str, Any], given: Given) -> dict[str, Any]:
    """Return the section for DeepSpeed."""
    stage = given.run.command.zero_stage
    if stage is None:
        stage = int(given.run.parallel.distributed_optimizer)
        if given.run.runtime.engine == "deepspeed" and stage:
            given.give(FIELD.command.zero_stage, stage, given.origin(FIELD.parallel.distributed_optimizer))
    zero = {
        name: value
        for name, value in entries.get("zero_optimization", {}).items()
        if name not in OFFLOADING or _offloads(value)
    }
    settings: dict[str, Any] = {**zero, "stage": stage}
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


def _check_offload(settings: Mapping[str, Any], given: Given) -> None:
    """Refuse offloading that the stage does not have, or without a place to offload to."""
    stage = settings["stage"]
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = settings.get(name)
        if section is None:
            continue
        if stage < least:
            given.refuse(
                f"{_PREFIX}{name} in the DeepSpeed JSON needs ZeRO stage {least} or more, and the stage is {stage}",
                fix=f"Use zero_optimization.stage {_STAGES}, or remove {name}",
            )
        unused = sorted(section.keys() & NVME_ONLY) if section.get("device") == "cpu" else []
        if unused:
            given.notes.append(
                f"DeepSpeed JSON: {_PREFIX}{name}.{{{','.join(unused)}}} have no effect: they belong to device nvme"
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
