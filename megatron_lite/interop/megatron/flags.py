"""Model and tokenizer flags of `import`: settings that a Megatron-LM or DeepSpeed checkpoint does not contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lite.config.arguments import raise_all
from megatron_lite.config.command_line import read_command_line
from megatron_lite.config.flag import FIELD, key_of
from megatron_lite.config.given import Given
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import ConfigError

_COMMAND = {
    key_of(field)
    for field in (
        FIELD.command.preset,
        FIELD.command.erf_gelu,
        FIELD.command.group_query_attention,
        FIELD.command.no_position_embedding,
        FIELD.batch.global_batch_size,
        FIELD.batch.seq_length,
    )
}


@dataclass(frozen=True)
class Stated:
    """Facts about a foreign model from the command line.

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
    read_command_line(list(words), given)
    others = [
        origin for key, _, origin in given.items() if key[0] not in ("model", "tokenizer") and key not in _COMMAND
    ]
    if others:
        given.refuse(
            f"{', '.join(others)} {'do' if len(others) > 1 else 'does'} not apply to an import, which takes flags of "
            "the model and "
            "its tokenizer",
            fix=f"Remove {' and '.join(origin.split()[0] for origin in others)} here, and give it to the training "
            "command",
        )
    raise_all(given.errors)
    model = {key[1]: (value, origin) for key, value, origin in given.items() if key[0] == "model"}
    run = given.run
    if run.command.erf_gelu:
        model.setdefault("activation", ("gelu", given.origin(FIELD.command.erf_gelu)))
    if run.command.no_position_embedding:
        model.setdefault("position_embedding", ("none", given.origin(FIELD.command.no_position_embedding)))
    if run.command.group_query_attention:
        model.setdefault("num_query_groups", (1, given.origin(FIELD.command.group_query_attention)))
    tokenizer = replace(run.tokenizer, vocab_size=0)
    if size := run.tokenizer.vocab_size:
        # NullTokenizer counts its end-of-document token apart, as in Megatron-LM.
        more = int(tokenizer.type == "NullTokenizer")
        _agree(model, size + more, given.origin(FIELD.tokenizer.vocab_size))
        tokenizer = replace(tokenizer, vocab_size=size + more - 1)
    with_files = bool(tokenizer.model or tokenizer.vocab_file or tokenizer.merge_file)
    return Stated(
        model,
        tokenizer if with_files else None,
        run.batch.global_batch_size,
        run.batch.seq_length,
    )


def _agree(model: dict[str, tuple[Any, str]], size: int, origin: str) -> None:
    other = model.setdefault("vocab_size", (size, origin))
    if other[0] != size:
        raise ConfigError(f"{other[1]} and {origin} contradict each other", fix="Remove one of the two")
