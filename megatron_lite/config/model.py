"""Model config: layers, dimensions, position embedding, normalization, activation, dropout, initialization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PositionEmbedding = Literal["learned", "rotary", "alibi", "none"]
Normalization = Literal["LayerNorm", "RMSNorm"]
Activation = Literal["gelu_tanh", "gelu", "relu", "squared_relu", "swiglu", "geglu", "reglu", "liglu"]

GATED_ACTIVATIONS: frozenset[str] = frozenset({"swiglu", "geglu", "reglu", "liglu"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the GPT. A size given as 0 is derived from the others, as Megatron derives it."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int = 0
    """Key/value heads of grouped-query attention; 0: as many as attention heads."""
    head_dim: int = 0
    """Channels of one head (Megatron's kv_channels); 0: hidden_size / num_attention_heads."""
    ffn_hidden_size: int = 0
    """Width of the MLP; 0: 4h, or two thirds of that rounded down to 64 if the activation is gated."""
    max_position_embeddings: int = 0
    """Rows of the learned position table; unused by rotary and ALiBi."""

    vocab_size: int = 0
    """Entries of the tokenizer; 0 until the tokenizer has been read."""
    padded_vocab_size: int = 0
    """Rows of the embedding: vocab_size rounded up. Rows past vocab_size are zero and are never predicted."""
    make_vocab_size_divisible_by: int = 128

    position_embedding: PositionEmbedding = "learned"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    """Share of head_dim that is rotated (GPT-NeoX, GPT-J)."""
    rotary_interleaved: bool = False
    rotary_scaling: float = 1.0
    """Positions are divided by this (linear position interpolation)."""
    normalization: Normalization = "LayerNorm"
    norm_epsilon: float = 1e-5
    zero_centered_norm: bool = False
    """The norm's weight is stored as w - 1 (Megatron's layernorm_1p), so that weight decay pulls it to 1."""
    activation: Activation = "gelu_tanh"
    linear_bias: bool = True
    qkv_bias: bool = True
    """Bias on the query/key/value projection; follows linear_bias unless --add-qkv-bias says otherwise."""
    tied_embeddings: bool = True
    embed_layernorm: bool = False
    """A LayerNorm right after the embedding (BLOOM)."""
    qk_layernorm: bool = False
    residual_post_layernorm: bool = False
    """The residual branches off after the norm (BERT's and --apply-residual-connection-post-layernorm's way)."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, and both are added to it (GPT-J, GPT-NeoX)."""
    fp32_residual: bool = False

    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    scaled_init: bool = True
    """Output projections of attention and MLP start at init_std / sqrt(2 * num_layers) (GPT-2)."""

    def __post_init__(self) -> None:
        derive = object.__setattr__
        if not self.num_query_groups:
            derive(self, "num_query_groups", self.num_attention_heads)
        if not self.head_dim:
            derive(self, "head_dim", self.hidden_size // max(1, self.num_attention_heads))
        if not self.ffn_hidden_size:
            width = 4 * self.hidden_size
            derive(self, "ffn_hidden_size", max(64, width * 2 // 3 // 64 * 64) if self.gated else width)

    @property
    def gated(self) -> bool:
        """Whether the MLP's first projection has a gate half and an up half."""
        return self.activation in GATED_ACTIVATIONS
