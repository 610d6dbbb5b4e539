"""Optional tokenizer of the `data` commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_lite.cli.tokenizer_arguments import tokenizer_config

if TYPE_CHECKING:
    from megatron_lite.tokenizer.base import Tokenizer


def given_tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer, if any of its flags is given.

    Raises:
        ConfigError: they contradict each other.
        DataError: its files are missing or damaged.
    """
    if not any((options.tokenizer_type, options.vocab_file, options.merge_file, options.tokenizer_model)):
        return None
    from megatron_lite.tokenizer.build import build_tokenizer

    return build_tokenizer(tokenizer_config(options))
