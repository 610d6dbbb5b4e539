"""Model of a Megatron-LM or DeepSpeed checkpoint: from its args, its tensors and the command line, which must agree."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_lite.config.model import GATED_ACTIVATIONS, ModelConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.flags import Stated
from megatron_lite.interop.unpickling import Stub

DEEPSPEED_EMBEDDING_EPSILON = 1e-5
"""Megatron-DeepSpeed's norm after the embedding has torch's default, whatever --layernorm-epsilon says."""
_POSITIONS = {
    "learned_absolute": "learned",
    "absolute": "learned",
    "rope": "rotary",
    "rotary": "rotary",
    "alibi": "alibi",
    "none": "none",
}
_POSITION_ENUM = {1: "rotary", 2: "learned", 3: "alibi"}
"""Megatron-DeepSpeed's PositionEmbeddingType."""
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", (), [], {})

UNSUPPORTED: Mapping[str, tuple[Collection[Any], str]] = {
    "num_experts": ((*_OFF, 1, [1], (1,)), "mixture of experts"),
    "num_moe_experts": ((*_OFF, 1), "mixture of experts"),
    "multi_latent_attention": (_OFF, "latent attention"),
    "experimental_attention_variant": (_OFF, "another attention"),
    "attention_output_gate": (_OFF, "gated attention"),
    "mtp_num_layers": (_OFF, "multi-token prediction"),
    "use_rope_scaling": (_OFF, "Llama 3's rescaling of rotary frequencies"),
    "no_rope_freq": (_OFF, "layers without rotary positions"),
    "window_size": (_OFF, "sliding-window attention"),
    "attention_chunk_size": (_OFF, "chunked attention"),
    "softmax_type": ((None, "vanilla"), "another softmax"),
    "softmax_scale": ((None,), "another scale of the attention scores"),
    "quick_geglu": (_OFF, "the quick GELU"),
    "glu_linear_offset": (_OFF, "a shifted gated MLP"),
    "activation_func_clamp_value": ((None,), "clamped activations"),
    "use_mup": (_OFF, "muP's multipliers"),
    "mup": (_OFF, "muP's multipliers"),
    "qk_l2_norm": (_OFF, "an L2 norm of queries and keys"),
    "retro_add_retriever": (_OFF, "retrieval"),
    "add_retriever": (_OFF, "retrieval"),
    "is_hybrid_model": (_OFF, "state-space layers"),
    "hybrid_override_pattern": (_OFF, "state-space layers"),
    "hybrid_layer_pattern": (_OFF, "state-space layers"),
    "hybrid_attention_ratio": (_OFF, "state-space layers"),
    "hybrid_mlp_ratio": (_OFF, "state-space layers"),
    "heterogeneous_layers_config_path": (_OFF, "layers of different shapes"),
    "heterogeneous_layers_config_encoded_json": (_OFF, "layers of different shapes"),
    "moe_layer_freq": ((*_OFF, 1), "mixture of experts"),
    "standalone_embedding_stage": (_OFF, "an embedding stage of its own"),
    "bert_binary_head": ((*_OFF, True), "BERT"),
}
"""Args that change what the model computes, the values under which they do not, and what the others mean."""


