"""DeepSpeed JSON reader: merges precision, clipping, ZeRO stage and curriculum into the config, without DeepSpeed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from megatron_lite.config.batch import SequenceRamp
from megatron_lite.config.flag import FIELD, key_of
from megatron_lite.config.given import Given
from megatron_lite.config.optimizer import Dtype
from megatron_lite.config.values import MAX_NUMBER, shortened
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_number

T = TypeVar("T")

DEFAULT_SCALE_POWER = 16

WITHOUT_EFFECT = {
    "train_batch_size": "--global-batch-size and its ramp-up set it",
    "gradient_accumulation_steps": "it follows from --global-batch-size",
    "steps_per_print": "--log-interval sets it",
    "wall_clock_breakdown": "--timing-log-level sets it",
    "dump_state": "the config is in every checkpoint's manifest",
    "memory_breakdown": "--log-memory-to-tensorboard reports memory",
    "prescale_gradients": "gradients are summed in fp32 and divided once",
    "gradient_predivide_factor": "gradients are summed in fp32 and divided once",
    "communication_data_type": "gradients are summed in fp32",
    "zero_allow_untested_optimizer": "the optimizers here are tested with ZeRO-1",
    "zero_force_ds_cpu_optimizer": "nothing is offloaded",
    "elastic_checkpoint": "any layout reads any checkpoint",
    "checkpoint": "there is one checkpoint format",
    "load_universal": "any layout reads any checkpoint",
    "activation_checkpointing": "--checkpoint-activations sets it",
    "data_types": "gradients are summed in fp32",
    "flops_profiler": "the log always has FLOP/s",
    "tensorboard": "--tensorboard-dir sets it",
    "csv_monitor": "metrics.jsonl holds the same",
    "wandb": "metrics.jsonl holds the same",
    "comms_logger": "`megatron-lite rehearse` counts the bytes",
    "sparse_gradients": "gradients are dense",
    "disable_allgather": "ZeRO-1 always gathers parameters",
    "pipeline": "--pipeline-model-parallel-size sets it",
    "aio": "nothing is offloaded",
}
REFUSED = {
    "optimizer": "Remove the entry; use --optimizer, --lr and --weight-decay",
    "scheduler": "Remove the entry; use --lr-decay-style and --lr-warmup-iters",
    "amp": "Remove the entry; use --fp16 or --bf16",
    "sparse_attention": "Remove the entry: only dense attention is implemented",
    "compression_training": "Remove the entry",
    "data_efficiency": "Remove the entry; use curriculum_learning with curriculum_type seqlen",
    "progressive_layer_drop": "Remove the entry",
    "eigenvalue": "Remove the entry",
    "quantize_training": "Remove the entry",
    "hybrid_engine": "Remove the entry",
    "autotuning": "Remove the entry",
    "elasticity": "Remove the entry",
}
READ_HERE = (
    "fp16",
    "bf16",
    "bfloat16",
    "gradient_clipping",
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "curriculum_learning",
)
FP16_KEYS = frozenset(
    {"enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"}
)
MAX_SCALE_POWER = 126
"""Largest exponent of two that is a loss scale in fp32."""


def merge_deepspeed(given: Given) -> None:
    """Merge the JSON that --deepspeed_config names into `given`, with DeepSpeed's own precedence and defaults."""
    command = given.run.command
    if not command.deepspeed:
        if command.deepspeed_config:
            origin = given.origin(FIELD.command.deepspeed_config)
            given.refuse(
                f"{origin} has no effect without --deepspeed", fix="Add --deepspeed, or remove --deepspeed_config"
            )
        return
    if not given.has(FIELD.precision.scaler):
        given.give(FIELD.precision.scaler, "deepspeed", "--deepspeed")
    entries = _read(given)
    for key in entries:
        _note_entry(key, given)
    for merge in (_precision, _clipping, _zero, _micro_batch, _curriculum):
        with _recorded_error(given):
            merge(entries, given)


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
        return {}
    text = given.read_file(path, "--deepspeed_config")
    if text is None:
        return {}
    try:
        entries = json.loads(text)
    except RecursionError:
        fix = "Remove the excess brackets: a DeepSpeed configuration is at most a few levels deep"
        given.refuse(f"{path} (--deepspeed_config) is nested too deeply to be read as JSON", fix=fix)
        return {}
    except ValueError as error:
        given.refuse(
            f"{path} (--deepspeed_config) is not valid JSON: {error}",
            fix=f"Repair {path}: JSON has no comments, no comma after the last entry and no _ in numbers",
        )
        return {}
    if not isinstance(entries, dict):
        fix = 'Write, for example, {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}'
        given.refuse(
            f"{path} (--deepspeed_config) holds a JSON {type(entries).__name__} instead of an object: {text[:40]!r}",
            fix=fix,
        )
        return {}
    return {key: value for key, value in entries.items() if value != "auto" and not key.startswith("_")}


