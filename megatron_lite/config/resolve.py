"""Resolves parsed options into RunConfig sections: derived defaults, DeepSpeed JSON, referenced files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from math import frexp
from typing import Any

from megatron_lite.config.checks.bounds import nearest_multiples
from megatron_lite.config.deepspeed_json import merge_deepspeed
from megatron_lite.config.flags.table import flags_by_field
from megatron_lite.config.given import SECTIONS, Given
from megatron_lite.config.run import RunConfig
from megatron_lite.config.structured import read_groups_file, read_save_schedule, read_sources, read_step_schedule


def resolve(given: Given, world_size: int | None) -> RunConfig | None:
    """Turn what was given into a RunConfig.

    Args:
        given: the flags' values; notes, warnings and errors are added to it.
        world_size: ranks that the launcher started; None: unknown.

    Returns:
        None if a required field is missing.
    """
    merge_deepspeed(given)
    _zero_stage(given)
    _world(given, world_size)
    _attention(given)
    _positions(given)
    _activation(given)
    _pipeline(given)
    _recompute(given)
    _compile(given)
    _saves(given)
    _files(given)
    _loss(given)
    if not _complete(given):
        return None
    _batch(given)
    sections = {
        name: cls(
            **{
                field.name: given.values[f"{name}.{field.name}"]
                for field in fields(cls)
                if given.has(f"{name}.{field.name}")
            }
        )
        for name, cls in SECTIONS.items()
    }
    return RunConfig(**sections)


def _complete(given: Given) -> bool:
    """Whether every field without a default was given."""
    missing = [
        flags_by_field()[f"{section}.{field.name}"][0].name
        for section, cls in SECTIONS.items()
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING and not given.has(f"{section}.{field.name}")
    ]
    if missing and not given.unreadable and not given.unknown:
        given.refuse(
            "A run needs the shape of its model and batch",
            found=f"no {', '.join(missing)}",
            fix=f"Add {' '.join(f'{flag} N' for flag in missing)}",
        )
    return not missing


def _zero_stage(given: Given) -> None:
    stage = given.value("command.zero_stage")
    if stage is None:
        return
    if stage not in (0, 1):
        given.refuse(
            "Optimizer state may be sharded over replicas, gradients and parameters may not",
            found=f"ZeRO stage {stage} ({given.origins['command.zero_stage']})",
            fix="Use --zero-stage 1, and more tensor or pipeline parallelism if memory is short",
        )
    elif stage == 1:
        given.give("parallel.distributed_optimizer", True, given.origins["command.zero_stage"])
        given.notes.append("ZeRO stage 1 is read as --use-distributed-optimizer")
    elif given.value("parallel.distributed_optimizer"):
        given.refuse(
            "ZeRO stage 0 is the optimizer without sharding",
            found=f"{given.origins['command.zero_stage']} and {given.origins['parallel.distributed_optimizer']}",
            fix="Leave one of them out",
        )


def _world(given: Given, launched: int | None) -> None:
    asked = given.value("parallel.world_size") if given.has("parallel.world_size") else None
    if launched is not None and asked is not None and asked != launched:
        given.refuse(
            "--world-size must be what the launcher started",
            found=f"--world-size {asked}, {launched} ranks started",
            fix="Leave --world-size out",
        )
    if asked is None and launched is None:
        size = max(1, given.value("parallel.tp")) * max(1, given.value("parallel.pp"))
        if size > 1:
            given.notes.append(f"the world size is not given: taken to be {size}, one replica (see --world-size)")
        launched = size
    if asked is None:
        given.give("parallel.world_size", launched, "the launcher")


def _attention(given: Given) -> None:
    """Megatron-LM reads --num-query-groups only under --group-query-attention, and has one group by default."""
    if given.value("command.group_query_attention"):
        if not given.has("model.num_query_groups"):
            given.give("model.num_query_groups", 1, "--group-query-attention")
    elif given.has("model.num_query_groups") and given.values["model.num_query_groups"] != given.value(
        "model.num_attention_heads"
    ):
        given.warnings.append(
            f"{given.origins['model.num_query_groups']} turns on grouped-query attention; Megatron-LM would ignore it "
            "without --group-query-attention"
        )


def _positions(given: Given) -> None:
    if given.value("command.no_position_embedding"):
        if not given.has("model.position_embedding"):
            given.give("model.position_embedding", "none", "--no-position-embedding")
        elif given.values["model.position_embedding"] == "learned":
            given.refuse(
                "Two flags must not contradict each other",
                found=f"--no-position-embedding and {given.origins['model.position_embedding']}",
                fix="Leave one of them out",
            )
        else:
            given.notes.append("--no-position-embedding has no effect: there is no learned table to leave out")
    table = given.value("model.position_embedding") == "learned"
    if table and not given.value("model.max_position_embeddings") and given.has("batch.seq_length"):
        given.give("model.max_position_embeddings", given.values["batch.seq_length"], "--seq-length")


def _activation(given: Given) -> None:
    """Megatron's fused GELU is the tanh approximation; --no-bias-gelu-fusion is the way to the exact one."""
    if given.value("command.erf_gelu"):
        if not given.has("model.activation"):
            given.give("model.activation", "gelu", "--no-bias-gelu-fusion")
            given.notes.append("--no-bias-gelu-fusion is read as --activation gelu")
        elif given.values["model.activation"] == "gelu_tanh":
            given.refuse(
                "Two flags must not contradict each other",
                found=f"--no-bias-gelu-fusion (the exact GELU) and {given.origins['model.activation']}",
                fix="Leave one of them out",
            )
        else:
            given.notes.append(f"--no-bias-gelu-fusion has no effect under {given.origins['model.activation']}")
    if not given.has("model.qkv_bias") and given.has("model.linear_bias"):
        given.give("model.qkv_bias", given.values["model.linear_bias"], given.origins["model.linear_bias"])


