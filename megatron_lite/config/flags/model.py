"""Flag entries: model dimensions, position embeddings, normalization, activation and initialization."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.model import GATED_ACTIVATIONS


def _read_gated(words: Sequence[str]) -> str:
    name = words[0].lower()
    if name not in GATED_ACTIVATIONS:
        raise ValueError(f"one of {', '.join(sorted(GATED_ACTIVATIONS))}")
    return name


MODEL = (
    Flag(
        "--preset",
        "command.preset",
        "Shape of a published model: stands for the flags that `megatron-lite explain --preset NAME` prints; others "
        "given beside it win.",
        metavar="NAME",
    ),
    Flag("--num-layers", "model.num_layers", "Transformer layers.", aliases=("--encoder-num-layers",), most=100_000),
    Flag("--hidden-size", "model.hidden_size", "Channels of a token between layers.", most=10**7),
    Flag("--num-attention-heads", "model.num_attention_heads", "Attention heads of a layer.", most=10**6),
    Flag(
        "--num-query-groups",
        "model.num_query_groups",
        "Key/value heads of grouped-query attention; they are shared by equally many query heads.",
        most=10**6,
    ),
    Flag(
        "--group-query-attention",
        "command.group_query_attention",
        "Grouped-query attention; one group unless --num-query-groups says more.",
        sets=True,
    ),
    Flag(
        "--num-key-value-heads",
        "model.num_query_groups",
        "The same with --group-query-attention, as Megatron-DeepSpeed spells it.",
        also=(("command.group_query_attention", True),),
        means="--group-query-attention --num-query-groups",
        most=10**6,
    ),
    Flag(
        "--kv-channels",
        "model.head_dim",
        "Channels of one attention head (hidden size / heads if not given).",
        most=10**6,
    ),
    Flag(
        "--ffn-hidden-size",
        "model.ffn_hidden_size",
        "Width of the MLP (4 x hidden size; 8/3 if it is gated).",
        most=10**8,
    ),
    Flag(
        "--max-position-embeddings",
        "model.max_position_embeddings",
        "Rows of the learned position table (the sequence length if not given).",
        most=10**9,
    ),
    Flag(
        "--position-embedding-type",
        "model.position_embedding",
        "How positions enter the model.",
        aliases=("--pos-emb",),
        spellings={"absolute": "learned", "learned_absolute": "learned", "rope": "rotary"},
    ),
    Flag(
        "--use-rotary-position-embeddings",
        "model.position_embedding",
        "Rotary positions, as --position-embedding-type rotary.",
        sets="rotary",
        means="--position-embedding-type rotary",
    ),
    Flag(
        "--no-position-embedding",
        "command.no_position_embedding",
        "No learned position table: nothing to do with rotary or ALiBi positions, no positions at all otherwise.",
        sets=True,
    ),
    Flag(
        "--rotary-base",
        "model.rotary_base",
        "Base of the rotary frequencies.",
        aliases=("--rope-theta", "--rotary-emb-base"),
    ),
    Flag(
        "--rotary-percent",
        "model.rotary_percent",
        "Share of a head's channels that is rotated.",
        aliases=("--rotary-pct",),
    ),
    Flag("--rotary-interleaved", "model.rotary_interleaved", "Rotate neighbouring channels (GPT-J).", sets=True),
    Flag(
        "--rotary-seq-len-interpolation-factor",
        "model.rotary_scaling",
        "Divide positions by this before rotating.",
    ),
    Flag("--normalization", "model.normalization", "Which norm the layers use.", aliases=("--norm",)),
    Flag(
        "--norm-epsilon",
        "model.norm_epsilon",
        "Epsilon of the norms.",
        aliases=("--layernorm-epsilon", "--rms-norm-epsilon"),
    ),
    Flag(
        "--apply-layernorm-1p",
        "model.zero_centered_norm",
        "Store a norm's weight as w - 1, so that weight decay pulls it to 1.",
        sets=True,
    ),
    Flag("--qk-layernorm", "model.qk_layernorm", "Normalise queries and keys of each head.", sets=True),
    Flag("--embed-layernorm", "model.embed_layernorm", "A norm right after the embedding (BLOOM).", sets=True),
    Flag(
        "--apply-residual-connection-post-layernorm",
        "model.residual_post_layernorm",
        "The residual branches off after the norm, as in BERT.",
        sets=True,
    ),
    Flag(
        "--parallel-residual",
        "model.parallel_residual",
        "Attention and MLP both read the layer's input, and both are added to it (GPT-J, GPT-NeoX).",
        sets=True,
        aliases=("--gpt-j-residual", "--use-parallel-residual"),
    ),
    Flag("--fp32-residual-connection", "model.fp32_residual", "Keep the residual stream in fp32.", sets=True),
    Flag("--activation", "model.activation", "The MLP's activation."),
    Flag("--swiglu", "model.activation", "SiLU-gated MLP.", sets="swiglu", means="--activation swiglu"),
    Flag("--squared-relu", "model.activation", "Squared ReLU.", sets="squared_relu", means="--activation squared_relu"),
    Flag("--openai-gelu", "model.activation", "The tanh GELU.", sets="gelu_tanh", means="--activation gelu_tanh"),
    Flag(
        "--bias-gelu-fusion",
        "model.activation",
        "Megatron 1.1's fused kernel, which computes the tanh GELU.",
        sets="gelu_tanh",
        means="--activation gelu_tanh",
    ),
    Flag(
        "--glu-activation",
        "model.activation",
        "A gated MLP.",
        read=_read_gated,
        metavar="{geglu,liglu,reglu,swiglu}",
        example="swiglu",
        means="--activation",
    ),
    Flag(
        "--no-bias-gelu-fusion",
        "command.erf_gelu",
        "The exact GELU instead of the tanh approximation, which is what Megatron's fused kernel computes.",
        sets=True,
    ),
    Flag(
        "--disable-bias-linear",
        "model.linear_bias",
        "No biases in linear layers.",
        sets=False,
    ),
    Flag("--add-qkv-bias", "model.qkv_bias", "Bias on queries, keys and values all the same.", sets=True),
    Flag("--disable-qkv-bias", "model.qkv_bias", "No bias on queries, keys and values.", sets=False),
    Flag(
        "--untie-embeddings-and-output-weights",
        "model.tied_embeddings",
        "The output layer has a weight of its own.",
        sets=False,
        aliases=("--no-weight-tying",),
    ),
    Flag("--hidden-dropout", "model.hidden_dropout", "Dropout of the residual branches and the embedding."),
    Flag("--attention-dropout", "model.attention_dropout", "Dropout of the attention weights."),
    Flag("--init-method-std", "model.init_std", "Standard deviation of the initial weights."),
    Flag(
        "--no-scaled-init",
        "model.scaled_init",
        "Start the output projections like all other weights, not at std / sqrt(2 x layers).",
        sets=False,
    ),
)

VOCABULARY = (
    Flag(
        "--make-vocab-size-divisible-by",
        "model.make_vocab_size_divisible_by",
        "Round the vocabulary up to a multiple of this x tensor-parallel size.",
        most=10**6,
    ),
    Flag(
        "--pad-vocab-size-to",
        "model.padded_vocab_size",
        "Rows of the embedding, instead of that rounding (0: round).",
        aliases=("--padded-vocab-size",),
        most=2**31 - 1,
    ),
    Flag(
        "--tokenizer-vocab-size",
        "model.vocab_size",
        "Entries of the tokenizer, where they must be known before it is read (0: read it).",
        most=2**31 - 1,
    ),
)