def _note_entry(key: str, given: Given) -> None:
    """Record why an entry is not merged."""
    if key in WITHOUT_EFFECT:
        given.notes.append(f"DeepSpeed JSON: {key} has no effect: {WITHOUT_EFFECT[key]}")
    elif key in REFUSED:
        given.refuse(f'The "{key}" section of the DeepSpeed JSON is not supported', fix=REFUSED[key])
    elif key not in READ_HERE:
        _refuse_unknown(key, "", [*READ_HERE, *WITHOUT_EFFECT, *REFUSED], given)


def _refuse_unknown(name: str, section: str, known: Iterable[str], given: Given) -> None:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    given.refuse(
        f"Unknown entry {section}{name} in the DeepSpeed JSON",
        fix=f"Did you mean {section}{nearest[0]}?" if nearest else "Remove the entry",
    )


def _section(entries: dict[str, Any], key: str) -> dict[str, Any]:
    section = entries.get(key, {})
    if not isinstance(section, dict):
        example = '"stage": 1' if key == "zero_optimization" else '"enabled": true'
        raise ConfigError(
            f"{key} in the DeepSpeed JSON is {section!r} instead of an object",
            fix=f'Write, for example, "{key}": {{{example}}}',
        )
    return {name: value for name, value in section.items() if value != "auto"}


_DEFAULTS = {
    "fp16.loss_scale": "0, a dynamic scale",
    "fp16.initial_scale_power": str(DEFAULT_SCALE_POWER),
    "fp16.loss_scale_window": "1000",
    "fp16.hysteresis": "2",
    "fp16.min_loss_scale": "1",
}
"""DeepSpeed's defaults; without one of the other entries, the flag of the command line applies."""


def _removed(key: str) -> str:
    """Return the advice to remove an entry, with what applies then."""
    default = _DEFAULTS.get(key)
    return "remove the entry for " + (f"DeepSpeed's default of {default}" if default else "the command line's value")


