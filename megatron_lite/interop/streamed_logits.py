"""Low-memory evaluation: logits of a model whose weights are loaded one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_lite.backend.fake import FakeBackend
from megatron_lite.checkpoint.sources import TensorSource
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.model.positions import rank_slopes
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams


@torch.no_grad()
def streamed_logits(
    model: ModelConfig,
    source: TensorSource,
    tokens: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Return the logits of a model in fp32, holding one layer at a time.

    Args:
        model: the model.
        source: its weights under our names; they are converted to fp32.
        tokens: [b, s] int64.
        progress: called with the number of layers computed, and of all.

    Returns:
        [b, s, vocabulary].
    """
    model = _padded(model)
    batch = MicroBatch(tokens=tokens, labels=tokens)
    x = None
    for layer in range(model.num_layers):
        stage = _on_cpu(_empty_stage(model, range(layer, layer + 1)))
        for entry in stage.named_parameters_global():
            entry.param.zero_()  # the padding rows
            entry.local().copy_(source.read(entry.name, entry.rectangle))
        x = stage(x, batch) if stage.output_layer is None else stage.logits(x, batch)
        progress(layer + 1, model.num_layers)
    assert x is not None
    return x[..., : model.vocab_size].transpose(0, 1).contiguous()


def _padded(model: ModelConfig) -> ModelConfig:
    return model if model.padded_vocab_size else replace(model, padded_vocab_size=model.vocab_size)


def _empty_stage(model: ModelConfig, layers: range) -> GPTStage:
    """Return a stage on the meta device, in fp32."""
    backend = FakeBackend(0, 1)
    config = RunConfig(model=model, batch=BatchConfig(seq_length=1, micro_batch_size=1))
    return GPTStage(config, layers, build_mesh(backend, config.parallel), RngStreams(0, backend))


def _on_cpu(stage: GPTStage) -> GPTStage:
    """Return the stage with uninitialized parameters on the CPU; what was tied on the meta device is tied again."""
    stage = stage.to_empty(device="cpu").eval()
    if stage.mask.slopes is not None:  # a buffer, which on the meta device had no values
        stage.mask.slopes.copy_(torch.tensor(rank_slopes(stage.config, stage.sharding.tp)))
    if stage.output_layer is not None and stage.embedding is not None and stage.config.tied_embeddings:
        stage.output_layer.weight = stage.embedding.word_embeddings.weight
    return stage
