"""Validation rules for parallel sizes, pipeline partition, recomputation and timeouts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_lite.config.checks.bounds import at_least, divisors, nearest_multiples
from megatron_lite.config.partition import num_stages
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def sizes_are_positive(config: RunConfig) -> Iterator[ConfigError]:
    """Yield sizes without which nothing else can be judged."""
    parallel = config.parallel
    yield from at_least(
        1,
        world_size=parallel.world_size,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        bucket_megabytes=parallel.bucket_megabytes,
        recompute_num_layers=config.recompute.num_layers,
    )
    yield from at_least(
        0,
        num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_stage,
        decoder_first_pipeline_num_layers=parallel.first_stage_layers,
        decoder_last_pipeline_num_layers=parallel.last_stage_layers,
    )


def replicas_fill_the_world(config: RunConfig) -> Iterator[ConfigError]:
    """The world is whole replicas of tp x pp ranks."""
    parallel = config.parallel
    replica = parallel.tp * parallel.pp
    if parallel.world_size % replica:
        yield ConfigError(
            "Tensor x pipeline parallel size must divide the world size",
            found=f"world size {parallel.world_size}, --tensor-model-parallel-size {parallel.tp} x "
            f"--pipeline-model-parallel-size {parallel.pp} = {replica}",
            fix=f"Start a multiple of {replica} ranks (--world-size, if no launcher does), or change the sizes",
        )


def tensor_parallel_divides(config: RunConfig) -> Iterator[ConfigError]:
    """Heads, groups, MLP and vocabulary are cut into equal parts."""
    model, tp = config.model, config.parallel.tp
    for flag, size in (
        ("--num-attention-heads", model.num_attention_heads),
        ("--num-query-groups", model.num_query_groups),
        ("--ffn-hidden-size", model.ffn_hidden_size),
        ("--pad-vocab-size-to", model.padded_vocab_size),
    ):
        if size % tp:
            yield ConfigError(
                f"The tensor-parallel size must divide {flag}",
                found=f"{flag} {size}, --tensor-model-parallel-size {tp}",
                fix=f"Give --tensor-model-parallel-size {divisors(size)}, or {flag} {nearest_multiples(size, tp)}",
            )


def sequence_parallel_divides(config: RunConfig) -> Iterator[ConfigError]:
    """The sequence is cut into equal parts."""
    tp, length = config.parallel.tp, config.batch.seq_length
    if config.parallel.sequence_parallel and length % tp:
        yield ConfigError(
            "The tensor-parallel size must divide the sequence under --sequence-parallel",
            found=f"--seq-length {length}, --tensor-model-parallel-size {tp}",
            fix=f"Give --seq-length {nearest_multiples(length, tp)}, or leave --sequence-parallel out",
        )


def stages_have_layers(config: RunConfig) -> Iterator[ConfigError]:
    """Every stage has a layer at least."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = num_stages(config.model, parallel)
    if stages > layers:
        yield ConfigError(
            "Every pipeline stage holds a layer",
            found=f"--num-layers {layers}, {stages} stages",
            fix=f"Give --pipeline-model-parallel-size {layers * parallel.pp // stages} or less, or more layers",
        )


