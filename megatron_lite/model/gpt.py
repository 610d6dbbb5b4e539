"""GPT pipeline stage: consecutive transformer layers, with the embedding on the first and the head on the last stage.

Letters: s sequence (with context parallelism the part of a rank), b micro-batch, h hidden, V padded vocabulary, tp size
of the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.backend.kernels import Kernels
from megatron_lite.config.recompute import recompute_units
from megatron_lite.config.run import RunConfig
from megatron_lite.config.sharing import PARTS, owner_layer, stored_name
from megatron_lite.model.attention import AttentionContext, CachedPass, KVCache
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.context_attention import ContextAttention, document_starts
from megatron_lite.model.embedding import Embedding
from megatron_lite.model.head import Head
from megatron_lite.model.init import initialize
from megatron_lite.model.layer import TransformerLayer, hidden_norm
from megatron_lite.model.positions import AttentionMask, RotaryEmbedding
from megatron_lite.parallel.context_parallel import chunk_positions, key_exchange, local_chunks
from megatron_lite.parallel.fp8 import DelayedScales, fp8_of
from megatron_lite.parallel.gemm import Accumulate, WeightGradients
from megatron_lite.parallel.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, Sharding
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.recompute import run_units
from megatron_lite.parallel.shared import merge_parameters, share_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Decoder(nn.Module):
    """Layers of a stage, keyed by their numbers in the whole model, and the final norm after the last layer.

    Layers that share parameters (config/sharing.py) are modules of their own, with the same tensors.
    """

    def __init__(self, run: RunConfig, layers: range, sharding: Sharding, rng: RngStreams) -> None:
        super().__init__()
        config = run.model
        selective = run.recompute.granularity == "selective"
        self.layers = nn.ModuleDict()
        owners: dict[tuple[str, int], nn.Module] = {}
        for layer in layers:
            of_layer = replace(sharding, fp8=fp8_of(run.fp8, layer, config.num_layers))
            built = TransformerLayer(config, layer, of_layer, rng, selective)
            self.layers[str(layer)] = built
            for part in PARTS:
                module = getattr(built, part)
                owner = owners.setdefault((part, owner_layer(config, part, layer)), module)
                if owner is not module:
                    share_parameters(module, owner)
        self.final_norm = hidden_norm(config, sharding) if layers.stop == config.num_layers else None
        self.units = recompute_units(len(layers), run.recompute)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])."""
        layers = list(self.layers.values())
        if self.training and torch.is_grad_enabled():
            x = run_units(x, layers, self.units, context)
        else:
            for layer in layers:
                x = layer(x, context)
        return x if self.final_norm is None else self.final_norm(x)


def compile_options(sharding: Sharding) -> dict[str, Any]:
    """Return the arguments with which torch.compile is called.

    Dropout's random numbers come from torch's kernels, whose seeds are set in the graph (parallel/random.py). Ranks
    that compute the same norms must not choose kernels by measuring them: with another order of summation on one of
    them, weights that should be equal would drift apart. Where torch has no such option (2.9), and for any other cause,
    --check-weight-hash-across-dp-replicas-interval finds the difference.
    """
    options = {"fallback_random": True}
    replicated = sharding.tp.size > 1 and not sharding.split_sequence
    if replicated and "deterministic" in torch._inductor.list_options():
        options["deterministic"] = True
    return {"options": options}


