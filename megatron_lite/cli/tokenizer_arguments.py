"""Command-line arguments that select a tokenizer, shared by the data commands."""

from __future__ import annotations

import argparse

from megatron_lite.cli.parser import whole
from megatron_lite.config.data import TokenizerConfig
from megatron_lite.errors import ConfigError

MAX_IDS = 2**31 - 2
"""Largest vocabulary whose ids, the end of a document included, a dataset can hold."""

TYPES = {
    "GPT2BPETokenizer": "GPT2BPETokenizer",
    "HuggingFaceTokenizer": "HuggingFaceTokenizer",
    "PretrainedFromHF": "HuggingFaceTokenizer",
    "SentencePieceTokenizer": "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
    "Llama2Tokenizer": "SentencePieceTokenizer",
    "NullTokenizer": "NullTokenizer",
}
"""Both Megatrons' names, and the tokenizer that each gets here."""


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --tokenizer-type and the flags that say where its files lie."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        choices=tuple(TYPES),
        help="kind of tokenizer; without it, it follows from the files that are given",
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
        "--vocab-size", type=whole(0, MAX_IDS), default=0, metavar="N", help="numbers that NullTokenizer knows"
    )
    group.add_argument(
        "--vocab-extra-ids", type=whole(0, 1_000_000), default=0, metavar="N", help="<extra_id_N> tokens to append"
    )
    group.add_argument("--eod-token", default="", metavar="NAME", help="token that ends a document, if not the usual")
    group.add_argument("--no-fast-tokenizer", action="store_true", help="never encode with tiktoken (same ids, slower)")


def tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    """The tokenizer that the flags ask for.

    Raises:
        ConfigError: they ask for none, or for a sentencepiece model as if it were a Hugging Face one.
    """
    kind = TYPES[args.tokenizer_type] if args.tokenizer_type else _guess(args)
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


def _guess(args: argparse.Namespace) -> str:
    if args.vocab_file or args.merge_file:
        return "GPT2BPETokenizer"
    if args.tokenizer_model:
        return "SentencePieceTokenizer" if args.tokenizer_model.endswith(".model") else "HuggingFaceTokenizer"
    raise ConfigError(
        "A tokenizer is needed",
        found="neither --tokenizer-type nor a tokenizer's file is given",
        fix="Give --vocab-file and --merge-file (GPT-2), or --tokenizer-model PATH (tokenizer.json or .model)",
    )
