"""From a run's configuration to the stage that this rank holds."""

from __future__ import annotations

import torch

from megatron_lite.config.run import RunConfig
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.random import RngStreams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_stage(
    config: RunConfig,
    mesh: Mesh,
    rng: RngStreams,
    layers: range | None = None,
    deferred: DeferredWeightGradients | None = None,
) -> GPTStage:
    """This rank's stage, initialised.

    Args:
        config: the run.
        mesh: this rank's groups and device.
        rng: dropout's streams.
        layers: the stage's layers, by their numbers in the whole model; None: all of them. The first stage is the
            one that has layer 0, the last the one that has the last layer.
        deferred: stores the operands of weight gradients; None: backward computes them.
    """
    model = config.model
    layers = range(model.num_layers) if layers is None else layers
    return GPTStage(
        model,
        layers=layers,
        has_embedding=layers.start == 0,
        has_head=layers.stop == model.num_layers,
        mesh=mesh,
        rng=rng,
        seed=config.runtime.seed,
        dtype=DTYPES[config.precision.dtype],
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.recompute,
        deferred=deferred,
    )