def virtual_stages_are_whole(config: RunConfig) -> Iterator[ConfigError]:
    """Interleaving deals equal chunks to every rank, at least two each."""
    parallel, layers = config.parallel, config.model.num_layers
    chunk = parallel.num_layers_per_virtual_stage
    interleaved = parallel.pipeline_schedule == "interleaved"
    if interleaved and not chunk:
        yield ConfigError(
            "The interleaved schedule needs the size of a chunk",
            found="--pipeline-schedule interleaved",
            fix="Give --num-layers-per-virtual-pipeline-stage N: a rank then holds several chunks of N layers each",
        )
    if not chunk:
        return
    if not interleaved:
        yield ConfigError(
            "Only the interleaved schedule has chunks of a chosen size",
            found=f"--num-layers-per-virtual-pipeline-stage {chunk}, --pipeline-schedule {parallel.pipeline_schedule}",
            fix="Give --pipeline-schedule interleaved, or leave --num-layers-per-virtual-pipeline-stage out",
        )
    if parallel.pp < 2:
        yield ConfigError(
            "Interleaving needs a pipeline",
            found=f"--num-layers-per-virtual-pipeline-stage {chunk}, --pipeline-model-parallel-size {parallel.pp}",
            fix="Leave --num-layers-per-virtual-pipeline-stage out",
        )
    if layers % (chunk * parallel.pp):
        yield ConfigError(
            "Every rank holds equally many chunks of equally many layers",
            found=f"--num-layers {layers}, {parallel.pp} stages, --num-layers-per-virtual-pipeline-stage {chunk}",
            fix=f"Give --num-layers-per-virtual-pipeline-stage {divisors(layers // parallel.pp)}"
            if layers % parallel.pp == 0
            else f"Give --num-layers {nearest_multiples(layers, parallel.pp)}, or another pipeline size",
        )


def partition_is_known(config: RunConfig) -> Iterator[ConfigError]:
    """--pp-partition-method is one of ours or a regular expression that matches layers."""
    method = config.parallel.partition_method
    if method in ("balanced", "uniform", "parameters"):
        return
    kind, _, pattern = method.partition(":")
    try:
        if kind.lower() == "type" and pattern and re.compile(pattern):
            return
    except re.error:
        pass
    yield ConfigError(
        "--pp-partition-method is balanced, uniform, parameters or type:<regular expression>",
        found=f"--pp-partition-method {method}",
        fix="Give one of these, as type:transformer|embedding (in quotes for the shell)",
    )


def given_ends_fit(config: RunConfig) -> Iterator[ConfigError]:
    """Layers of the first and last stage leave one at least for each other stage."""
    parallel, layers = config.parallel, config.model.num_layers
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    if not first and not last:
        return
    found = f"--decoder-first-pipeline-num-layers {first}, --decoder-last-pipeline-num-layers {last}"
    if parallel.pipeline_schedule == "interleaved" or parallel.pp < 2:
        yield ConfigError(
            "The ends of a pipeline can be sized if it has two stages at least and no virtual ones",
            found=f"{found}, --pipeline-model-parallel-size {parallel.pp}",
            fix="Leave them out: layers are then shared out by --pp-partition-method",
        )
        return
    others = num_stages(config.model, parallel) - (first > 0) - (last > 0)
    rest = layers - first - last
    if rest < others or (not others and rest):
        yield ConfigError(
            "The stages between the ends need a layer each, and all layers a stage",
            found=f"{found}, --num-layers {layers}, {others} other stages",
            fix=f"Give the ends at most {layers - others} layers in all: {others} other stages need one each"
            if others
            else f"Give the two flags numbers that add up to {layers}",
        )


def recompute_fits(config: RunConfig) -> Iterator[ConfigError]:
    """A recomputed unit is not larger than the model."""
    recompute, layers = config.recompute, config.model.num_layers
    if recompute.granularity == "full" and recompute.num_layers > layers:
        yield ConfigError(
            "No more layers can be recomputed than there are",
            found=f"--recompute-num-layers {recompute.num_layers}, --num-layers {layers}",
            fix=f"Give --recompute-num-layers 1 to {layers}",
        )


def timeouts_are_positive(config: RunConfig) -> Iterator[ConfigError]:
    """Time-outs are longer than nothing."""
    for flag, minutes in (
        ("--distributed-timeout-minutes", config.parallel.distributed_timeout_minutes),
        ("--rendezvous-timeout-minutes", config.parallel.rendezvous_timeout_minutes),
    ):
        if minutes <= 0:
            fix = f"Give {flag} a number of minutes above 0, such as 10"
            yield ConfigError(f"{flag} is positive", found=f"{flag} {minutes:g}", fix=fix)


RULES = (
    replicas_fill_the_world,
    tensor_parallel_divides,
    sequence_parallel_divides,
    stages_have_layers,
    virtual_stages_are_whole,
    partition_is_known,
    given_ends_fit,
    recompute_fits,
    timeouts_are_positive,
)