def _pipeline(given: Given) -> None:
    if given.has("parallel.partition_method"):
        given.values["parallel.partition_method"] = given.values["parallel.partition_method"].strip("'\"")
    chunks = given.value("command.virtual_stages")
    if chunks > 1:
        layers, stages = given.value("model.num_layers"), max(1, given.value("parallel.pp")) * chunks
        if layers % stages:
            given.refuse(
                "Every virtual stage holds equally many layers",
                found=f"{layers} layers, {stages} virtual stages ({given.origins['command.virtual_stages']})",
                fix=f"Give --num-layers {nearest_multiples(layers, stages)}, or another "
                "--num-virtual-stages-per-pipeline-rank",
            )
        else:
            given.give(
                "parallel.num_layers_per_virtual_stage", layers // stages, given.origins["command.virtual_stages"]
            )
    if given.value("parallel.num_layers_per_virtual_stage") and not given.has("parallel.pipeline_schedule"):
        given.give("parallel.pipeline_schedule", "interleaved", given.origins["parallel.num_layers_per_virtual_stage"])


def _recompute(given: Given) -> None:
    if given.value("recompute.granularity") == "none":
        for field in ("recompute.num_layers", "recompute.method"):
            if given.has(field):
                origin = given.origins[field]
                given.notes.append(
                    f"{origin} has no effect: nothing is recomputed without --recompute-granularity full"
                )


def _compile(given: Given) -> None:
    fields = ("model.attention_dropout", "model.hidden_dropout")
    dropped = [flags_by_field()[field][0].name for field in fields if given.value(field) > 0]
    if given.value("runtime.compile") and dropped:
        given.warnings.append(
            "--compile gains less with dropout, whose random numbers cut the compiled graph at each place: "
            f"{' and '.join(f'{flag} 0' for flag in dropped)} would leave it whole"
        )


def _saves(given: Given) -> None:
    interval = given.value("command.save_interval")
    if not given.has("command.save_interval"):
        return
    if interval < 1:
        given.refuse(
            "Checkpoints are an iteration apart at least",
            found=given.origins["command.save_interval"],
            fix="Give --save-interval a positive number, or leave --save out",
        )
        return
    phases = given.value("checkpoint.phases")
    if phases and not phases[-1].until and phases[-1].interval != interval:
        given.refuse(
            "--save-interval is the interval after the last range of --save-schedule",
            found=f"{given.origins['command.save_interval']} and {given.origins['checkpoint.phases']}",
            fix="Leave --save-interval out, or end the schedule's last range",
        )
    elif not phases or phases[-1].until:
        given.give(
            "checkpoint.phases", (*phases, *read_save_schedule(str(interval))), given.origins["command.save_interval"]
        )


