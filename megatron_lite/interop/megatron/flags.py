"""Model and tokenizer flags of `megatron-lite import`: what a foreign file does not say, the command line does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_lite.config.apply import apply
from megatron_lite.config.arguments import raise_all
from megatron_lite.config.data import TokenizerConfig
from megatron_lite.config.given import Given
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.words import read_words
from megatron_lite.errors import ConfigError

_MODEL = {f"model.{item.name}" for item in fields(ModelConfig)}
_TOKENIZER = {f"tokenizer.{item.name}" for item in fields(TokenizerConfig)}
_COMMAND = {
    "command.preset",
    "command.erf_gelu",
    "command.group_query_attention",
    "command.no_position_embedding",
    "batch.global_batch_size",
    "batch.seq_length",
}


@dataclass(frozen=True)
class Stated:
    """What the command line says of a foreign model.

    Attributes:
        model: fields of ModelConfig with the flag that gave each.
        tokenizer: settings of a tokenizer with files; None: not given.
        global_batch_size: of the run that saved it; 0: not given.
        seq_length: the longest sequence; 0: not given.
        checkpoint_version: of a Megatron-LM file that does not say it; None: not given.
    """

    model: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    tokenizer: TokenizerConfig | None = None
    global_batch_size: int = 0
    seq_length: int = 0
    checkpoint_version: float | None = None


def read_model_flags(words: Sequence[str]) -> Stated:
    """Return what flags in Megatron's spelling say of a model.

    Args:
        words: the command line's words that are not the command's own.

    Raises:
        ConfigError: a flag is unknown, unsupported, or does not describe a model.
        ConfigErrors: several are wrong.
    """
    given = Given()
    apply(read_words(list(words), given), given)
    others = [given.origins[name] for name in given.values if name not in _MODEL | _TOKENIZER | _COMMAND]
    if others:
        given.refuse(
            "An import takes flags that describe the model and its tokenizer",
            found=", ".join(others),
            fix="Leave them out; give them to the run that trains on the imported model",
        )
    raise_all(given.errors)
    model = {
        name.removeprefix("model."): (value, given.origins[name])
        for name, value in given.values.items()
        if name in _MODEL
    }
    origins = given.origins
    if given.value("command.erf_gelu"):
        model.setdefault("activation", ("gelu", origins["command.erf_gelu"]))
    if given.value("command.no_position_embedding"):
        model.setdefault("position_embedding", ("none", origins["command.no_position_embedding"]))
    if given.value("command.group_query_attention"):
        model.setdefault("num_query_groups", (1, origins["command.group_query_attention"]))
    tokenizer = TokenizerConfig(
        **{
            name.removeprefix("tokenizer."): value
            for name, value in given.values.items()
            if name in _TOKENIZER and name != "tokenizer.vocab_size"
        }
    )
    size = given.value("tokenizer.vocab_size")
    if size:
        # NullTokenizer counts its end-of-document token apart, as in Megatron-LM.
        more = int(given.has("tokenizer.type") and tokenizer.type == "NullTokenizer")
        _agree(model, size + more, origins["tokenizer.vocab_size"])
        tokenizer = replace(tokenizer, vocab_size=size + more - 1)
    with_files = any(given.has(f"tokenizer.{name}") for name in ("model", "vocab_file", "merge_file"))
    return Stated(
        model,
        tokenizer if with_files else None,
        given.value("batch.global_batch_size"),
        given.value("batch.seq_length"),
    )


def _agree(model: dict[str, tuple[Any, str]], size: int, origin: str) -> None:
    other = model.setdefault("vocab_size", (size, origin))
    if other[0] != size:
        raise ConfigError(
            "Two flags must not contradict each other", found=f"{other[1]} and {origin}", fix="Leave one of them out"
        )
