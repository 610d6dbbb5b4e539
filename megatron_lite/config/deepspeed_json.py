"""DeepSpeed JSON reader: merges its entries into the config, chooses the engine and collects the engine's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_lite.config.batch import SequenceRamp
from megatron_lite.config.deepspeed import write_settings
from megatron_lite.config.deepspeed_entries import ENGINE, NATIVE, Entries
from megatron_lite.config.deepspeed_values import (
    DEFAULT_SCALE_POWER,
    read_number,
    read_section,
    read_whole,
    refuse_contradiction,
    refuse_unknown,
    take_entry,
)
from megatron_lite.config.deepspeed_zero import choose_engine, merge_zero_stage, read_zero
from megatron_lite.config.flag import FIELD
from megatron_lite.config.given import Given
from megatron_lite.config.optimizer import Dtype, OptimizerKind
from megatron_lite.errors import ConfigError

FP16_KEYS = frozenset(
    {"enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"}
)
MAX_SCALE_POWER = 126
"""Largest exponent of two that is a loss scale in fp32."""


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
    entries = _read_settings(given) if given.has(FIELD.deepspeed.settings) else _read(given)
    if command.deepspeed and not given.has(FIELD.precision.scaler):
        given.give(FIELD.precision.scaler, "deepspeed", "--deepspeed")
    with _recorded_error(given):
        merge_zero_stage(entries, given)
        choose_engine(entries, given)
    engine = given.run.runtime.engine
    known = ENGINE if engine == "deepspeed" else NATIVE
    for key in entries:
        _note_entry(key, entries[key], known, given)
    for merge in (_precision, _clipping, _micro_batch, _optimizer, _curriculum):
        # Without --deepspeed or a file, the flags' values apply, not DeepSpeed's defaults.
        if command.deepspeed or command.deepspeed_config or merge is not _precision:
            with _recorded_error(given):
                merge(entries, given)
    if engine == "deepspeed":
        with _recorded_error(given):
            _global_batch(entries, given)
    with _recorded_error(given):
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
        given.refuse(
            f"{origin} holds a JSON {type(entries).__name__} instead of an object: {text[:40]!r}",
            fix=fix,
        )
        return {}
    return {key: value for key, value in entries.items() if value != "auto" and not key.startswith("_")}


def _note_entry(key: str, value: Any, known: Entries, given: Given) -> None:
    """Record why an entry is not merged."""
    if key in known.without_effect:
        given.notes.append(f"DeepSpeed JSON: {key} has no effect: {known.without_effect[key]}")
    elif key in known.refused:
        # A section that is switched off asks for nothing.
        if value and not (isinstance(value, dict) and value.get("enabled") is False):
            given.refuse(f'The "{key}" section of the DeepSpeed JSON is not supported', fix=known.refused[key])
    elif key not in known.merged and key not in known.passed:
        refuse_unknown(key, "", known.all, given)


def _precision(entries: dict[str, Any], given: Given) -> None:
    fp16 = read_section(entries, "fp16")
    bf16 = read_section(entries, "bf16" if "bf16" in entries else "bfloat16")
    _bf16_keys(bf16, given)
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
    scale = read_number(fp16.get("loss_scale", 0), "fp16.loss_scale")
    given.give(FIELD.precision.loss_scale, float(scale), f"fp16.loss_scale {scale} in the DeepSpeed JSON")
    if not fp16:
        return

    def entry(name: str, value: float) -> str:
        return f"fp16.{name} {value:g}{'' if name in fp16 else ', the default of DeepSpeed'}"

    power = read_number(fp16.get("initial_scale_power", DEFAULT_SCALE_POWER), "fp16.initial_scale_power")
    if abs(power) > MAX_SCALE_POWER:
        given.refuse(
            f"fp16.initial_scale_power in the DeepSpeed JSON is {power:g}, an initial loss scale of 2^{power:g}, "
            "beyond "
            "the range of fp32",
            fix=f"Write a number from -{MAX_SCALE_POWER} to {MAX_SCALE_POWER}, or remove the entry for DeepSpeed's "
            f"default {DEFAULT_SCALE_POWER}",
        )
        return
    take_entry(given, FIELD.precision.initial_loss_scale, 2.0**power, entry("initial_scale_power", power))
    window = read_whole(fp16.get("loss_scale_window", 1000), "fp16.loss_scale_window")
    take_entry(given, FIELD.precision.loss_scale_window, window, entry("loss_scale_window", window))
    hysteresis = read_whole(fp16.get("hysteresis", 2), "fp16.hysteresis")
    take_entry(given, FIELD.precision.hysteresis, hysteresis, entry("hysteresis", hysteresis))
    least = float(read_number(fp16.get("min_loss_scale", 1.0), "fp16.min_loss_scale"))
    take_entry(given, FIELD.precision.min_loss_scale, least, entry("min_loss_scale", least))
    for name in sorted(name for name in fp16.keys() - FP16_KEYS if fp16[name] is not False):
        refuse_unknown(name, "fp16.", FP16_KEYS, given)


def _bf16_keys(bf16: dict[str, Any], given: Given) -> None:
    """Refuse entries of the section bf16 that change how bf16 is trained."""
    for name in sorted(name for name in bf16.keys() - {"enabled"} if bf16[name] is not False):
        if name == "immediate_grad_update":
            given.notes.append("DeepSpeed JSON: bf16.immediate_grad_update has no effect: gradients are added in fp32")
        else:
            refuse_unknown(name, "bf16.", ["enabled", "immediate_grad_update"], given)


def _clipping(entries: dict[str, Any], given: Given) -> None:
    if "gradient_clipping" in entries:
        value = float(read_number(entries["gradient_clipping"], "gradient_clipping"))
        take_entry(given, FIELD.optimizer.clip_grad, value, f"gradient_clipping {value}")


def _global_batch(entries: dict[str, Any], given: Given) -> None:
    """Take the sizes of a batch; the native engine leaves them to --global-batch-size and its ramp-up."""
    if "train_batch_size" in entries:
        size = read_whole(entries["train_batch_size"], "train_batch_size")
        take_entry(given, FIELD.batch.global_batch_size, size, f"train_batch_size {size}")
    if "gradient_accumulation_steps" in entries:
        steps = read_whole(entries["gradient_accumulation_steps"], "gradient_accumulation_steps")
        take_entry(given, FIELD.command.accumulation_steps, steps, f"gradient_accumulation_steps {steps}")


OPTIMIZERS: dict[str, OptimizerKind] = {"adam": "adam", "adamw": "adam", "sgd": "sgd"}
"""--optimizer by the optimizer's type in the JSON. DeepSpeed's Adam decouples weight decay, too, by default."""


def _optimizer(entries: dict[str, Any], given: Given) -> None:
    """Take the optimizer and its parameters."""
    optimizer = read_section(entries, "optimizer")
    if not optimizer:
        return
    name = str(optimizer.get("type", ""))
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        given.refuse(
            f'optimizer.type in the DeepSpeed JSON is "{name}"',
            fix="Write Adam, AdamW or SGD, or remove the section and use --optimizer, --lr and --weight-decay",
        )
        return
    take_entry(given, FIELD.optimizer.kind, kind, f"optimizer.type {name}")
    parameters, prefix = read_section(optimizer, "params"), "optimizer.params."
    fields: dict[str, float] = {"lr": FIELD.lr.lr, "weight_decay": FIELD.optimizer.weight_decay}
    fields |= {"eps": FIELD.optimizer.adam_eps} if kind == "adam" else {"momentum": FIELD.optimizer.sgd_momentum}
    for entry, field in fields.items():
        if entry in parameters:
            value = float(read_number(parameters[entry], prefix + entry))
            take_entry(given, field, value, f"{prefix}{entry} {value:g}")
    betas = parameters.get("betas")
    if betas is not None and kind == "adam":
        if not isinstance(betas, list) or len(betas) != 2:
            raise ConfigError(
                f"{prefix}betas in the DeepSpeed JSON is {betas!r}",
                fix='Write two numbers, such as "betas": [0.9, 0.95]',
            )
        for field, beta in zip((FIELD.optimizer.adam_beta1, FIELD.optimizer.adam_beta2), betas, strict=True):
            value = float(read_number(beta, f"{prefix}betas"))
            take_entry(given, field, value, f"{prefix}betas {value:g}")
    fixed = {"torch_adam": None, "adam_w_mode": True, "bias_correction": True, "amsgrad": False, "nesterov": False}
    for entry in parameters.keys() - fields.keys() - ({"betas"} if kind == "adam" else set()):
        if entry not in fixed:
            refuse_unknown(entry, prefix, [*fields, "betas", *fixed], given)
        elif fixed[entry] is not None and parameters[entry] is not fixed[entry]:
            given.refuse(
                f"{prefix}{entry} in the DeepSpeed JSON is {json.dumps(parameters[entry])}, and the optimizer here has "
                f"{json.dumps(fixed[entry])}",
                fix=f'Write "{entry}": {json.dumps(fixed[entry])}, or remove the entry',
            )


def _micro_batch(entries: dict[str, Any], given: Given) -> None:
    if "train_micro_batch_size_per_gpu" in entries:
        size = read_whole(entries["train_micro_batch_size_per_gpu"], "train_micro_batch_size_per_gpu")
        take_entry(given, FIELD.batch.micro_batch_size, size, f"train_micro_batch_size_per_gpu {size}")


def _curriculum(entries: dict[str, Any], given: Given) -> None:
    curriculum = read_section(entries, "curriculum_learning")
    if not curriculum.get("enabled"):
        return
    schedule, kind = read_section(curriculum, "schedule_config"), curriculum.get("schedule_type", "fixed_linear")
    if curriculum.get("curriculum_type", "seqlen") != "seqlen" or kind not in ("fixed_linear", "fixed_discrete"):
        given.refuse(
            "curriculum_learning in the DeepSpeed JSON has curriculum_type "
            f"{curriculum.get('curriculum_type', 'seqlen')} "
            f"and schedule_type {kind}; this combination is not supported",
            fix="Use curriculum_type seqlen with schedule_type fixed_linear or fixed_discrete",
        )
        return
    length = given.run.batch.seq_length
    longest = read_whole(curriculum.get("max_difficulty", length), "curriculum_learning.max_difficulty")
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
    step = schedule.get("difficulty_step", SequenceRamp().step)
    return SequenceRamp(
        start=read_whole(curriculum.get("min_difficulty", 0), "curriculum_learning.min_difficulty"),
        iterations=read_whole(
            schedule.get("total_curriculum_step"), "curriculum_learning.schedule_config.total_curriculum_step"
        ),
        step=read_whole(step, "curriculum_learning.schedule_config.difficulty_step"),
    )


def _staged(schedule: dict[str, Any]) -> SequenceRamp:
    """Read fixed_discrete: difficulty[i] applies up to iteration max_step[i], the last one to the end."""
    lengths, ends = schedule.get("difficulty"), schedule.get("max_step")
    if not isinstance(lengths, list) or not isinstance(ends, list) or len(lengths) != len(ends) + 1:
        raise ConfigError(
            f"curriculum_learning in the DeepSpeed JSON has difficulty {lengths} and max_step {ends}",
            rule="schedule_type fixed_discrete needs a list of lengths, and a list of the iterations at which all but "
            "the "
            "last of them end",
            fix='Write schedule_config like {"difficulty": [64, 128, 2048], "max_step": [1000, 5000]}',
        )
    firsts = [0, *(read_whole(end, "curriculum_learning.schedule_config.max_step") + 1 for end in ends)]
    sizes = [read_whole(length, "curriculum_learning.schedule_config.difficulty") for length in lengths]
    return SequenceRamp(stages=tuple(zip(firsts, sizes, strict=True)))
