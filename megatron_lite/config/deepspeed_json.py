"""DeepSpeed JSON reader: merges its entries into the config, chooses the engine and collects the engine's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_lite.config.batch import SequenceRamp
from megatron_lite.config.deepspeed import write_settings
from megatron_lite.config.deepspeed_entries import ENGINE, NATIVE, Entries
from megatron_lite.config.deepspeed_kinds import SECTIONS, json_text
from megatron_lite.config.deepspeed_values import (
    asks_for_nothing,
    read_entries,
    refuse_contradiction,
    take_entry,
)
from megatron_lite.config.deepspeed_zero import choose_engine, merge_zero_stage, read_zero
from megatron_lite.config.flag import FIELD
from megatron_lite.config.given import Given
from megatron_lite.config.optimizer import Dtype, OptimizerKind
from megatron_lite.errors import ConfigError

FIELDS: dict[str, float] = {
    "gradient_clipping": FIELD.optimizer.clip_grad,
    "train_micro_batch_size_per_gpu": FIELD.batch.micro_batch_size,
    "train_batch_size": FIELD.batch.global_batch_size,
    "gradient_accumulation_steps": FIELD.command.accumulation_steps,
}
"""Fields that entries at the top level set, where the engine merges them."""
SCALES: dict[str, float] = {
    "initial_scale_power": FIELD.precision.initial_loss_scale,
    "loss_scale_window": FIELD.precision.loss_scale_window,
    "hysteresis": FIELD.precision.hysteresis,
    "min_loss_scale": FIELD.precision.min_loss_scale,
}
"""Fields that entries of the section fp16 set; the power of two is the logarithm of the field."""
OPTIMIZERS: dict[str, OptimizerKind] = {"adam": "adam", "adamw": "adam", "sgd": "sgd"}
"""--optimizer by the optimizer's type in the JSON. DeepSpeed's Adam decouples weight decay, too, by default."""
FIXED = {"torch_adam": None, "adam_w_mode": True, "bias_correction": True, "amsgrad": False, "nesterov": False}
"""Values of the optimizer's parameters that have no flag; None: any."""


def merge_deepspeed(given: Given) -> None:
    """Merge the JSON that --deepspeed_config names into `given`, with DeepSpeed's own precedence and defaults.

    Chooses the engine, too, by the ZeRO stage and offloading. The entries that only DeepSpeed itself can carry out
    become DeepSpeedConfig.settings.
    """
    command = given.run.command
    engine_asked = given.run.runtime.engine == "deepspeed"
    if not command.deepspeed and not engine_asked:
        _refuse_without_deepspeed(given)
        return
    found = _read_settings(given) if given.has(FIELD.deepspeed.settings) else _read(given)
    entries = read_entries(found, given)
    if command.deepspeed and not given.has(FIELD.precision.scaler):
        given.give(FIELD.precision.scaler, "deepspeed", "--deepspeed")
    merge_zero_stage(entries, given)
    choose_engine(entries, given)
    engine = given.run.runtime.engine
    known = ENGINE if engine == "deepspeed" else NATIVE
    for key in entries:
        _note_entry(key, entries[key], known, given)
    # Without --deepspeed or a file, the flags' values apply, not DeepSpeed's defaults.
    if command.deepspeed or command.deepspeed_config:
        _precision(entries, given)
    if not given.unreadable:  # the entries that were dropped may be the ones that these need
        _optimizer(entries, given)
        with _recorded_error(given):
            _curriculum(entries, given)
    for key, field in FIELDS.items():
        if key in entries and key in known.merged:
            take_entry(given, field, entries[key], f"{key} {json_text(entries[key])}")
    zero = read_zero(entries, given)
    if engine == "deepspeed":
        settings = {key: value for key, value in entries.items() if key in known.passed}
        origin = given.origin(FIELD.deepspeed.settings) or given.origin(FIELD.runtime.engine)
        given.give(FIELD.deepspeed.settings, write_settings({**settings, "zero_optimization": zero}), origin)


def _refuse_without_deepspeed(given: Given) -> None:
    """Refuse flags that need DeepSpeed where neither --deepspeed nor --engine deepspeed is given."""
    command = given.run.command
    if command.deepspeed_config:
        origin = given.origin(FIELD.command.deepspeed_config)
        given.refuse(f"{origin} has no effect without --deepspeed", fix="Add --deepspeed, or remove --deepspeed_config")
    if given.has(FIELD.deepspeed.settings):
        given.refuse(
            "--deepspeed-settings has no effect without --engine deepspeed",
            fix="Add --engine deepspeed, or remove --deepspeed-settings",
        )
    if command.zero_stage in (2, 3):
        given.refuse(
            f"ZeRO stage {command.zero_stage} is run by DeepSpeed only ({given.origin(FIELD.command.zero_stage)})",
            fix="Add --deepspeed; or use stage 1, for which DeepSpeed is not needed, and if memory is short a larger "
            "--tensor-model-parallel-size or --pipeline-model-parallel-size",
        )