def _files(given: Given) -> None:
    """Read the files that flags name. One that does not exist is only an error for a run, not for an explanation."""
    readers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "command.data_args_path": ("data.sources", lambda text: read_sources(text.split())),
        **{
            f"command.{split}_groups_path": (f"data.{split}_groups", read_groups_file)
            for split in ("train", "valid", "test")
        },
    }
    for option, (field, read) in readers.items():
        path = given.value(option)
        if not path:
            continue
        if given.has(field):
            given.refuse(
                "Two flags must not contradict each other",
                found=f"{given.origins[option]} and {given.origins[field]}",
                fix="Leave one of them out",
            )
            continue
        origin = given.origins[option]
        flag = flags_by_field()[option][0].name
        text = given.read_file(path, flag)
        if text is None:
            continue
        try:
            given.give(field, read(text), origin)
        except ValueError as error:
            given.refuse(f"{flag} names {error}", found=path, fix=f"Write {path} in that form")


def _loss(given: Given) -> None:
    if given.value("command.per_token_loss") and given.value("data.eod_mask_loss"):
        given.refuse(
            "Every sample counts the same in the loss, however many of its tokens do",
            found="--calculate-per-token-loss and --eod-mask-loss",
            fix="Leave one of them out",
        )
    scale = given.value("precision.loss_scale")
    if scale > 0 and frexp(scale)[0] != 0.5:
        given.warnings.append(
            f"{given.origins['precision.loss_scale']} is a constant loss scale and no power of 2, so scaling rounds; "
            "without it the scale is dynamic"
        )


def _batch(given: Given) -> None:
    """The final global batch: given, the last of --step-batch-size-schedule, or one micro-batch a replica."""
    ranks = max(1, given.value("parallel.tp")) * max(1, given.value("parallel.pp"))
    replicas = max(1, given.value("parallel.world_size") // ranks)
    _accumulation(given, replicas)
    text = given.value("command.step_batch_size_schedule")
    if text:
        origin = given.origins["command.step_batch_size_schedule"]
        try:
            schedule = read_step_schedule(text, given.value("batch.seq_length"))
        except ValueError as error:
            given.unreadable = True
            given.refuse(
                f"--step-batch-size-schedule takes {error}",
                found=origin,
                fix='Write it as --step-batch-size-schedule "TOKENS:BATCH …", as "0:16 2.4B:320 4.8B:624"',
            )
            return
        given.give("batch.step_schedule", schedule, origin)
        if not given.value("batch.global_batch_size"):
            given.give("batch.global_batch_size", schedule[-1][1], origin)
    if not given.value("batch.global_batch_size"):
        given.give("batch.global_batch_size", given.value("batch.micro_batch_size") * replicas, "--micro-batch-size")


def _accumulation(given: Given, replicas: int) -> None:
    """--gas counts the micro-batches of a replica in an iteration."""
    if not given.has("command.accumulation_steps"):
        return
    steps, micro = given.value("command.accumulation_steps"), given.value("batch.micro_batch_size")
    origin, size = given.origins["command.accumulation_steps"], steps * micro * replicas
    asked = given.value("batch.global_batch_size")
    if steps < 1:
        given.refuse("Gradients are accumulated over one step at least", found=origin, fix="Give --gas 1 or more")
    elif asked and asked != size:
        given.refuse(
            "The global batch is micro-batch x accumulation steps x data-parallel size",
            found=f"{given.origins['batch.global_batch_size']}, {micro} x {steps} x {replicas} = {size} by {origin}",
            fix=f"Leave {origin.split()[0]} out",
        )
    else:
        given.give("batch.global_batch_size", size, origin)
        given.notes.append(
            f"{origin} is read as --global-batch-size {size}: micro-batch {micro} x {steps} accumulation steps x "
            f"data-parallel size {replicas}"
        )
