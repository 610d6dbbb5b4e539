"""Validation of the pipeline's stages: layers of each stage, virtual stages, partition method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_lite.config.divisors import divisors, nearest_multiples
from megatron_lite.config.partition import num_stages
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig

PARTITION_METHODS = ("balanced", "uniform", "parameters")


def stages_have_layers(config: RunConfig) -> Iterator[ConfigError]:
    """Require at least one layer for every stage."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = num_stages(config.model, parallel)
    if stages > layers:
        yield ConfigError(
            f"Cannot split {layers} layers over {stages:,} pipeline stages (--num-layers {layers}, "
            f"--pipeline-model-parallel-size {parallel.pp})",
            fix=f"Use --pipeline-model-parallel-size {max(1, layers * parallel.pp // stages)} or less, or "
            f"--num-layers {stages} or more",
        )


def virtual_stages_are_whole(config: RunConfig) -> Iterator[ConfigError]:
    """Require equally many chunks for every rank under the interleaved schedule."""
    parallel, layers = config.parallel, config.model.num_layers
    chunk = parallel.num_layers_per_virtual_stage
    flag = f"--num-layers-per-virtual-pipeline-stage {chunk}"
    interleaved = parallel.pipeline_schedule == "interleaved"
    if interleaved and not chunk:
        yield ConfigError(
            "--pipeline-schedule interleaved is given without --num-layers-per-virtual-pipeline-stage",
            fix="Use --pipeline-schedule 1f1b: a pipeline of one stage (--pipeline-model-parallel-size 1) has no "
            "other schedule"
            if parallel.pp < 2
            else f"Add --num-layers-per-virtual-pipeline-stage N with N = {divisors(layers // parallel.pp)}: each "
            f"rank then holds {layers // parallel.pp} / N chunks of N layers"
            if layers % parallel.pp == 0
            else f"{layers} layers do not divide evenly over {parallel.pp} pipeline ranks: use --num-layers "
            f"{nearest_multiples(layers, parallel.pp)} and add --num-layers-per-virtual-pipeline-stage N, where N "
            "divides the layers of a rank, or use --pipeline-schedule 1f1b",
        )
    if not chunk:
        return
    if not interleaved:
        yield ConfigError(
            f"{flag} has no effect with --pipeline-schedule {parallel.pipeline_schedule}",
            fix="Use --pipeline-schedule interleaved, or remove --num-layers-per-virtual-pipeline-stage",
        )
    if parallel.pp < 2:
        yield ConfigError(
            f"{flag} has no effect with one pipeline stage (--pipeline-model-parallel-size {parallel.pp})",
            fix="Use --pipeline-model-parallel-size 2 or more, or remove --num-layers-per-virtual-pipeline-stage",
        )
    if layers % (chunk * parallel.pp):
        yield ConfigError(
            f"Cannot divide {layers} layers into chunks of {chunk} so that each of {parallel.pp} pipeline ranks has "
            f"equally many chunks (--num-layers {layers}, --pipeline-model-parallel-size {parallel.pp}, {flag})",
            fix=f"Use --num-layers-per-virtual-pipeline-stage {divisors(layers // parallel.pp)}"
            if layers % parallel.pp == 0
            else f"Use --num-layers {nearest_multiples(layers, chunk * parallel.pp)}"
            + (
                f", or --pipeline-model-parallel-size {layers // chunk}"
                if 2 * chunk <= layers and layers % chunk == 0
                else ""
            ),
        )


def partition_is_known(config: RunConfig) -> Iterator[ConfigError]:
    """Require a known --pp-partition-method, or a valid regular expression."""
    method = config.parallel.partition_method
    if method in PARTITION_METHODS:
        return
    kind, _, pattern = method.partition(":")
    fault = "is unknown"
    if kind.lower() == "type":
        fault = "has no regular expression after the colon"
        try:
            if pattern and re.compile(pattern):
                return
        except re.error as error:
            fault = f"has an invalid regular expression: {error}"
    yield ConfigError(
        f"--pp-partition-method {method} {fault}",
        fix="Use balanced, uniform, parameters, or, in quotation marks for the shell, 'type:REGEX' with a regular "
        "expression of layer names, for example 'type:transformer|embedding'",
    )


def given_ends_fit(config: RunConfig) -> Iterator[ConfigError]:
    """Require a layer for each stage between a sized first and last stage."""
    parallel, layers = config.parallel, config.model.num_layers
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    if not first and not last:
        return
    sizes = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    given = [flag for flag, size in sizes.items() if size]
    ends = ", ".join(f"{flag} {sizes[flag]}" for flag in given)
    if parallel.pp < 2:
        yield ConfigError(
            f"The only pipeline stage holds all layers, so that {ends} cannot apply (--pipeline-model-parallel-size "
            f"{parallel.pp})",
            fix=f"Use --pipeline-model-parallel-size 2 or more, or remove {' and '.join(given)}",
        )
        return
    if parallel.pipeline_schedule == "interleaved":
        yield ConfigError(
            f"{ends} cannot be combined with --pipeline-schedule interleaved",
            rule="All its stages have equally many layers",
            fix=f"Remove {' and '.join(given)}, or use --pipeline-schedule 1f1b and remove "
            "--num-layers-per-virtual-pipeline-stage",
        )
        return
    others = num_stages(config.model, parallel) - (first > 0) - (last > 0)
    rest = layers - first - last
    if rest < others or (not others and rest):
        yield ConfigError(
            f"Cannot assign {layers} layers to {others + len(given)} pipeline stages: the sizes given leave "
            f"{format_count(max(rest, 0), 'layer')} for {format_count(others, 'other stage')} ({ends}, "
            f"--num-layers {layers})",
            rule="Every stage needs a layer, and every layer a stage",
            fix=f"Give {' and '.join(given)} at most "
            f"{format_count(layers - others, 'layer')}{' in all' if len(given) > 1 else ''}"
            if others
            else f"Give the two flags numbers whose sum is {layers}",
        )


RULES = (
    stages_have_layers,
    virtual_stages_are_whole,
    partition_is_known,
    given_ends_fit,
)