@contextmanager
def _recorded_error(given: Given) -> Iterator[None]:
    """Record an error that ends the reading of a section, and continue with the next."""
    try:
        yield
    except ConfigError as error:
        given.unreadable = True
        given.errors.append(error)


def _read(given: Given) -> dict[str, Any]:
    path = given.run.command.deepspeed_config
    if not path:
        if given.has(FIELD.command.deepspeed_config):
            given.refuse(
                "The path of --deepspeed_config is empty (is a variable unset?)",
                fix="Give the path of DeepSpeed's JSON, or remove --deepspeed_config",
            )
        return {}
    text = given.read_file(path, "--deepspeed_config")
    return {} if text is None else _parse(text, f"{path} (--deepspeed_config)", path, given)


def _read_settings(given: Given) -> dict[str, Any]:
    origin = "--deepspeed-settings"
    if given.has(FIELD.command.deepspeed_config):
        given.refuse_both(origin, given.origin(FIELD.command.deepspeed_config))
    return _parse(given.run.deepspeed.settings, origin, f"the argument of {origin}", given)


def _parse(text: str, origin: str, place: str, given: Given) -> dict[str, Any]:
    """Return the entries of a JSON text.

    Args:
        text: JSON.
        origin: file or flag that has it, in errors.
        place: what to repair.
        given: records errors.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            given.refuse(f'{origin} has the entry "{name}" more than once', fix=f"Leave one of them in {place}")
        return dict(pairs)

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        fix = "Remove the excess brackets: a DeepSpeed configuration is at most a few levels deep"
        given.refuse(f"{origin} is nested too deeply to be read as JSON", fix=fix)
        return {}
    except ValueError as error:
        given.refuse(
            f"{origin} is not valid JSON: {error}",
            fix=f"Repair {place}: JSON has no comments, no comma after the last entry and no _ in numbers",
        )
        return {}
    if not isinstance(entries, dict):
        fix = 'Write, for example, {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}'
        given.refuse(f"{origin} is {json_text(entries)} instead of a JSON object", fix=fix)
        return {}
    return entries


def _note_entry(key: str, value: Any, known: Entries, given: Given) -> None:
    """Record why an entry is not merged."""
    if key in known.without_effect:
        given.notes.append(f"DeepSpeed JSON: {key} has no effect: {known.without_effect[key]}")
    elif key in known.refused and not asks_for_nothing(key, value):
        given.refuse(f"{key} in the DeepSpeed JSON is not supported", fix=known.refused[key])


def _precision(entries: dict[str, Any], given: Given) -> None:
    fp16, bf16 = entries.get("fp16", {}), entries.get("bf16", {})
    if fp16.get("enabled") and bf16.get("enabled"):
        given.refuse(
            "fp16.enabled and bf16.enabled are both true in the DeepSpeed JSON",
            fix="Set one of the two to false",
        )
        return
    enabled: Dtype = "fp16" if fp16.get("enabled") else "bf16" if bf16.get("enabled") else "fp32"
    asked, origin = given.run.precision.dtype, given.origin(FIELD.precision.dtype)
    if enabled != "fp32":
        if origin and asked != enabled:
            fix = f"Remove {origin.split()[0]} to train in {enabled}, or set {enabled}.enabled to false in the JSON"
            refuse_contradiction(given, origin, f"{enabled}.enabled true", fix)
        else:
            given.give(FIELD.precision.dtype, enabled, f"{enabled}.enabled in the DeepSpeed JSON")
    elif {"fp16": fp16, "bf16": bf16}.get(asked, {}).get("enabled") is False:
        fix = f"Remove {origin.split()[0]} to train in fp32, or set {asked}.enabled to true in the JSON"
        refuse_contradiction(given, origin, f"{asked}.enabled false", fix)
    if scale_origin := given.origin(FIELD.precision.loss_scale):
        given.notes.append(
            f"{scale_origin} has no effect: with --deepspeed the JSON's fp16.loss_scale sets it (0: dynamic)"
        )
    scale = fp16.get("loss_scale", 0)
    given.give(FIELD.precision.loss_scale, float(scale), f"fp16.loss_scale {scale:g} in the DeepSpeed JSON")
    if fp16:
        for name, field in SCALES.items():
            value = fp16.get(name, SECTIONS["fp16"][name].example)
            origin = f"fp16.{name} {value:g}{'' if name in fp16 else ', the default of DeepSpeed'}"
            take_entry(given, field, 2.0**value if name == "initial_scale_power" else value, origin)


def _optimizer(entries: dict[str, Any], given: Given) -> None:
    """Take the optimizer and its parameters."""
    optimizer = entries.get("optimizer", {})
    if not optimizer:
        return
    name = optimizer.get("type", "")
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        given.refuse(
            f"optimizer.type in the DeepSpeed JSON is {json_text(name) if name else 'missing'}",
            fix='Write "type": "Adam", "AdamW" or "SGD", or remove the section and use --optimizer, --lr and '
            "--weight-decay",
        )
        return
    take_entry(given, FIELD.optimizer.kind, kind, f"optimizer.type {name}")
    fields: dict[str, float] = {"lr": FIELD.lr.lr, "weight_decay": FIELD.optimizer.weight_decay}
    fields |= {"eps": FIELD.optimizer.adam_eps} if kind == "adam" else {"momentum": FIELD.optimizer.sgd_momentum}
    for entry, value in optimizer.get("params", {}).items():
        key = f"optimizer.params.{entry}"
        if entry in fields:
            take_entry(given, fields[entry], value, f"{key} {value:g}")
        elif entry == "betas" and kind == "adam":
            for field, beta in zip((FIELD.optimizer.adam_beta1, FIELD.optimizer.adam_beta2), value, strict=True):
                take_entry(given, field, beta, f"{key} {beta:g}")
        elif entry not in FIXED:
            given.refuse(f"{key} in the DeepSpeed JSON does not apply to {name}", fix="Remove the entry")
        elif FIXED[entry] not in (None, value):
            given.refuse(
                f"{key} in the DeepSpeed JSON is {json_text(value)}, and the optimizer here has "
                f"{json_text(FIXED[entry])}",
                fix=f'Write "{entry}": {json_text(FIXED[entry])}, or remove the entry',
            )


def _curriculum(entries: dict[str, Any], given: Given) -> None:
    curriculum = entries.get("curriculum_learning", {})
    if not curriculum.get("enabled"):
        return
    schedule, kind = curriculum.get("schedule_config", {}), curriculum.get("schedule_type", "fixed_linear")
    if curriculum.get("curriculum_type", "seqlen") != "seqlen" or kind not in ("fixed_linear", "fixed_discrete"):
        given.refuse(
            "curriculum_learning in the DeepSpeed JSON has curriculum_type "
            f"{curriculum.get('curriculum_type', 'seqlen')} "
            f"and schedule_type {kind}; this combination is not supported",
            fix="Use curriculum_type seqlen with schedule_type fixed_linear or fixed_discrete",
        )
        return
    length = given.run.batch.seq_length
    longest = curriculum.get("max_difficulty", length)
    if length and longest != length:
        refuse_contradiction(
            given,
            given.origin(FIELD.batch.seq_length),
            f"curriculum_learning.max_difficulty {longest}",
            fix=f"Set max_difficulty to {length} in the JSON, or use --seq-length {longest}",
        )
    ramp = _linear(curriculum, schedule) if kind == "fixed_linear" else _staged(schedule)
    take_entry(given, FIELD.batch.sequence_ramp, ramp, "curriculum_learning")


def _linear(curriculum: dict[str, Any], schedule: dict[str, Any]) -> SequenceRamp:
    """Read fixed_linear: from min_difficulty to max_difficulty over total_curriculum_step iterations.

    Raises:
        ConfigError: one of the two is missing.
    """
    for section, place, entry, example in (
        (curriculum, "", "min_difficulty", 64),
        (schedule, "schedule_config.", "total_curriculum_step", 1000),
    ):
        if entry not in section:
            raise ConfigError(
                f"curriculum_learning.{place}{entry} is missing in the DeepSpeed JSON",
                fix=f'Add "{entry}" there with a number, such as {example}',
            )
    return SequenceRamp(
        start=curriculum["min_difficulty"],
        iterations=schedule["total_curriculum_step"],
        step=schedule.get("difficulty_step", SequenceRamp().step),
    )


def _staged(schedule: dict[str, Any]) -> SequenceRamp:
    """Read fixed_discrete: difficulty[i] applies up to iteration max_step[i], the last one to the end.

    Raises:
        ConfigError: the lists are missing, or their lengths do not fit.
    """
    lengths, ends = schedule.get("difficulty"), schedule.get("max_step")
    if lengths is None or ends is None or len(lengths) != len(ends) + 1:
        raise ConfigError(
            f"curriculum_learning in the DeepSpeed JSON has difficulty {json_text(lengths)} and max_step "
            f"{json_text(ends)}",
            rule="schedule_type fixed_discrete needs a list of lengths, and a list of the iterations at which all but "
            "the last of them end",
            fix='Write schedule_config like {"difficulty": [64, 128, 2048], "max_step": [1000, 5000]}',
        )
    return SequenceRamp(stages=tuple(zip([0, *(end + 1 for end in ends)], lengths, strict=True)))
