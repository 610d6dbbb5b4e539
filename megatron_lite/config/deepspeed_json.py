"""DeepSpeed JSON reader: merges precision, clipping, ZeRO stage and curriculum into the config, without DeepSpeed."""

from __future__ import annotations

import difflib
import json
from typing import Any

from megatron_lite.config.batch import SequenceRamp
from megatron_lite.config.deepspeed_keys import (
    DEFAULT_SCALE_POWER,
    FP16_FIELDS,
    FP16_KEYS,
    READ_HERE,
    REFUSED,
    WITHOUT_EFFECT,
)
from megatron_lite.config.given import Given
from megatron_lite.config.values import MAX_NUMBER, shortened
from megatron_lite.formatting import format_number

MAX_SCALE_POWER = 126
"""Largest exponent of two that is a loss scale in fp32."""


def merge_deepspeed(given: Given) -> None:
    """Merge the JSON that --deepspeed_config names into `given`, with DeepSpeed's own precedence and defaults."""
    if not given.value("command.deepspeed"):
        if given.value("command.deepspeed_config"):
            given.refuse(
                "A DeepSpeed JSON needs --deepspeed",
                found=f"{given.origins['command.deepspeed_config']} without --deepspeed",
                fix="Add --deepspeed, or leave the JSON out",
            )
        return
    given.give("precision.scaler", given.values.get("precision.scaler", "deepspeed"), "--deepspeed")
    entries = _read(given)
    for key in entries:
        _note(key, given)
    _precision(entries, given)
    _clipping(entries, given)
    _zero(entries, given)
    _micro_batch(entries, given)
    _curriculum(entries, given)


def _read(given: Given) -> dict[str, Any]:
    path = given.value("command.deepspeed_config")
    if not path:
        return {}
    text = given.read_file(path, "--deepspeed_config")
    if text is None:
        return {}
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        given.refuse(
            "--deepspeed_config must name a JSON file",
            found=f"{path}: {error}",
            fix="Repair that line: JSON has no _ in numbers, no comments and no comma before a closing bracket",
        )
        return {}
    if not isinstance(entries, dict):
        fix = 'Write the file as {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}'
        given.refuse("--deepspeed_config must hold a JSON object", found=f"{path}: {text[:40]!r}", fix=fix)
        return {}
    return {key: value for key, value in entries.items() if value != "auto" and not key.startswith("_")}


def _note(key: str, given: Given) -> None:
    """Say of an entry that is not merged why it is not."""
    if key in WITHOUT_EFFECT:
        given.notes.append(f"DeepSpeed JSON: {key} has no effect: {WITHOUT_EFFECT[key]}")
    elif key in REFUSED:
        given.refuse(
            "The native engine does not have every feature of DeepSpeed",
            found=f"{key} in the DeepSpeed JSON",
            fix=REFUSED[key],
        )
    elif key not in READ_HERE:
        nearest = difflib.get_close_matches(key, [*READ_HERE, *WITHOUT_EFFECT, *REFUSED], n=1)
        given.refuse(
            "Every entry of the DeepSpeed JSON must be known",
            found=key,
            fix=f"Did you mean {nearest[0]}?" if nearest else "Remove the entry",
        )


def _section(entries: dict[str, Any], key: str, given: Given) -> dict[str, Any]:
    section = entries.get(key, {})
    if isinstance(section, dict):
        return {name: value for name, value in section.items() if value != "auto"}
    fix = (
        f'Write it as "{key}": {{"enabled": true}}'
        if key != "zero_optimization"
        else f'Write it as "{key}": {{"stage": 1}}'
    )
    given.refuse(f"{key} in the DeepSpeed JSON is an object", found=repr(section), fix=fix)
    return {}


def _number(value: Any, key: str, given: Given) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER:
        return value
    given.refuse(
        f"{key} in the DeepSpeed JSON is a number of at most {format_number(MAX_NUMBER)}",
        found=shortened(repr(value)),
        fix=_number_fix(key, value),
    )
    return 0


def _whole(value: Any, key: str, given: Given) -> int:
    number = _number(value, key, given)
    if number != int(number):
        given.refuse(
            f"{key} in the DeepSpeed JSON is a whole number", found=repr(value), fix=_number_fix(key, round(number))
        )
    return int(number)


