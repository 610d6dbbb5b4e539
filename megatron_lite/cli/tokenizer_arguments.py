"""Tokenizer flags of commands that configure no model: the same flags as in `train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.parser import whole
from megatron_lite.config.flag import Flag
from megatron_lite.config.help import description, metavar
from megatron_lite.config.table import supported_flags
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.config.values import MAX_NUMBER, read_as
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.tokenizer.base import Tokenizer

MAX_IDS = 2**31 - 2
"""Largest vocabulary whose ids, including the end-of-document token, fit in a dataset."""
FILE_FIELDS = ("type", "model", "vocab_file", "merge_file")
"""Fields of TokenizerConfig that select the tokenizer's files."""


def add_tokenizer_arguments(parser: argparse.ArgumentParser, *names: str, note: str = "") -> None:
    """Add the training flags of fields of TokenizerConfig, to be read by `tokenizer_fields`.

    Args:
        parser: the command's.
        names: the fields; none: all.
        note: description of the group.
    """
    group = parser.add_argument_group("tokenizer", note)
    for flag in supported_flags()["Tokenizer"]:
        name = flag.key[1]
        if not names or name in names:
            options: dict[str, Any] = {"dest": f"tokenizer_{name}", "help": description(flag)}
            if flag.takes_value:
                options |= {"type": _reader(flag), "metavar": metavar(flag)}
            else:
                options |= {"action": "store_const", "const": flag.sets}
            group.add_argument(flag.name, *flag.aliases, **options)


def _reader(flag: Flag) -> Callable[[str], Any]:
    if flag.type is int:
        return whole(int(flag.least), int(flag.most or MAX_NUMBER))

    def read(arg: str) -> Any:
        try:
            return read_as(flag.type, arg, flag.choices)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{arg!r} is not {error}") from None

    return read


def tokenizer_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of TokenizerConfig given by flags."""
    given = {entry.name: getattr(args, f"tokenizer_{entry.name}", None) for entry in fields(TokenizerConfig)}
    return {name: value for name, value in given.items() if value not in (None, "")}


def tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    """Return the tokenizer config of parsed flags.

    Raises:
        ConfigError: the flags select no tokenizer.
    """
    given = tokenizer_fields(args)
    if "type" not in given:
        if "vocab_file" in given or "merge_file" in given:
            given["type"] = "GPT2BPETokenizer"
        elif "model" in given:
            given["type"] = "SentencePieceTokenizer" if given["model"].endswith(".model") else "HuggingFaceTokenizer"
        else:
            raise ConfigError(
                "No tokenizer is given",
                fix="Add --tokenizer-model PATH (a tokenizer.json or a sentencepiece .model), or --vocab-file "
                "vocab.json --merge-file "
                "merges.txt (GPT-2)",
            )
    return TokenizerConfig(**given)


def given_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """Return the tokenizer of parsed flags; None if none of them is given.

    Raises:
        ConfigError: the flags contradict each other.
        DataError: its files are missing or damaged.
    """
    if not set(FILE_FIELDS) & tokenizer_fields(args).keys():
        return None
    from megatron_lite.tokenizer.build import build_tokenizer

    return build_tokenizer(tokenizer_config(args))
