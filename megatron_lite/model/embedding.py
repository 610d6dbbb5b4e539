"""Embedding of the first stage: token embedding, optional norm (BLOOM), learned positions, projection, dropout.

Letters: s sequence (with context parallelism the part of a rank), b micro-batch, h hidden, E channels of a factorized
embedding (otherwise h), tp size of the tensor-parallel group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.norms import Norm
from megatron_lite.model.positions import LearnedPositions
from megatron_lite.parallel.layers import ReplicatedLinear, Sharding, VocabParallelEmbedding
from megatron_lite.parallel.random import RngStreams, layer_number

EMBEDDING_LAYER = -1
"""Layer number of the embedding in dropout streams."""


class Embedding(nn.Module):
    """Token embedding with optional learned positions, norm, projection and dropout.

    A factorized embedding (ALBERT, Lan et al. 2019, arXiv:1909.11942, section 3.1) has E channels, which a linear layer
    projects to h.

    Args:
        config: the model.
        sharding: of the stage.
        rng: dropout streams.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, rng: RngStreams) -> None:
        super().__init__()
        self.layer = layer_number(EMBEDDING_LAYER)
        self.rng = rng
        self.dropout = config.hidden_dropout
        self.split = sharding.split_sequence
        self.fp32_residual = config.fp32_residual
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, config.padded_vocab_size, config.embedding_width, sharding
        )
        self.position_embeddings = (
            LearnedPositions(config.max_position_embeddings, config.embedding_width, sharding)
            if config.position_embedding == "learned"
            else None
        )
        self.norm = (
            Norm(config.embedding_width, config, sharding, partial=sharding.split_sequence, kind="LayerNorm")
            if config.embed_layernorm
            else None
        )
        self.projection = (
            ReplicatedLinear(config.embedding_size, config.hidden_size, sharding, bias=config.linear_bias)
            if config.embedding_size
            else None
        )

    def forward(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """`tokens` [b, s] -> [s, b, h] (sequence parallel: [s/tp, b, h])."""
        x: Tensor = self.word_embeddings(tokens.t().contiguous())
        if self.norm is not None:
            x = self.norm(x)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(tokens.shape[1], position_ids)
        if self.projection is not None:
            x = self.projection(x)
        if self.fp32_residual:
            x = x.to(torch.float32)
        if self.dropout > 0 and self.training:
            x = self.rng.dropout(x, self.dropout, "embedding", self.layer, self.split)
        return x