def _number_fix(key: str, value: Any) -> str:
    plain = shortened(str(value).replace("_", ""))
    entry = key.rpartition(".")[2]
    shown = plain if plain.replace(".", "", 1).isdigit() else "1"
    return f'Write it without quotes, as "{entry}": {shown}, or remove the entry to take DeepSpeed\'s default'


def _contradiction(given: Given, field: str, flag: str, entry: str) -> None:
    given.refuse(
        "The command line and the DeepSpeed JSON must not contradict each other",
        found=f"{given.origins.get(field, flag)} and {entry}",
        fix=f"Change {flag} or the JSON",
    )


def _precision(entries: dict[str, Any], given: Given) -> None:
    fp16 = _section(entries, "fp16", given)
    bf16 = _section(entries, "bf16" if "bf16" in entries else "bfloat16", given)
    enabled = [name for name, section in (("fp16", fp16), ("bf16", bf16)) if section.get("enabled")]
    if len(enabled) == 2:
        given.refuse(
            "A run has one precision", found="fp16 and bf16 enabled in the DeepSpeed JSON", fix="Disable one of them"
        )
        return
    asked = given.value("precision.dtype")
    if enabled and given.has("precision.dtype") and asked != enabled[0]:
        _contradiction(given, "precision.dtype", "--fp16 or --bf16", f"{enabled[0]}.enabled true")
    elif enabled:
        given.give("precision.dtype", enabled[0], f"{enabled[0]}.enabled in the DeepSpeed JSON")
    elif {"fp16": fp16, "bf16": bf16}.get(asked, {}).get("enabled") is False:
        _contradiction(given, "precision.dtype", f"--{asked}", f"{asked}.enabled false")
    if given.has("precision.loss_scale"):
        given.notes.append(
            f"{given.origins['precision.loss_scale']} has no effect: under --deepspeed the JSON's fp16.loss_scale "
            "decides (0: dynamic)"
        )
    scale = _number(fp16.get("loss_scale", 0), "fp16.loss_scale", given)
    given.give("precision.loss_scale", float(scale), "fp16.loss_scale in the DeepSpeed JSON")
    if not fp16:
        return
    power = _number(fp16.get("initial_scale_power", DEFAULT_SCALE_POWER), "fp16.initial_scale_power", given)
    if abs(power) > MAX_SCALE_POWER:
        given.refuse(
            f"fp16.initial_scale_power in the DeepSpeed JSON is at most {MAX_SCALE_POWER}",
            found=f"{power:g}",
            fix=f"Give it a power up to {MAX_SCALE_POWER}, or leave it out for {DEFAULT_SCALE_POWER}",
        )
        return
    _take(given, "precision.initial_loss_scale", 2.0**power, f"fp16.initial_scale_power {power}")
    for name, (field, default) in FP16_FIELDS.items():
        kind = type(given.value(field))
        read = _whole if kind is int else _number
        value = read(fp16.get(name, default), f"fp16.{name}", given)
        _take(given, field, kind(value), f"fp16.{name} {value}")
    _check_names("fp16", {name: value for name, value in fp16.items() if value is not False}, FP16_KEYS, given)


def _check_names(section: str, entries: dict[str, Any], known: frozenset[str], given: Given) -> None:
    for name in sorted(entries.keys() - known):
        nearest = difflib.get_close_matches(name, known, n=1)
        given.refuse(
            "Every entry of the DeepSpeed JSON must be known",
            found=f"{section}.{name}",
            fix=f"Did you mean {section}.{nearest[0]}?" if nearest else "Remove the entry",
        )


def _take(given: Given, field: str, value: Any, entry: str) -> None:
    """The JSON's value, unless a flag says something else."""
    if given.has(field) and given.values[field] != value:
        flag = given.origins[field].split()[0]
        _contradiction(given, field, flag, entry)
    else:
        given.give(field, value, f"{entry} in the DeepSpeed JSON")


