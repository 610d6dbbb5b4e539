"""A pipeline stage of the GPT: the embedding, some layers, the head, or all of them.

Letters: s sequence, b micro-batch, h hidden, V padded vocabulary, tp the group's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.model.attention import AttentionContext
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.embedding import Embedding
from megatron_lite.model.init import initialize
from megatron_lite.model.kv_cache import KVCache
from megatron_lite.model.layer import TransformerLayer, hidden_norm
from megatron_lite.model.positions import AttentionMask, Rotary
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter, vocabulary_parameter
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.recompute import recompute_units, run_units
from megatron_lite.parallel.tensor_parallel import column_parallel_linear

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
"""Global name of the table that a tied head shares with the embedding."""


class Decoder(nn.Module):
    """A stage's layers, under their numbers in the whole model, and after the last layer the final norm."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        sharding: Sharding,
        rng: RngStreams,
        recompute: RecomputeConfig,
        *,
        final_norm: bool,
    ) -> None:
        super().__init__()
        selective = recompute.granularity == "selective"
        self.layers = nn.ModuleDict(
            {str(layer): TransformerLayer(config, layer, sharding, rng, selective) for layer in layers}
        )
        self.final_norm = hidden_norm(config, sharding) if final_norm else None
        self.units = recompute_units(len(layers), recompute)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: [s/tp, b, h], both)."""
        layers = list(self.layers.values())
        if self.training and torch.is_grad_enabled():
            x = run_units(x, layers, self.units, context)
        else:
            for layer in layers:
                x = layer(x, context)
        return x if self.final_norm is None else self.final_norm(x)


class OutputLayer(nn.Module):
    """The head's own table [V/tp, h]: an untied head, or the last stage's copy of the tied one."""

    def __init__(self, config: ModelConfig, sharding: Sharding) -> None:
        super().__init__()
        self.weight = sharding.empty(config.padded_vocab_size // sharding.tp.size, config.hidden_size)


class GPTStage(nn.Module):
    """Consecutive layers of the GPT, with the embedding before them and the head behind where they belong here.

    Args:
        config: the model.
        layers: this stage's layers, by their numbers in the whole model.
        has_embedding: whether the stage starts from tokens.
        has_head: whether the stage ends in logits.
        mesh: this rank's groups and device.
        rng: dropout's streams.
        seed: the run's seed, for the first values.
        dtype: of the parameters.
        sequence_parallel: whether tp ranks split the sequence between the parallel layers.
        recompute: which activations are recomputed.
        deferred: stores the operands of weight gradients; None: backward computes them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range,
        has_embedding: bool,
        has_head: bool,
        mesh: Mesh,
        rng: RngStreams,
        seed: int,
        dtype: torch.dtype,
        sequence_parallel: bool = False,
        recompute: RecomputeConfig | None = None,
        deferred: DeferredWeightGradients | None = None,
    ) -> None:
        super().__init__()
        sharding = Sharding(mesh.tp, sequence_parallel, dtype, mesh.backend.device, deferred)
        self.config = config
        self.sharding = sharding
        self.layer_numbers = layers
        self.embedding = Embedding(config, sharding, rng) if has_embedding else None
        self.mask = AttentionMask(config, sharding)
        self.rotary = Rotary(config) if config.position_embedding == "rotary" else None
        self.decoder = Decoder(config, layers, sharding, rng, recompute or RecomputeConfig(), final_norm=has_head)
        self.has_head = has_head
        self.shares_head = has_head and has_embedding and config.tied_embeddings
        self.output_layer = OutputLayer(config, sharding) if has_head and not self.shares_head else None
        initialize(self.named_parameters_global(), config, seed)

    @property
    def units(self) -> list[nn.Module]:
        """Modules, in the order of forward, that read their parameters in their own forward and nowhere before it."""
        parts = [self.embedding, *self.decoder.layers.values(), self.decoder.final_norm]
        return [part for part in parts if part is not None]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Type of the hidden states that stages hand on."""
        return torch.float32 if self.config.fp32_residual else self.sharding.dtype

    def hidden_shape(self, length: int, batch_size: int) -> tuple[int, int, int]:
        """Shape of the hidden states that stages hand on: [s, b, h], sequence parallel [s/tp, b, h]."""
        split = self.sharding.tp.size if self.sharding.split_sequence else 1
        return length // split, batch_size, self.config.hidden_size

    def forward(self, x: Tensor | None, batch: MicroBatch, cache: KVCache | None = None) -> Tensor:
        """The stage's part of the forward pass.

        Args:
            x: hidden states [s, b, h] (sequence parallel: [s/tp, b, h]) of the stage before; None on the first,
                which reads batch.tokens.
            batch: the micro-batch.
            cache: keys and values of the tokens before these; they are appended to it.

        Returns:
            Hidden states shaped as x; behind the head, logits [s, b, V/tp].
        """
        start = 0 if cache is None else cache.length
        length = batch.tokens.shape[1]
        if self.embedding is not None:
            x = self.embedding(batch.tokens, start, batch.position_ids)
        assert x is not None, "a stage without the embedding is given hidden states"
        x = self.decoder(x, self._context(batch, cache, x.device))
        if cache is not None:
            cache.advance(length)
        if not self.has_head:
            return x
        sharding = self.sharding
        return column_parallel_linear(
            x, self._head_weight(), None, sharding.tp, sharding.split_sequence, sharding.deferred
        )

    def sample_losses(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Each sample's mean token loss, masked tokens left out.

        Summed and divided by the global batch by whoever steps, it is the same for any micro-batch size and layout. A
        sample whose tokens are all masked counts 0. The logits are consumed (see vocab_parallel_cross_entropy).

        Args:
            logits: [s, b, V/tp].
            batch: the labels [b, s], and their mask.

        Returns:
            [b], fp32, the same on every tp rank.
        """
        labels = batch.labels.t()
        losses = vocab_parallel_cross_entropy(logits, labels, self.config.vocab_size, self.sharding.tp)
        if batch.loss_mask is None:
            return losses.mean(0)
        mask = batch.loss_mask.t()
        return (losses * mask).sum(0) / mask.sum(0).clamp(min=1.0)

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Sum of sample_losses: a scalar."""
        return self.sample_losses(logits, batch).sum()

    def named_parameters_global(self) -> list[NamedParameter]:
        """The stage's parameters under their global names, in the order of the model. A shared head is listed once."""
        found: list[NamedParameter] = []
        for name, module in self.named_modules():
            if isinstance(module, OutputLayer):
                tied = self.config.tied_embeddings
                found.append(
                    vocabulary_parameter(
                        WORD_EMBEDDINGS if tied else f"{name}.weight",
                        module.weight,
                        self.config.vocab_size,
                        self.sharding.tp,
                        owned=not tied,
                    )
                )
            elif hasattr(module, "named"):
                found.extend(module.named(name))
        return found

    def share_table(self, first: GPTStage) -> None:
        """Makes this stage's copy of the tied table the very parameter of the stage that embeds, on the same rank."""
        assert self.output_layer is not None and first.embedding is not None and self.config.tied_embeddings
        self.output_layer.weight = first.embedding.word_embeddings.weight

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for this stage's layers; not under sequence parallelism, where one token cannot be split."""
        assert not self.sharding.split_sequence, "generate with a stage built without sequence parallelism"
        return KVCache(
            self.layer_numbers,
            max_length=max_length,
            batch_size=batch_size,
            heads=self.config.num_query_groups // self.sharding.tp.size,
            head_dim=self.config.head_dim,
            dtype=self.sharding.dtype,
            device=self.sharding.device,
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Makes forward go through torch.compile (whose arguments these are); the first call compiles."""
        super().compile(*args, **kwargs)

    def _context(self, batch: MicroBatch, cache: KVCache | None, device: torch.device) -> AttentionContext:
        """What the layers share: rotary tables, and who may look at whom, as documents or, for ALiBi's bias, a mask."""
        start, length = 0 if cache is None else cache.length, batch.tokens.shape[1]
        assert cache is None or batch.documents is None, "a cache holds one document a row"
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary.tables(length, start, batch.position_ids, device)
        documents = None if self.mask.slopes else batch.documents
        return AttentionContext(
            rotary=rotary,
            mask=self.mask(length, start, batch.document_ids if documents is None else None),
            documents=documents,
            cache=cache,
        )

    def _head_weight(self) -> nn.Parameter:
        if self.output_layer is not None:
            return self.output_layer.weight
        assert self.embedding is not None
        return self.embedding.word_embeddings.weight
