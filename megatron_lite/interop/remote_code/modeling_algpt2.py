"""ALGPT2: GPT-2 with layers that share parameters and a factorized embedding (ALBERT, arXiv:1909.11942).

Written by megatron_lite's export. Needs transformers 4.45 or newer:
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

Letters: b batch, s new tokens, t tokens in all (s, and those of a cache), h hidden, E channels of the embedding, V
vocabulary, n heads, d channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers renamed the output.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ALGPT2Config(PretrainedConfig):
    """Configuration of GPT-2, and of what ALBERT adds.

    Args:
        share_layers: "all": one set of parameters for all layers; a number: one for each of as many groups of
            consecutive layers; "attention" or "mlp": one attention or MLP for all layers; empty: nothing is shared.
        embedding_size: channels of the embeddings; 0: n_embd, without projections.
        kwargs: keys that every model has.

    The other keys are those of GPT2Config.
    """

    model_type = "algpt2"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        share_layers: str = "all",
        embedding_size: int = 0,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.share_layers = share_layers
        self.embedding_size = embedding_size
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    def owner(self, part: str, layer: int) -> int:
        """Return the number of the layer that has the parameters of a part (ln_1, attn, ln_2, mlp) of a layer."""
        if self.share_layers in ("attention", "mlp"):
            return 0 if part == {"attention": "attn", "mlp": "mlp"}[self.share_layers] else layer
        groups = {"": self.n_layer, "all": 1}.get(self.share_layers) or int(self.share_layers)
        size = self.n_layer // groups
        return layer // size * size


class OutputProjection(nn.Linear):
    """Last linear layer of attention and MLP, which has initial weights of its own."""


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__()
        self.num_heads = config.n_head
        self.dropout = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = OutputProjection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Tensor:
        """`x` [b, s, h], `mask` [b or 1, 1, s, t] (None: causal within x) -> [b, s, h]."""
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.update(k, v, layer)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Feed-forward block."""

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width)
        self.c_proj = OutputProjection(width, config.n_embd)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [b, s, h] -> [b, s, h]."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


def build_part(config: ALGPT2Config, part: str) -> nn.Module:
    """Return a part of a layer: ln_1, attn, ln_2 or mlp."""
    if part in ("attn", "mlp"):
        return Attention(config) if part == "attn" else MLP(config)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class ALGPT2PreTrainedModel(PreTrainedModel):
    """Initialization, as in GPT-2."""

    config_class = ALGPT2Config
    base_model_prefix = "transformer"
    _supports_cache_class = True  # read by transformers 4 only

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, OutputProjection):
            std /= math.sqrt(2 * self.config.n_layer)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class ALGPT2Model(ALGPT2PreTrainedModel):
    """Embeddings and layers."""

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__(config)
        hidden, width = config.n_embd, config.embedding_size or config.n_embd
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.n_positions, width)
        self.input_projection = nn.Linear(width, hidden) if config.embedding_size else None
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleDict()
        for layer in range(config.n_layer):
            own = nn.ModuleDict()
            for part in ("ln_1", "attn", "ln_2", "mlp"):
                if config.owner(part, layer) == layer:
                    own[part] = build_part(config, part)
            if own:
                self.h[str(layer)] = own
        self.ln_f = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.output_projection = nn.Linear(hidden, width) if config.embedding_size else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of the vocabulary."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of the vocabulary."""
        assert isinstance(value, nn.Embedding)
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the hidden states before the output layer.

        Args:
            input_ids: [b, s], or inputs_embeds [b, s, E].
            attention_mask: [b, t], 0 for padding.
            position_ids: [b, s]; None: those after the cache.
            inputs_embeds: instead of input_ids.
            cache: keys and values of earlier tokens, to which those of these tokens are appended.

        Returns:
            [b, s, E].
        """
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device).unsqueeze(0)
        x = x + self.wpe(position_ids)
        if self.input_projection is not None:
            x = self.input_projection(x)
        x = self.drop(x)
        mask = self._mask(attention_mask, past, length, x.device)
        for layer in range(self.config.n_layer):
            ln_1, attn, ln_2, mlp = (
                self.h.get_submodule(f"{self.config.owner(part, layer)}.{part}")
                for part in ("ln_1", "attn", "ln_2", "mlp")
            )
            x = x + attn(ln_1(x), mask, cache, layer)
            x = x + mlp(ln_2(x))
        x = self.ln_f(x)
        return x if self.output_projection is None else self.output_projection(x)

    def _mask(self, attention_mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
        """Return which keys each query attends to, [b or 1, 1, s, t]; None: causal."""
        if attention_mask is None and past == 0:
            return None
        keys = torch.arange(past + length, device=device)
        queries = keys[past:].unsqueeze(1)
        mask = (keys <= queries)[None, None]
        if attention_mask is not None:
            # Padding attends to itself: a softmax over no key is NaN.
            mask = mask & (attention_mask[:, None, None, :] != 0) | (keys == queries)
        return mask


class ALGPT2LMHeadModel(ALGPT2PreTrainedModel, GenerationMixin):
    """Language model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__(config)
        self.transformer = ALGPT2Model(config)
        self.lm_head = nn.Linear(config.embedding_size or config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits, and with labels (shifted here; -100: no loss) the mean loss.

        Args:
            input_ids: see ALGPT2Model, as for the next three.
            attention_mask: see there.
            position_ids: see there.
            inputs_embeds: see there.
            past_key_values: the cache, as older versions of transformers call it.
            cache: keys and values of earlier tokens.
            labels: [b, s].
            use_cache: whether to return a cache; None: the configuration's.
            logits_to_keep: number of positions at the end whose logits are returned; 0: all.
            kwargs: options of transformers without effect here.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        x = self.transformer(input_ids, attention_mask, position_ids, inputs_embeds, cache)
        logits = self.lm_head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
