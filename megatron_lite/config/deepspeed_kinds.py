"""Types and ranges of the DeepSpeed JSON's entries, taken from the config classes of DeepSpeed 0.19."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_lite.config.values import MAX_NUMBER, shortened
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_number


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Values that an entry can have.

    Attributes:
        noun: of such a value, for errors.
        read: returns the value, converted; None: the value is not of this kind.
        example: such a value.
        without: flags that apply where the entry is missing; empty: none does; None: DeepSpeed's default, the example.
        nullable: whether null stands for a missing entry.
    """

    noun: str
    read: Callable[[Any], Any]
    example: Any = None
    without: str | None = None
    nullable: bool = False


def json_text(value: Any) -> str:
    """Return a value as JSON, shortened for messages."""
    return shortened(json.dumps(value))


def read_value(kind: Kind, key: str, value: Any) -> Any:
    """Return the value of an entry, converted to what DeepSpeed expects.

    Args:
        kind: of the entry.
        key: its name with those of its sections.
        value: from the JSON.

    Raises:
        ConfigError: it is not of this kind.
    """
    found = kind.read(value)
    if found is not None:
        return found
    entry, unquoted = f'"{key.rpartition(".")[2]}": ', _unquoted(value)
    removed = f", or remove the entry{f' to use {kind.without}' if kind.without else ''}" if kind.without != "" else ""
    if unquoted is not None and kind.read(unquoted) is not None:
        fix = f"Write it without quotes: {entry}{json.dumps(unquoted)}"
    elif isinstance(kind.example, bool):
        fix = f"Write {entry}true or false, without quotes"
    else:
        default = " (DeepSpeed's default)" if kind.without is None and not kind.nullable else ""
        fix = f"Write, for example, {entry}{json.dumps(kind.example)}{default}{removed}"
    noun = kind.noun
    if is_number(value) and abs(value) > MAX_NUMBER:
        noun = f"a number of at most {format_number(MAX_NUMBER)}"
    raise ConfigError(f"{key} in the DeepSpeed JSON is {json_text(value)} instead of {noun}", fix=fix)


def is_number(value: Any) -> bool:
    """Return True for a finite or infinite number; True and False are none."""
    # NaN differs from itself; math.isnan overflows for integers of more than 308 digits.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _unquoted(value: Any) -> Any:
    """Return the number, true or false that a string spells; None: it spells none."""
    if isinstance(value, str):
        try:
            return json.loads(value.replace("_", "").strip().lower())
        except ValueError:
            pass
    return None


