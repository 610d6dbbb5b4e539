"""Model config inference for Megatron-LM and DeepSpeed checkpoints: from args, tensor shapes and flags."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_lite.config.model import GATED_ACTIVATIONS, ModelConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.flags import Stated
from megatron_lite.interop.megatron.judgement import judge_arguments, unsupported
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


class Evidence:
    """Known fields of the model with their sources; sources that contradict each other are an error.

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
                f"{field} has two different values: {before[0]!r} by {before[1]}, and {value!r} by {origin}",
                fix="Remove or change the flag that is wrong; if no flag is involved, copy the whole checkpoint again",
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

    def origin(self, field: str) -> str:
        """Return the source of a known field: a flag or a file."""
        return self._known[field][1]

    def has(self, field: str) -> bool:
        """Return whether a source states a field."""
        return field in self._known

    def require(self, field: str, flag: str) -> Any:
        """Return a field's value.

        Raises:
            CheckpointError: no source says it.
        """
        if field not in self._known:
            raise CheckpointError(
                f"{self.where} does not state {field}",
                fix=f"Add {flag}",
            )
        return self._known[field][0]

    @property
    def fields(self) -> dict[str, Any]:
        """Every known field and its value."""
        return {name: value for name, (value, _) in self._known.items()}


def read_arguments(evidence: Evidence, ignored: Collection[str] = ()) -> None:
    """Note what the args say.

    Args:
        evidence: takes the values.
        ignored: unknown args that the user allows to be ignored.

    Raises:
        CheckpointError: they contradict the command line, or ask for what is not supported.
    """
    args = evidence.arguments
    judge_arguments(args, evidence.where, ignored)
    for field, names in {
        "num_layers": ("num_layers", "encoder_num_layers"),
        "hidden_size": ("hidden_size",),
        "num_attention_heads": ("num_attention_heads",),
        "head_dim": ("kv_channels",),
        "ffn_hidden_size": ("ffn_hidden_size",),
        "norm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
        "normalization": ("normalization",),
        "zero_centered_norm": ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
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
        if args.get(name) is not None and not evidence.has(field):
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
    elif args.get("num_key_value_heads") is not None:  # Megatron-DeepSpeed's spelling
        evidence.add_argument("num_query_groups", "num_key_value_heads")
    elif evidence.has_arguments and args.get("num_attention_heads"):
        # num_query_groups is 1 by default in args of plain attention, and counts for nothing.
        origin = f"args.group_query_attention={args.get('group_query_attention')} of {evidence.where}"
        evidence.add("num_query_groups", args["num_attention_heads"], origin)
    for field, value, name in (*_positions(args, evidence.where), *_activation(args, evidence.where)):
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
            raise unsupported(where, "position_embedding_type", kind, f"positions are {', '.join(_POSITIONS)} here")
        # Megatron-LM: add_position_embedding=False leaves out the learned table.
        without = _POSITIONS[kind] == "learned" and args.get("add_position_embedding") is False
        yield "position_embedding", "none" if without else _POSITIONS[kind], "position_embedding_type"


def _activation(args: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, str]]:
    if args.get("gated_linear_unit") and not (args.get("swiglu") or args.get("glu_activation")):
        raise unsupported(where, "gated_linear_unit", True, "swiglu and glu_activation do not say of which activation")
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
    if not evidence.has("norm_epsilon"):
        notes.append(f"{evidence.where} does not say the norms' epsilon: 1e-5, Megatron's default, is taken")
    known = dict(evidence.fields)
    if known["activation"] in GATED_ACTIVATIONS and known.get("ffn_hidden_size") is None:
        known.pop("ffn_hidden_size", None)
    # Padding is this run's, not that of the run that saved the file.
    known.pop("padded_vocab_size", None)
    model = ModelConfig(**known)
    if model.hidden_size % model.num_attention_heads and "head_dim" not in known:
        raise CheckpointError(
            f"Cannot split a hidden size of {model.hidden_size} over {model.num_attention_heads} attention heads",
            fix=f"Give --num-attention-heads a divisor of {model.hidden_size}, or the size of a head with "
            "--kv-channels",
        )
    if model.embed_layernorm and model.norm_epsilon != DEEPSPEED_EMBEDDING_EPSILON:
        raise unsupported(
            evidence.where,
            "layernorm_epsilon",
            model.norm_epsilon,
            f"the norm after the embedding has {DEEPSPEED_EMBEDDING_EPSILON} there, and the epsilon of the others here",
        )
    return model
