"""Command-line arguments that select a tokenizer, shared by the data commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import whole
from megatron_lite.config.data import TokenizerConfig
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.tokenizer.base import Tokenizer

MAX_IDS = 2**31 - 2
"""Largest vocabulary whose ids, including the end-of-document token, fit in a dataset."""

TYPES = {
    "GPT2BPETokenizer": "GPT2BPETokenizer",
    "HuggingFaceTokenizer": "HuggingFaceTokenizer",
    "PretrainedFromHF": "HuggingFaceTokenizer",
    "SentencePieceTokenizer": "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
    "Llama2Tokenizer": "SentencePieceTokenizer",
    "NullTokenizer": "NullTokenizer",
}
"""Tokenizer type of each name in both Megatrons."""


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --tokenizer-type and the flags for the tokenizer's files."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        choices=tuple(TYPES),
        help="type of tokenizer (default: by the given files)",
    )
    group.add_argument("--vocab-file", "--vocab", default="", metavar="PATH", help="vocab.json of GPT2BPETokenizer")
    group.add_argument("--merge-file", default="", metavar="PATH", help="merges.txt of GPT2BPETokenizer")
    group.add_argument(
        "--tokenizer-model",
        "--tokenizer-name-or-path",
        default="",
        metavar="PATH",
        help="tokenizer.json, a folder with it, a downloaded model's name, or a sentencepiece .model",
    )
    group.add_argument(
        "--vocab-size", type=whole(0, MAX_IDS), default=0, metavar="N", help="vocabulary size of NullTokenizer"
    )
    group.add_argument(
        "--vocab-extra-ids",
        type=whole(0, 1_000_000),
        default=0,
        metavar="N",
        help="number of <extra_id_N> tokens to append",
    )
    group.add_argument(
        "--eod-token", default="", metavar="NAME", help="end-of-document token, if it has an unusual name"
    )
    group.add_argument(
        "--no-fast-tokenizer", action="store_true", help="do not encode with tiktoken (same ids, slower)"
    )


def tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    """Return the tokenizer config of parsed flags.

    Raises:
        ConfigError: the flags select no tokenizer.
    """
    if args.tokenizer_type:
        kind = TYPES[args.tokenizer_type]
    elif args.vocab_file or args.merge_file:
        kind = "GPT2BPETokenizer"
    elif args.tokenizer_model:
        kind = "SentencePieceTokenizer" if args.tokenizer_model.endswith(".model") else "HuggingFaceTokenizer"
    else:
        raise ConfigError(
            "No tokenizer is given",
            fix="Give --vocab-file and --merge-file (GPT-2), or --tokenizer-model PATH (tokenizer.json or .model)",
        )
    return TokenizerConfig(
        type=kind,  # type: ignore[arg-type]
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        vocab_extra_ids=args.vocab_extra_ids,
        eod_token=args.eod_token,
        fast=not args.no_fast_tokenizer,
    )


def given_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """Return the tokenizer of parsed flags; None if none of them is given.

    Raises:
        ConfigError: the flags contradict each other.
        DataError: its files are missing or damaged.
    """
    if not any((args.tokenizer_type, args.vocab_file, args.merge_file, args.tokenizer_model)):
        return None
    from megatron_lite.tokenizer.build import build_tokenizer

    return build_tokenizer(tokenizer_config(args))