class GPTStage(nn.Module):
    """Consecutive layers of the GPT, initialized; all layers are the whole model.

    Args:
        config: the run's model, seed, precision, recomputation and sequence parallelism.
        layers: numbers of this stage's layers in the whole model. The stage with layer 0 has the embedding, the one
            with the last layer the head.
        mesh: of this rank.
        rng: dropout streams.
        deferred: takes the operands of weight gradients in backward; None: backward computes them.
        kernels: of norms, attention and loss; None: PyTorch's.
        device: of the parameters, which are not initialized; None: the backend's, initialized.
    """

    def __init__(
        self,
        config: RunConfig,
        layers: range,
        mesh: Mesh,
        rng: RngStreams,
        deferred: WeightGradients | None = None,
        kernels: Kernels | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        model, dtype = config.model, DTYPES[config.precision.dtype]
        sharding = Sharding(
            mesh.tp,
            config.parallel.sequence_parallel,
            dtype,
            mesh.backend,
            deferred,
            kernels=kernels or Kernels(),
            cp=mesh.cp,
            device=device,
        )
        self.config = model
        self.sharding = sharding
        self.exchange = key_exchange(config.parallel.cp_comm_type, mesh.cp)
        self.layer_numbers = layers
        self.embedding = Embedding(model, sharding, rng) if layers.start == 0 else None
        self.mask = AttentionMask(model, sharding)
        self.rotary = RotaryEmbedding(model) if model.position_embedding == "rotary" else None
        self.decoder = Decoder(config, layers, sharding, rng)
        self.output_projection: ReplicatedLinear | None = None
        self.output_layer: Head | None = None
        if layers.stop == model.num_layers:
            if model.embedding_size:
                self.output_projection = ReplicatedLinear(
                    model.hidden_size, model.embedding_size, sharding, bias=model.linear_bias
                )
            embedding = self.embedding if model.tied_embeddings else None
            table = None if embedding is None else embedding.word_embeddings.weight
            self.output_layer = Head(model, sharding, per_token=config.per_token_loss, table=table)
        if device is None:
            initialize(self.named_parameters_global(), model, config.runtime.seed, mesh.backend)

    @property
    def units(self) -> list[nn.Module]:
        """Return the modules that read their parameters in their own forward only, in the order of forward."""
        parts = [self.embedding, *self.decoder.layers.values(), self.decoder.final_norm, self.output_projection]
        return [part for part in parts if part is not None]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Return the dtype of hidden states between stages."""
        return torch.float32 if self.config.fp32_residual else self.sharding.dtype

    def hidden_shape(self, length: int, batch_size: int) -> tuple[int, int, int]:
        """Return the shape of hidden states between stages: [s, b, h], sequence parallel [s/tp, b, h].

        Under context parallelism s is the part of a rank, length / cp.
        """
        split = self.sharding.tp.size if self.sharding.split_sequence else 1
        return length // self.sharding.cp.size // split, batch_size, self.config.hidden_size

    def forward(self, x: Tensor | None, batch: MicroBatch, cache: CachedPass | None = None) -> Tensor:
        """Run the stage's part of the forward pass.

        Args:
            x: hidden states [s, b, h] (sequence parallel: [s/tp, b, h]) of the stage before; None on the first stage,
                which reads batch.tokens.
            batch: the micro-batch, with whole samples; of these, a context-parallel rank computes its chunks.
            cache: stores the keys and values of these tokens, and has those of the tokens before; batch.position_ids
                are its positions.

        Returns:
            Hidden states shaped like x; from the last stage those that the head projects to logits, with as many
            channels as the embedding.
        """
        positions = self._positions(batch)
        if self.embedding is not None:
            assert batch.tokens is not None, "the first stage reads tokens"
            x = self.embedding(local_chunks(batch.tokens, self.sharding.cp, 1), positions)
        assert x is not None, "a stage without the embedding needs hidden states"
        hidden: Tensor = self.decoder(x, self._context(batch, cache, positions, x.device))
        return hidden if self.output_projection is None else self.output_projection(hidden)

    def logits(self, x: Tensor | None, batch: MicroBatch, cache: CachedPass | None = None) -> Tensor:
        """Run the last stage and the head; return logits [s, b, V/tp]. Arguments as for forward."""
        assert self.output_layer is not None, "only the last stage has the head"
        logits: Tensor = self.output_layer(self(x, batch, cache))
        return logits

    def sample_losses(
        self, x: Tensor, batch: MicroBatch, gradient_scale: Tensor | float = 1.0, accumulate: Accumulate | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted loss of each sample, [b] fp32, and the gradient of the last stage's output `x`.

        Arguments as for Head.sample_losses.
        """
        assert self.output_layer is not None, "only the last stage computes the loss"
        return self.output_layer.sample_losses(x, batch, gradient_scale, accumulate)

    def sample_weights(self, batch: MicroBatch) -> Tensor | None:
        """Return the weight of each sample in the mean loss, [b] fp32; None: 1 each."""
        assert self.output_layer is not None, "only the last stage computes the loss"
        return self.output_layer.sample_weights(batch)

    def named_parameters_global(self) -> list[NamedParameter]:
        """Return the stage's parameters with their global names, each tensor once, in the order of the model."""
        return merge_parameters(
            parameter
            for name, module in self.named_modules()
            if hasattr(module, "named")
            for parameter in module.named(stored_name(self.config, name))
        )

    def delayed_scales(self) -> dict[str, DelayedScales]:
        """Return the fp8 scales of the stage's linear layers by global name; empty: they are not delayed."""
        found = {}
        for name, module in self.named_modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                _, training = module.fp8
                if training is not None and training.delayed is not None:
                    found[name] = training.delayed
        return found

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Return an empty cache for this stage's layers; the stage must be without sequence parallelism.

        Decoding runs single tokens, which cannot be split along the sequence.
        """
        assert not self.sharding.split_sequence, "generation needs a stage without sequence parallelism"
        heads = self.config.num_query_groups // self.sharding.tp.size
        shape = (max_length, batch_size, heads, self.config.head_dim)
        return KVCache(self.layer_numbers, shape, self.sharding.dtype, self.sharding.backend.device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run forward, as one graph, and the loss's kernels through torch.compile; the first call compiles.

        The loss is no part of the graph: it adds to the gradient of the head's weight.

        Args: of torch.compile; by default compile_options.
        """
        super().compile(*args, **(kwargs or compile_options(self.sharding)))
        self._compile_loss(**kwargs)

    def compile_layers(self, **kwargs: Any) -> None:
        """Run the forward of each layer through torch.compile: one graph for training and one for evaluation.

        Hooks of layers run outside of the graphs, so that parameters are gathered and gradients reduced layer by layer.

        Args: as for compile.
        """
        compiled = torch.compile(TransformerLayer.forward, **(kwargs or compile_options(self.sharding)))
        for layer in self.decoder.layers.values():
            layer.forward = MethodType(compiled, layer)
        self._compile_loss(**kwargs)

    def _compile_loss(self, **kwargs: Any) -> None:
        if self.output_layer is not None:
            self.output_layer.cross_entropy.compile(**(kwargs or compile_options(self.sharding)))

    def _positions(self, batch: MicroBatch) -> Tensor | None:
        """Return the positions of the tokens that this rank computes, [b or 1, s]; None: 0, 1, 2, ..."""
        cp = self.sharding.cp
        if batch.position_ids is not None or cp.size == 1:
            return None if batch.position_ids is None else local_chunks(batch.position_ids, cp, 1)
        return chunk_positions(cp.rank, batch.shape[1], cp.size, self.sharding.backend.device).unsqueeze(0)

    def _context(
        self, batch: MicroBatch, cache: CachedPass | None, positions: Tensor | None, device: torch.device
    ) -> AttentionContext:
        """Return the inputs of attention that all layers share; `positions` as of _positions."""
        length = batch.shape[1]
        assert cache is None or batch.documents is None, "a cache holds one document per row"
        rotary = None if self.rotary is None else self.rotary(length, positions, device)
        if (cp := self.sharding.cp).size > 1:
            assert cache is None, "generation needs a stage without context parallelism"
            starts = None if batch.documents is None else document_starts(batch.documents, batch.shape[0])
            attention = ContextAttention(cp, self.exchange, self.sharding.backend, length, self.mask.slopes, starts)
            return AttentionContext(rotary, over_ranks=attention)
        if cache is None and self.sharding.kernels.attention is not None:
            mask = None  # the kernel has ALiBi's slopes
        elif cache is None or cache.positions is None:
            mask = self.mask(length)
        else:
            mask = self.mask.of_single_tokens(cache.positions, cache.length, cache.aligned)
        return AttentionContext(rotary, mask, self.mask.slopes, batch.documents, cache)