def _number(
    example: float,
    without: str | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> Kind:
    """Return the kind of a number within bounds; a whole number may be written as 1e9."""
    bounds = [
        f"at least {format_number(least)}" if least is not None else "",
        f"more than {format_number(above)}" if above is not None else "",
        f"less than {format_number(below)}" if below is not None else "",
    ]
    text = f" of {' and '.join(filter(None, bounds))}" if any(bounds) else ""
    if least is not None and most is not None:
        text = f" from {format_number(least)} to {format_number(most)}"

    def read(value: Any) -> float | None:
        if not is_number(value) or abs(value) > max(most or 0, MAX_NUMBER) or (whole and value != int(value)):
            return None
        if (least is not None and value < least) or (above is not None and value <= above):
            return None
        if (most is not None and value > most) or (below is not None and value >= below):
            return None
        return int(value) if whole else float(value)

    noun = f"a {'whole ' if whole else ''}number{text}"
    return Kind(noun=noun, read=read, example=example, without=without)


def _whole(example: int, without: str | None = None, *, least: float | None = 0, most: float | None = None) -> Kind:
    return _number(example, without, least=least, most=most, whole=True)


def _switch(default: bool) -> Kind:
    """Return the kind of true or false."""
    return Kind(noun="true or false", read=lambda value: value if isinstance(value, bool) else None, example=default)


def _choice(*choices: str) -> Kind:
    """Return the kind of one of some strings, in upper or lower case, or null."""
    shown = [json.dumps(choice) for choice in choices]

    def read(value: Any) -> str | None:
        lower = value.lower() if isinstance(value, str) else ""
        return lower if lower in choices else None

    return Kind(noun=f"{', '.join(shown[:-1])} or {shown[-1]}", read=read, example=choices[0], nullable=True)


def _list(noun: str, item: Kind, example: list[Any], without: str | None = None, *, length: int | None = None) -> Kind:
    """Return the kind of a list."""

    def read(value: Any) -> list[Any] | None:
        if not isinstance(value, list) or length not in (None, len(value)):
            return None
        found = [item.read(part) for part in value]
        return None if None in found else found

    return Kind(noun=noun, read=read, example=example, without=without)


def _text(example: str | None = None) -> Kind:
    return Kind(
        noun="a string", read=lambda value: value if isinstance(value, str) else None, example=example, nullable=True
    )


SWITCH = _switch(False)
"""Kind of the former entries cpu_offload and cpu_offload_params."""
_BATCH = "--global-batch-size"
_BUCKET = 500_000_000
_MAX_SCALE_POWER = 126  # largest exponent of two that is a loss scale in fp32
_OFFLOADING = {
    "device": _choice("cpu", "nvme", "none"),
    "nvme_path": _text(),
    "pin_memory": _switch(True),
}
_LEAST_SEQUENCE = _whole(64, "", least=1)

SECTIONS: dict[str, dict[str, Kind]] = {
    "": {
        "gradient_clipping": _number(1.0, "--clip-grad", least=0),
        "train_batch_size": _whole(512, _BATCH, least=1),
        "gradient_accumulation_steps": _whole(8, _BATCH, least=1),
        "train_micro_batch_size_per_gpu": _whole(4, "--micro-batch-size", least=1),
        "communication_data_type": _choice("fp32", "bf16", "fp16"),
        "prescale_gradients": _switch(False),
        "gradient_predivide_factor": _number(1.0, above=0),
        "wall_clock_breakdown": _switch(False),
        "memory_breakdown": _switch(False),
        "disable_allgather": _switch(False),
        "zero_force_ds_cpu_optimizer": _switch(True),
    },
    "fp16": {
        "enabled": _switch(False),
        "loss_scale": _number(0, least=0),
        "initial_scale_power": _number(16, least=-_MAX_SCALE_POWER, most=_MAX_SCALE_POWER),
        "loss_scale_window": _whole(1000, least=1),
        "hysteresis": _whole(2, least=1),
        "min_loss_scale": _number(1.0, above=0),
    },
    "bf16": {"enabled": _switch(False)},
    "optimizer": {"type": _text("Adam")},
    "optimizer.params": {
        "lr": _number(0.0001, "--lr", least=0),
        "weight_decay": _number(0.1, "--weight-decay", least=0),
        "eps": _number(1e-8, "--adam-eps", above=0),
        "betas": _list(
            "two numbers of at least 0 and less than 1",
            _number(0.9, least=0, below=1),
            [0.9, 0.95],
            "--adam-beta1 and --adam-beta2",
            length=2,
        ),
        "momentum": _number(0.9, "--sgd-momentum", least=0, most=1),
        "torch_adam": _switch(False),
        "adam_w_mode": _switch(True),
        "bias_correction": _switch(True),
        "amsgrad": _switch(False),
        "nesterov": _switch(False),
    },
    "curriculum_learning": {
        "enabled": _switch(False),
        "curriculum_type": _text("seqlen"),
        "min_difficulty": _LEAST_SEQUENCE,
        "max_difficulty": _whole(2048, "--seq-length", least=1),
        "schedule_type": _text("fixed_linear"),
    },
    "curriculum_learning.schedule_config": {
        "total_curriculum_step": _whole(1000, "", least=1),
        "difficulty_step": _whole(8, "", least=1),
        "difficulty": _list("a list of whole numbers of at least 1", _LEAST_SEQUENCE, [64, 128, 2048], ""),
        "max_step": _list("a list of whole numbers of at least 1", _LEAST_SEQUENCE, [1000, 5000], ""),
    },
    "data_types": {"grad_accum_dtype": _choice("fp32", "bf16", "fp16")},
    "comms_logger": {
        "enabled": _switch(False),
        "verbose": _switch(False),
        "prof_all": _switch(True),
        "debug": _switch(False),
        "prof_ops": _list("a list of strings", _text(), []),
    },
    "aio": {
        "block_size": _whole(1048576, least=1),
        "queue_depth": _whole(8, least=1),
        "intra_op_parallelism": _whole(1, least=1),
        "single_submit": _switch(False),
        "overlap_events": _switch(True),
        "use_gds": _switch(False),
    },
    "zero_optimization": {
        "stage": _whole(1, "--zero-stage", most=3),
        "allgather_bucket_size": _whole(_BUCKET, least=2),
        "allgather_partitions": _switch(True),
        "contiguous_gradients": _switch(True),
        "enable_sanity_checks": _switch(False),
        "ignore_unused_parameters": _switch(True),
        "log_trace_cache_warnings": _switch(False),
        "memory_efficient_linear": _switch(True),
        "overlap_comm": replace(_switch(True), nullable=True),
        "override_module_apply": _switch(True),
        "parameter_alignment": _switch(False),
        "reduce_bucket_size": _whole(_BUCKET, least=1),
        "reduce_scatter": _switch(True),
        "round_robin_gradients": _switch(False),
        "stage3_allgather_sequential": _switch(False),
        "stage3_max_live_parameters": _whole(1_000_000_000),
        "stage3_max_reuse_distance": _whole(1_000_000_000),
        "stage3_model_persistence_threshold": _whole(2**63 - 1, most=2**63 - 1),
        "stage3_module_granularity_threshold": _whole(0),
        "stage3_param_persistence_threshold": _whole(100_000),
        "stage3_prefetch_bucket_size": _whole(50_000_000),
        "stage3_use_all_reduce_for_fetch_params": _switch(False),
        "sub_group_size": _whole(1_000_000_000),
        "use_multi_rank_bucket_allreduce": _switch(True),
    },
    "zero_optimization.offload_optimizer": {
        **_OFFLOADING,
        "buffer_count": _whole(4),
        "pipeline_read": _switch(False),
        "pipeline_write": _switch(False),
        "fast_init": _switch(False),
        "ratio": _number(1.0, least=0, most=1),
    },
    "zero_optimization.offload_param": {
        **_OFFLOADING,
        "buffer_count": _whole(5),
        "buffer_size": _whole(100_000_000),
        "max_in_cpu": _whole(1_000_000_000),
    },
}
"""Kinds of the entries of each section; a section within another is named with it. Without a name: the top level."""
