"""Tokenizer config: kind of tokenizer, its files and its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import Flag, option
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Kind of tokenizer, by Megatron's names, and its files."""

    type: Literal["GPT2BPETokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = option(
        "GPT2BPETokenizer",
        Flag(
            "--tokenizer-type",
            "Kind of tokenizer.",
            choices={
                "PretrainedFromHF": "HuggingFaceTokenizer",
                "HFTokenizer": "HuggingFaceTokenizer",
                "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
                "Llama2Tokenizer": "SentencePieceTokenizer",
            },
        ),
    )
    model: str = option(
        "",
        Flag(
            "--tokenizer-model",
            "File or folder of the tokenizer: tokenizer.json, a Hugging Face folder, or a sentencepiece .model.",
            aliases=("--tokenizer-name-or-path",),
            metavar="PATH",
        ),
        may_differ="a node may have its own copy; the vocabulary is compared by its fingerprint",
    )
    vocab_file: str = option(
        "",
        Flag("--vocab-file", "vocab.json of a GPT-2 BPE.", aliases=("--vocab",), metavar="FILE"),
        may_differ="as --tokenizer-model",
    )
    merge_file: str = option(
        "",
        Flag("--merge-file", "merges.txt of a GPT-2 BPE.", aliases=("--merges-file",), metavar="FILE"),
        may_differ="as --tokenizer-model",
    )
    vocab_size: int = option(
        0,
        Flag(
            "--vocab-size",
            "Entries of a NullTokenizer before its end-of-document token, which gets this id.",
            most=2**31 - 2,
        ),
    )
    vocab_extra_ids: int = option(
        0, Flag("--vocab-extra-ids", "Additional entries at the end of the vocabulary.", most=10**6)
    )
    eod_token: str = option(
        "", Flag("--eod-token", "Name of the end-of-document token, if the tokenizer's files do not name it.")
    )
    fast: bool = option(
        True,
        Flag(
            "--no-fast-tokenizer",
            "Encode with the tokenizer's own library instead of gigatoken or tiktoken (same ids).",
            sets=False,
        ),
    )


def tokenizer_has_a_size(config: RunConfig) -> Iterator[ConfigError]:
    """Require the size of a NullTokenizer's vocabulary."""
    if config.tokenizer.type == "NullTokenizer" and not config.tokenizer.vocab_size:
        yield ConfigError(
            "--tokenizer-type NullTokenizer needs --vocab-size",
            fix="Give --vocab-size the number of token ids of the data, without the end-of-document token",
        )


RULES = (tokenizer_has_a_size,)