def _number(value: Any, key: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER:
        return value
    entry = key.rpartition(".")[2]
    if value is None:
        raise ConfigError(
            f"{key} is missing in the DeepSpeed JSON", fix=f'Add "{entry}" there with a number, such as 1000'
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ConfigError(
            f"{key} in the DeepSpeed JSON is {shortened(repr(value))}; the limit is {format_number(MAX_NUMBER)}",
            fix=f'Write a finite number within the limit, for example "{entry}": 1, or {_removed(key)}',
        )
    plain = str(value).replace("_", "").strip()
    if isinstance(value, str) and plain.replace(".", "", 1).isdigit():
        fix = f'Write it without quotes: "{entry}": {shortened(plain)}; or {_removed(key)}'
    else:
        fix = f'Write a number, for example "{entry}": 1, or {_removed(key)}'
    raise ConfigError(f"{key} in the DeepSpeed JSON is {shortened(json.dumps(value))} instead of a number", fix=fix)


def _whole(value: Any, key: str) -> int:
    number = _number(value, key)
    if number != int(number):
        raise ConfigError(
            f"{key} in the DeepSpeed JSON is {value!r} instead of a whole number",
            fix=f'Write a whole number, for example "{key.rpartition(".")[2]}": {max(1, int(number))}, or '
            + _removed(key),
        )
    return int(number)


def _contradiction(given: Given, origin: str, entry: str, fix: str) -> None:
    given.refuse(f"The command line and the DeepSpeed JSON contradict each other: {origin} and {entry}", fix=fix)


def _take(given: Given, field: T, value: T, entry: str) -> None:
    """Give a field the JSON's value, unless a flag contradicts it."""
    origin = given.origin(field)
    if origin and given.value_of(key_of(field)) != value:
        fix = f"Remove {origin.split()[0]}, or give the same value in the JSON"
        _contradiction(given, origin, entry, fix)
    else:
        given.give(field, value, f"{entry} in the DeepSpeed JSON")


def _precision(entries: dict[str, Any], given: Given) -> None:
    fp16 = _section(entries, "fp16")
    bf16 = _section(entries, "bf16" if "bf16" in entries else "bfloat16")
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
            _contradiction(given, origin, f"{enabled}.enabled true", fix)
        else:
            given.give(FIELD.precision.dtype, enabled, f"{enabled}.enabled in the DeepSpeed JSON")
    elif {"fp16": fp16, "bf16": bf16}.get(asked, {}).get("enabled") is False:
        fix = f"Remove {origin.split()[0]} to train in fp32, or set {asked}.enabled to true in the JSON"
        _contradiction(given, origin, f"{asked}.enabled false", fix)
    if scale_origin := given.origin(FIELD.precision.loss_scale):
        given.notes.append(
            f"{scale_origin} has no effect: with --deepspeed the JSON's fp16.loss_scale sets it (0: dynamic)"
        )
    scale = _number(fp16.get("loss_scale", 0), "fp16.loss_scale")
    given.give(FIELD.precision.loss_scale, float(scale), f"fp16.loss_scale {scale} in the DeepSpeed JSON")
    if not fp16:
        return

    def entry(name: str, value: float) -> str:
        return f"fp16.{name} {value:g}{'' if name in fp16 else ', the default of DeepSpeed'}"

    power = _number(fp16.get("initial_scale_power", DEFAULT_SCALE_POWER), "fp16.initial_scale_power")
    if abs(power) > MAX_SCALE_POWER:
        given.refuse(
            f"fp16.initial_scale_power in the DeepSpeed JSON is {power:g}, an initial loss scale of 2^{power:g}, "
            "beyond "
            "the range of fp32",
            fix=f"Write a number from -{MAX_SCALE_POWER} to {MAX_SCALE_POWER}, or remove the entry for DeepSpeed's "
            f"default {DEFAULT_SCALE_POWER}",
        )
        return
    _take(given, FIELD.precision.initial_loss_scale, 2.0**power, entry("initial_scale_power", power))
    window = _whole(fp16.get("loss_scale_window", 1000), "fp16.loss_scale_window")
    _take(given, FIELD.precision.loss_scale_window, window, entry("loss_scale_window", window))
    hysteresis = _whole(fp16.get("hysteresis", 2), "fp16.hysteresis")
    _take(given, FIELD.precision.hysteresis, hysteresis, entry("hysteresis", hysteresis))
    least = float(_number(fp16.get("min_loss_scale", 1.0), "fp16.min_loss_scale"))
    _take(given, FIELD.precision.min_loss_scale, least, entry("min_loss_scale", least))
    for name in sorted(name for name in fp16.keys() - FP16_KEYS if fp16[name] is not False):
        _refuse_unknown(name, "fp16.", FP16_KEYS, given)


def _clipping(entries: dict[str, Any], given: Given) -> None:
    if "gradient_clipping" in entries:
        value = float(_number(entries["gradient_clipping"], "gradient_clipping"))
        _take(given, FIELD.optimizer.clip_grad, value, f"gradient_clipping {value}")


def _zero(entries: dict[str, Any], given: Given) -> None:
    zero = _section(entries, "zero_optimization")
    for name in ("offload_optimizer", "offload_param", "cpu_offload"):
        device = zero.get(name)
        if device and not (isinstance(device, dict) and device.get("device") == "none"):
            given.refuse(
                f"zero_optimization.{name} in the DeepSpeed JSON is not supported: nothing is offloaded to the CPU",
                fix="Remove the entry; use --checkpoint-activations, or more ranks",
            )
    others = sorted(zero.keys() - {"stage", "offload_optimizer", "offload_param", "cpu_offload"})
    if others:
        given.notes.append(
            f"DeepSpeed JSON: zero_optimization.{{{','.join(others)}}} have no effect: buckets are sized by "
            "--bucket-megabytes"
        )
    if "stage" in zero:
        stage = _whole(zero["stage"], "zero_optimization.stage")
        _take(given, FIELD.command.zero_stage, stage, f"zero_optimization.stage {stage}")


def _micro_batch(entries: dict[str, Any], given: Given) -> None:
    if "train_micro_batch_size_per_gpu" in entries:
        size = _whole(entries["train_micro_batch_size_per_gpu"], "train_micro_batch_size_per_gpu")
        _take(given, FIELD.batch.micro_batch_size, size, f"train_micro_batch_size_per_gpu {size}")


def _curriculum(entries: dict[str, Any], given: Given) -> None:
    curriculum = _section(entries, "curriculum_learning")
    if not curriculum.get("enabled"):
        return
    schedule, kind = _section(curriculum, "schedule_config"), curriculum.get("schedule_type", "fixed_linear")
    if curriculum.get("curriculum_type", "seqlen") != "seqlen" or kind not in ("fixed_linear", "fixed_discrete"):
        given.refuse(
            "curriculum_learning in the DeepSpeed JSON has curriculum_type "
            f"{curriculum.get('curriculum_type', 'seqlen')} "
            f"and schedule_type {kind}; this combination is not supported",
            fix="Use curriculum_type seqlen with schedule_type fixed_linear or fixed_discrete",
        )
        return
    length = given.run.batch.seq_length
    longest = _whole(curriculum.get("max_difficulty", length), "curriculum_learning.max_difficulty")
    if length and longest != length:
        _contradiction(
            given,
            given.origin(FIELD.batch.seq_length),
            f"curriculum_learning.max_difficulty {longest}",
            fix=f"Set max_difficulty to {length} in the JSON, or use --seq-length {longest}",
        )
    ramp = _linear(curriculum, schedule) if kind == "fixed_linear" else _staged(schedule)
    _take(given, FIELD.batch.sequence_ramp, ramp, "curriculum_learning")


def _linear(curriculum: dict[str, Any], schedule: dict[str, Any]) -> SequenceRamp:
    step = schedule.get("difficulty_step", SequenceRamp().step)
    return SequenceRamp(
        start=_whole(curriculum.get("min_difficulty", 0), "curriculum_learning.min_difficulty"),
        iterations=_whole(
            schedule.get("total_curriculum_step"), "curriculum_learning.schedule_config.total_curriculum_step"
        ),
        step=_whole(step, "curriculum_learning.schedule_config.difficulty_step"),
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
    firsts = [0, *(_whole(end, "curriculum_learning.schedule_config.max_step") + 1 for end in ends)]
    sizes = [_whole(length, "curriculum_learning.schedule_config.difficulty") for length in lengths]
    return SequenceRamp(stages=tuple(zip(firsts, sizes, strict=True)))
