"""Pipeline partition: assigns layers to stages by work, evenly, or by DeepSpeed's type:regex method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lite.config.counts import embedding_parameters, head_forward_flops, layer_forward_flops, layer_parameters

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig
    from megatron_lite.config.parallel import ParallelConfig

LAYER_CLASS = "ParallelTransformerLayerPipe"
EMBEDDING_CLASS = "EmbeddingPipe"
"""Megatron-DeepSpeed's names, which type:regex is matched against."""


def num_stages(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the number of stages, over all chunks of all pipeline ranks."""
    if parallel.pipeline_schedule == "zb-v":
        return 2 * parallel.pp
    if parallel.num_layers_per_virtual_stage:
        return max(parallel.pp, model.num_layers // parallel.num_layers_per_virtual_stage)
    return parallel.pp


def stage_layers(model: ModelConfig, parallel: ParallelConfig, seq_length: int = 0) -> tuple[range, ...]:
    """Return the layers of every stage, in the model's order.

    Args:
        model: its layers, and the work of a layer and of the head.
        parallel: the stages and --pp-partition-method.
        seq_length: for the work of attention; 0: max_position_embeddings.
    """
    stages, layers = num_stages(model, parallel), model.num_layers
    if parallel.num_layers_per_virtual_stage:
        return _ranges([parallel.num_layers_per_virtual_stage] * stages)
    if parallel.first_stage_layers or parallel.last_stage_layers:
        return _ranges(_with_given_ends(layers, stages, parallel.first_stage_layers, parallel.last_stage_layers))
    method = parallel.partition_method
    if method == "uniform" or stages == 1:
        return _ranges(_even(layers, stages))
    if method == "balanced":
        work = layer_forward_flops(model, seq_length or model.max_position_embeddings)
        return _ranges(_balanced(layers, stages, head_forward_flops(model) / work))
    if method == "parameters":
        rows = model.vocab_rows
        ends = embedding_parameters(model, rows)
        return _by_weight([ends, *[sum(layer_parameters(model).values())] * layers, ends], stages)
    pattern = method.partition(":")[2]
    weights = [
        int(re.search(pattern, name, re.IGNORECASE) is not None)
        for name in [EMBEDDING_CLASS, *[LAYER_CLASS] * layers, EMBEDDING_CLASS]
    ]
    return _by_weight(weights, stages)


def _ranges(counts: Sequence[int]) -> tuple[range, ...]:
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def _even(layers: int, stages: int) -> list[int]:
    """Return an even split, with the remainder in the middle: the ends also compute embedding and head."""
    each, rest = divmod(layers, stages)
    first = (stages - rest + 1) // 2
    return [each + (first <= stage < first + rest) for stage in range(stages)]


def _balanced(layers: int, stages: int, head: float) -> list[int]:
    """Return the split with the fastest slowest stage; the head counts as `head` layers. Every stage has a layer."""
    last = min(
        range(layers - stages + 1, 0, -1),
        key=lambda count: max(count + head, -(-(layers - count) // (stages - 1))),
    )
    return [*_even(layers - last, stages - 1), last]


def _with_given_ends(layers: int, stages: int, first: int, last: int) -> list[int]:
    ends = (first > 0) + (last > 0)
    middle = _even(layers - first - last, stages - ends) if stages > ends else []
    return [*([first] if first else []), *middle, *([last] if last else [])]


def _by_weight(weights: Sequence[int], stages: int) -> tuple[range, ...]:
    """Apply DeepSpeed's partition_balanced to embedding, layers and head: fill stages up to the least bottleneck.

    Unlike in DeepSpeed, no stage remains without a layer if there are enough.
    """
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(weights, middle)) <= stages else (middle + 1, high)
    counts = _fill(weights, low)
    counts += [0] * (stages - len(counts))
    layers = [count - (stage == 0) - (stage == stages - 1) for stage, count in enumerate(counts)]
    if counts[-1] == 0:
        return _ranges(_even(len(weights) - 2, stages))
    for stage in range(stages - 1, 0, -1):
        if layers[stage] < 1:
            layers[stage - 1] -= 1 - layers[stage]
            layers[stage] = 1
    return _ranges(layers) if min(layers) > 0 else _ranges(_even(len(weights) - 2, stages))


def _fill(weights: Sequence[int], bottleneck: int) -> list[int]:
    """Return the items of each part, if parts are filled in order up to `bottleneck`."""
    counts, load = [0], 0
    for weight in weights:
        if load + weight > bottleneck:
            counts.append(0)
            load = 0
        counts[-1] += 1
        load += weight
    return counts
