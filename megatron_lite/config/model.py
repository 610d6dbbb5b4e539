"""Model config: layers, dimensions, position embedding, normalization, activation, dropout, initialization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_lite.config.flag import FIELD, Flag, Format, flags, option
from megatron_lite.config.sharing import SHARING

PositionEmbedding = Literal["learned", "rotary", "alibi", "none"]
Normalization = Literal["LayerNorm", "RMSNorm"]
Activation = Literal["gelu_tanh", "gelu", "relu", "squared_relu", "swiglu", "geglu", "reglu", "liglu"]

GATED_ACTIVATIONS: frozenset[str] = frozenset({"swiglu", "geglu", "reglu", "liglu"})
MAX_VOCABULARY = 2**31 - 1


def _read_gated(args: Sequence[str]) -> str:
    name = args[0].lower()
    if name not in GATED_ACTIVATIONS:
        raise ValueError(f"one of {', '.join(sorted(GATED_ACTIVATIONS))}")
    return name


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the GPT. A size given as 0 is derived from the others, as Megatron derives it."""

    num_layers: int = field(
        metadata=flags(
            Flag("--num-layers", "Transformer layers.", aliases=("--encoder-num-layers",), least=1, most=100_000)
        )
    )
    hidden_size: int = field(
        metadata=flags(Flag("--hidden-size", "Channels of a token between layers.", least=1, most=10**7))
    )
    num_attention_heads: int = field(
        metadata=flags(Flag("--num-attention-heads", "Attention heads of a layer.", least=1, most=10**6))
    )
    num_query_groups: int = option(
        0,
        Flag(
            "--num-query-groups",
            "Key/value heads of grouped-query attention, each shared by equally many query heads (one for each "
            "query head if not given).",
            most=10**6,
        ),
        Flag(
            "--num-key-value-heads",
            "The same with --group-query-attention, as Megatron-DeepSpeed spells it.",
            also=((FIELD.command.group_query_attention, True),),
            means="--group-query-attention --num-query-groups",
        ),
        derived=True,
    )
    head_dim: int = option(
        0, Flag("--kv-channels", "Channels of one attention head (0: hidden size / heads).", most=10**6), derived=True
    )
    ffn_hidden_size: int = option(
        0,
        Flag(
            "--ffn-hidden-size",
            "Width of the MLP (4 x hidden size if not given; 8/3 x, rounded down to 64, if the MLP is gated).",
            most=10**8,
        ),
        derived=True,
    )
    max_position_embeddings: int = option(
        0,
        Flag(
            "--max-position-embeddings",
            "Rows of the learned position table (the sequence length if not given); unused by rotary and ALiBi.",
            most=10**9,
        ),
        derived=True,
    )

    position_embedding: PositionEmbedding = option(
        "learned",
        Flag(
            "--position-embedding-type",
            "Kind of position embedding.",
            aliases=("--pos-emb",),
            choices={"absolute": "learned", "learned_absolute": "learned", "rope": "rotary"},
        ),
        Flag(
            "--use-rotary-position-embeddings",
            "Rotary positions, as --position-embedding-type rotary.",
            sets="rotary",
            means="--position-embedding-type rotary",
        ),
    )
    rotary_base: float = option(
        10000.0,
        Flag(
            "--rotary-base", "Base of the rotary frequencies.", aliases=("--rope-theta", "--rotary-emb-base"), least=1
        ),
    )
    rotary_percent: float = option(
        1.0,
        Flag(
            "--rotary-percent",
            "Share of a head's channels that is rotated (GPT-NeoX, GPT-J).",
            aliases=("--rotary-pct",),
            most=1,
        ),
    )
    rotary_interleaved: bool = option(
        False, Flag("--rotary-interleaved", "Rotate neighbouring channels (GPT-J).", sets=True)
    )
    rotary_scaling: float = option(
        1.0,
        Flag(
            "--rotary-seq-len-interpolation-factor",
            "Divide positions by this before rotating (linear position interpolation).",
            above=0,
        ),
        may_change=True,
    )
    normalization: Normalization = option(
        "LayerNorm", Flag("--normalization", "Norm of the layers.", aliases=("--norm",))
    )
    norm_epsilon: float = option(
        1e-5,
        Flag("--norm-epsilon", "Epsilon of the norms.", aliases=("--layernorm-epsilon", "--rms-norm-epsilon"), above=0),
    )
    zero_centered_norm: bool = option(
        False,
        Flag("--apply-layernorm-1p", "Store a norm's weight as w - 1, so that weight decay pulls it to 1.", sets=True),
    )
    qk_layernorm: bool = option(False, Flag("--qk-layernorm", "Normalize queries and keys of each head.", sets=True))
    embed_layernorm: bool = option(
        False, Flag("--embed-layernorm", "LayerNorm after the embedding (BLOOM).", sets=True)
    )
    residual_post_layernorm: bool = option(
        False,
        Flag(
            "--apply-residual-connection-post-layernorm",
            "Take the residual branch after the norm, as BERT does.",
            sets=True,
        ),
    )
    parallel_residual: bool = option(
        False,
        Flag(
            "--parallel-residual",
            "Attention and MLP both read the layer's input, and both are added to it (GPT-J, GPT-NeoX).",
            sets=True,
            aliases=("--gpt-j-residual", "--use-parallel-residual"),
        ),
    )
    fp32_residual: bool = option(
        False, Flag("--fp32-residual-connection", "Keep the residual stream in fp32.", sets=True), may_change=True
    )
    share_layers: str = option(
        "",
        Flag(
            "--share-layers",
            "Share parameters between layers (ALBERT): one set for all layers, one for each of GROUPS groups of "
            "consecutive layers, or one attention or MLP for all layers.",
            format=SHARING,
        ),
    )
    embedding_size: int = option(
        0,
        Flag(
            "--embedding-size",
            "Channels of the word and position embeddings and of the output layer, with linear layers to and from the "
            "hidden size (ALBERT's factorized embedding; 0: the hidden size).",
            most=10**7,
        ),
    )
    activation: Activation = option(
        "gelu_tanh",
        Flag("--activation", "Activation of the MLP."),
        Flag("--swiglu", "SiLU-gated MLP.", sets="swiglu", means="--activation swiglu"),
        Flag("--squared-relu", "Squared ReLU.", sets="squared_relu", means="--activation squared_relu"),
        Flag("--openai-gelu", "Tanh approximation of GELU.", sets="gelu_tanh", means="--activation gelu_tanh"),
        Flag(
            "--bias-gelu-fusion",
            "Megatron 1.1's fused kernel, which computes the tanh approximation of GELU.",
            sets="gelu_tanh",
            means="--activation gelu_tanh",
        ),
        Flag(
            "--glu-activation",
            "Activation of a gated MLP.",
            format=Format(metavar="{geglu,liglu,reglu,swiglu}", example="swiglu", read=_read_gated, count="one"),
            means="--activation",
        ),
    )
    linear_bias: bool = option(True, Flag("--disable-bias-linear", "No biases in linear layers.", sets=False))
    qkv_bias: bool = option(
        True,
        Flag("--add-qkv-bias", "Bias on queries, keys and values, also with --disable-bias-linear.", sets=True),
        Flag("--disable-qkv-bias", "No bias on queries, keys and values.", sets=False),
        derived=True,
    )
    tied_embeddings: bool = option(
        True,
        Flag(
            "--untie-embeddings-and-output-weights",
            "Give the output layer a weight of its own.",
            sets=False,
            aliases=("--no-weight-tying",),
        ),
    )

    hidden_dropout: float = option(
        0.1, Flag("--hidden-dropout", "Dropout of the residual branches and the embedding.", below=1), may_change=True
    )
    attention_dropout: float = option(
        0.1, Flag("--attention-dropout", "Dropout of the attention weights.", below=1), may_change=True
    )
    init_std: float = option(
        0.02, Flag("--init-method-std", "Standard deviation of the initial weights."), may_change=True
    )
    scaled_init: bool = option(
        True,
        Flag(
            "--no-scaled-init",
            "Initialize output projections like all other weights, without GPT-2's factor 1 / sqrt(2 x layers).",
            sets=False,
        ),
        may_change=True,
    )

    make_vocab_size_divisible_by: int = option(
        128,
        Flag(
            "--make-vocab-size-divisible-by",
            "Round the vocabulary up to a multiple of this x tensor-parallel size.",
            least=1,
            most=10**6,
        ),
        may_change=True,
    )
    padded_vocab_size: int = option(
        0,
        Flag(
            "--pad-vocab-size-to",
            "Rows of the embedding, instead of that rounding (0: round). Rows past the vocabulary are zero and "
            "never predicted.",
            aliases=("--padded-vocab-size",),
            most=MAX_VOCABULARY,
        ),
        may_change=True,
    )
    vocab_size: int = option(
        0,
        Flag(
            "--tokenizer-vocab-size",
            "Entries of the tokenizer, where the size is needed before the tokenizer is read (0: read it).",
            most=MAX_VOCABULARY,
        ),
    )

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
    def vocab_rows(self) -> int:
        """Rows of the word embeddings: the padded vocabulary, or the vocabulary where it is not padded yet."""
        return self.padded_vocab_size or self.vocab_size

    @property
    def embedding_width(self) -> int:
        """Channels of a row of the embeddings: --embedding-size, or the hidden size."""
        return self.embedding_size or self.hidden_size

    @property
    def gated(self) -> bool:
        """True if the first projection of the MLP has a gate half and an up half."""
        return self.activation in GATED_ACTIVATIONS
