"""Memory of the model state: weights, gradients and optimizer state of one rank, without activations."""

from __future__ import annotations

from itertools import chain

from megatron_lite.config.counts import embedding_parameters, head_parameters, moment_bytes, stored_parameters
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig

GRADIENT_BYTES = 4
"""Bytes per parameter of the fp32 gradient buffer."""


def model_state_bytes(config: RunConfig) -> int:
    """Return the bytes of weights, gradients and optimizer state on the rank with the most of them.

    Norms and biases that tensor parallelism replicates are counted as split: they are below 0.1% of the model.
    Virtual stages are assigned to the ranks in turn.
    """
    model, parallel = config.model, config.parallel
    rows = model.padded_vocab_size or model.vocab_size
    stages = stage_layers(model, parallel, config.batch.seq_length)
    in_layers = [
        sum(stored_parameters(model, chain.from_iterable(stages[rank :: parallel.pp])).values())
        for rank in range(parallel.pp)
    ]
    parameters = list(in_layers)
    last = (len(stages) - 1) % parallel.pp
    parameters[0] += embedding_parameters(model, rows)
    parameters[last] += head_parameters(model, rows)
    if model.tied_embeddings and last:
        parameters[last] += rows * model.embedding_width
    return max(_state_bytes(config, *counts) for counts in zip(parameters, in_layers, strict=True))


def _state_bytes(config: RunConfig, parameters: int, in_layers: int) -> int:
    """Return the bytes on one of the tensor-parallel ranks that together hold this many parameters."""
    parallel, is_fp32 = config.parallel, config.precision.dtype == "fp32"
    state = moment_bytes(config.optimizer, parameters, in_layers)
    state += parameters * ((0 if is_fp32 else 4) + (4 if config.optimizer.ema_decay else 0))
    shards = parallel.tp * (parallel.dp * parallel.cp if parallel.distributed_optimizer else 1)
    return -(-parameters // parallel.tp) * ((4 if is_fp32 else 2) + GRADIENT_BYTES) + -(-state // shards)