class Evidence:
    """What is known of each field of the model, and from where; sources that contradict each other are an error.

    Args:
        arguments: the args of the file by name; None: it has none.
        where: the file, for messages.
        stated: the command line.
    """

    def __init__(self, arguments: Mapping[str, Any] | None, where: str, stated: Stated) -> None:
        self.arguments = arguments or {}
        self.has_arguments = arguments is not None
        self.where = where
        self._known: dict[str, tuple[Any, str]] = {}
        for name, (value, origin) in stated.model.items():
            self.add(name, value, origin)

    def add(self, field: str, value: Any, origin: str) -> None:
        """Note a field's value.

        Raises:
            CheckpointError: another source says another value.
        """
        before = self._known.setdefault(field, (value, origin))
        if before[0] != value:
            raise CheckpointError(
                "The checkpoint and the command line must describe one model",
                found=f"{field} is {before[0]!r} by {before[1]}, and {value!r} by {origin}",
                fix="Leave out the flag that is wrong; a file that contradicts itself was put together from two",
            )

    def add_argument(self, field: str, *names: str) -> None:
        """Note the value of the first of some args that is there and not None."""
        for name in names:
            if self.arguments.get(name) is not None:
                self.add(field, self.arguments[name], f"args.{name} of {self.where}")
                return

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field's value."""
        return self._known.get(field, (default, ""))[0]

    def knows(self, field: str) -> bool:
        """Whether any source says a field."""
        return field in self._known

    def require(self, field: str, flag: str) -> Any:
        """Return a field's value.

        Raises:
            CheckpointError: no source says it.
        """
        if field not in self._known:
            raise CheckpointError(
                "What a file does not say of its model, the command line must",
                found=f"{self.where} does not say {field}",
                fix=f"Add {flag}",
            )
        return self._known[field][0]

    @property
    def fields(self) -> dict[str, Any]:
        """Every known field and its value."""
        return {name: value for name, (value, _) in self._known.items()}