def _clipping(entries: dict[str, Any], given: Given) -> None:
    if "gradient_clipping" in entries:
        value = float(_number(entries["gradient_clipping"], "gradient_clipping", given))
        _take(given, "optimizer.clip_grad", value, f"gradient_clipping {value}")


def _zero(entries: dict[str, Any], given: Given) -> None:
    zero = _section(entries, "zero_optimization", given)
    for name in ("offload_optimizer", "offload_param", "cpu_offload"):
        device = zero.get(name)
        if device and not (isinstance(device, dict) and device.get("device") == "none"):
            given.refuse(
                "Nothing is offloaded to the CPU",
                found=f"zero_optimization.{name} in the DeepSpeed JSON",
                fix="Remove the entry; use --checkpoint-activations, or more ranks",
            )
    others = sorted(zero.keys() - {"stage", "offload_optimizer", "offload_param", "cpu_offload"})
    if others:
        given.notes.append(
            f"DeepSpeed JSON: zero_optimization.{{{','.join(others)}}} have no effect: buckets are sized by "
            "--bucket-megabytes and always overlap"
        )
    if "stage" in zero:
        stage = _whole(zero["stage"], "zero_optimization.stage", given)
        _take(given, "command.zero_stage", stage, f"zero_optimization.stage {stage}")


def _micro_batch(entries: dict[str, Any], given: Given) -> None:
    if "train_micro_batch_size_per_gpu" in entries:
        size = _whole(entries["train_micro_batch_size_per_gpu"], "train_micro_batch_size_per_gpu", given)
        _take(given, "batch.micro_batch_size", size, f"train_micro_batch_size_per_gpu {size}")


def _curriculum(entries: dict[str, Any], given: Given) -> None:
    curriculum = _section(entries, "curriculum_learning", given)
    if not curriculum.get("enabled"):
        return
    schedule, kind = _section(curriculum, "schedule_config", given), curriculum.get("schedule_type", "fixed_linear")
    if curriculum.get("curriculum_type", "seqlen") != "seqlen" or kind not in ("fixed_linear", "fixed_discrete"):
        given.refuse(
            "The curriculum is by sequence length, linear or in stages",
            found=f"curriculum_type {curriculum.get('curriculum_type')}, schedule_type {kind}",
            fix="Use curriculum_type seqlen with schedule_type fixed_linear or fixed_discrete",
        )
        return
    longest = _whole(curriculum.get("max_difficulty", given.value("batch.seq_length")), "max_difficulty", given)
    if given.has("batch.seq_length") and longest != given.values["batch.seq_length"]:
        _contradiction(given, "batch.seq_length", "--seq-length", f"curriculum_learning.max_difficulty {longest}")
    ramp = _linear(curriculum, schedule, given) if kind == "fixed_linear" else _staged(schedule, given)
    if ramp is not None:
        _take(given, "batch.sequence_ramp", ramp, "curriculum_learning")


def _linear(curriculum: dict[str, Any], schedule: dict[str, Any], given: Given) -> SequenceRamp:
    step = schedule.get("difficulty_step", SequenceRamp().step)
    return SequenceRamp(
        start=_whole(curriculum.get("min_difficulty", 0), "curriculum_learning.min_difficulty", given),
        iterations=_whole(schedule.get("total_curriculum_step"), "total_curriculum_step", given),
        step=_whole(step, "difficulty_step", given),
    )


def _staged(schedule: dict[str, Any], given: Given) -> SequenceRamp | None:
    """fixed_discrete: difficulty[i] holds up to iteration max_step[i], the last one to the end."""
    lengths, ends = schedule.get("difficulty"), schedule.get("max_step")
    if not isinstance(lengths, list) or not isinstance(ends, list) or len(lengths) != len(ends) + 1:
        given.refuse(
            "fixed_discrete has one difficulty more than max_step",
            found=f"difficulty {lengths}, max_step {ends}",
            fix='Write schedule_config as {"difficulty": [64, 128, 2048], "max_step": [1000, 5000]}',
        )
        return None
    firsts = [0, *(_whole(end, "max_step", given) + 1 for end in ends)]
    sizes = [_whole(length, "difficulty", given) for length in lengths]
    return SequenceRamp(stages=tuple(zip(firsts, sizes, strict=True)))