def refuse_unsupported(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse args that change what the model computes in a way that is not supported.

    Raises:
        CheckpointError: naming the first.
    """
    for name, (allowed, meaning) in UNSUPPORTED.items():
        value = arguments.get(name)
        if not any(value is None or value == other for other in allowed):
            raise _unsupported(where, name, value, f"{meaning} is not supported")
    if arguments.get("rotary_scaling_factor") not in (None, 1.0, 40) and arguments.get("rope_type") == "yarn":
        raise _unsupported(where, "rope_type", "yarn", "YaRN is not supported")


def read_arguments(evidence: Evidence) -> None:
    """Note what the args say.

    Raises:
        CheckpointError: they contradict the command line, or ask for what is not supported.
    """
    args = evidence.arguments
    refuse_unsupported(args, evidence.where)
    for field, names in {
        "num_layers": ("num_layers", "encoder_num_layers"),
        "hidden_size": ("hidden_size",),
        "num_attention_heads": ("num_attention_heads",),
        "head_dim": ("kv_channels",),
        "ffn_hidden_size": ("ffn_hidden_size",),
        "norm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
        "normalization": ("normalization",),
        "zero_centered_norm": ("apply_layernorm_1p",),
        "rotary_interleaved": ("rotary_interleaved",),
        "residual_post_layernorm": ("apply_residual_connection_post_layernorm",),
        "fp32_residual": ("fp32_residual_connection",),
        "qk_layernorm": ("qk_layernorm",),
        "embed_layernorm": ("embed_layernorm",),
        "linear_bias": ("add_bias_linear",),
        "max_position_embeddings": ("max_position_embeddings",),
    }.items():
        evidence.add_argument(field, *names)
    for field, name in {
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "init_std": "init_method_std",
        "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
    }.items():  # not of the function: a flag may change them
        if args.get(name) is not None and not evidence.knows(field):
            evidence.add_argument(field, name)
    for field, name in {
        "rotary_base": "rotary_base",
        "rotary_percent": "rotary_percent",
        "rotary_scaling": "rotary_seq_len_interpolation_factor",
    }.items():
        if args.get(name) is not None:
            evidence.add(field, float(args[name]), f"args.{name} of {evidence.where}")
    if args.get("untie_embeddings_and_output_weights") is not None:
        tied = not args["untie_embeddings_and_output_weights"]
        evidence.add("tied_embeddings", tied, f"args.untie_embeddings_and_output_weights of {evidence.where}")
    if args.get("group_query_attention"):
        evidence.add_argument("num_query_groups", "num_query_groups")
    elif evidence.has_arguments and args.get("num_attention_heads"):
        # num_query_groups is 1 by default in args of plain attention, and counts for nothing.
        origin = f"args.group_query_attention={args.get('group_query_attention')} of {evidence.where}"
        evidence.add("num_query_groups", args["num_attention_heads"], origin)
    for field, value, name in (*_positions(args, evidence.where), *_activation(args)):
        evidence.add(field, value, f"args.{name} of {evidence.where}")


def _positions(args: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
    kind = args.get("position_embedding_type")
    if isinstance(kind, Stub):
        kind = _POSITION_ENUM.get(kind.args[0] if kind.args else 0, str(kind))
        yield "position_embedding", kind, "position_embedding_type"
        return
    if args.get("use_rotary_position_embeddings"):
        yield "position_embedding", "rotary", "use_rotary_position_embeddings"
    elif kind is not None:
        if kind not in _POSITIONS:
            raise _unsupported(where, "position_embedding_type", kind, f"positions are {', '.join(_POSITIONS)} here")
        # Megatron-LM: add_position_embedding=False leaves out the learned table.
        without = _POSITIONS[kind] == "learned" and args.get("add_position_embedding") is False
        yield "position_embedding", "none" if without else _POSITIONS[kind], "position_embedding_type"


def _activation(args: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, value in (
        ("glu_activation", args.get("glu_activation")),
        ("swiglu", "swiglu" if args.get("swiglu") else None),
        ("squared_relu", "squared_relu" if args.get("squared_relu") else None),
        ("openai_gelu", "gelu_tanh" if args.get("openai_gelu") else None),
        ("onnx_safe", "gelu" if args.get("onnx_safe") else None),
    ):
        if value:
            yield "activation", value, name
            return
    if args.get("bias_gelu_fusion") is not None:
        # The fused kernel computes the tanh approximation, plain gelu the exact function.
        yield "activation", "gelu_tanh" if args["bias_gelu_fusion"] else "gelu", "bias_gelu_fusion"


def model_config(evidence: Evidence, notes: list[str]) -> ModelConfig:
    """Return the model, once all evidence is in.

    Raises:
        CheckpointError: something is not said anywhere, or is not supported together.
    """
    evidence.require("num_attention_heads", "--num-attention-heads N")
    evidence.require("position_embedding", "--position-embedding-type rotary, alibi or none")
    evidence.require("activation", "--activation gelu_tanh (Megatron's default), --activation gelu or --swiglu")
    evidence.require("vocab_size", "--vocab-size N (the tokenizer's entries), or the tokenizer's files")
    if not evidence.knows("norm_epsilon"):
        notes.append(f"{evidence.where} does not say the norms' epsilon: 1e-5, Megatron's default, is taken")
    known = dict(evidence.fields)
    if known["activation"] in GATED_ACTIVATIONS and known.get("ffn_hidden_size") is None:
        known.pop("ffn_hidden_size", None)
    # Padding is this run's, not that of the run that saved the file.
    known.pop("padded_vocab_size", None)
    model = ModelConfig(**known)
    if model.hidden_size % model.num_attention_heads and "head_dim" not in known:
        raise CheckpointError(
            "Attention heads must divide the hidden size",
            found=f"{model.num_attention_heads} heads, hidden size {model.hidden_size}",
            fix=f"Give a --num-attention-heads that divides {model.hidden_size}, or --kv-channels",
        )
    if model.embed_layernorm and model.norm_epsilon != DEEPSPEED_EMBEDDING_EPSILON:
        raise _unsupported(
            evidence.where,
            "layernorm_epsilon",
            model.norm_epsilon,
            f"the norm after the embedding has {DEEPSPEED_EMBEDDING_EPSILON} there, and the epsilon of the others here",
        )
    return model


def _unsupported(where: str, name: str, value: Any, because: str) -> CheckpointError:
    return CheckpointError(
        "Every setting that changes what the model computes must be supported",
        found=f"{where} says {name}={value!r}: {because}",
        fix="Import another model; a model with this setting would compute other logits here",
    )
