"""Vocabulary size of a run before it starts: from flags, from the tokenizer's files, or assumed."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.config.files import missing_tokenizer
from megatron_lite.config.run import RunConfig
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.errors import MegatronLiteError
from megatron_lite.tokenizer.build import build_tokenizer

GPT2_ENTRIES = 50257


def fill_vocabulary(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the config with the size of its vocabulary filled in, and the source of that size as text.

    If the tokenizer's files are not on this machine, the size is --pad-vocab-size-to or that of GPT-2.
    """
    tokenizer, model = config.tokenizer, config.model
    if model.vocab_size:
        return with_vocabulary(config, model.vocab_size), "--tokenizer-vocab-size"
    if tokenizer.type == "NullTokenizer":
        return with_vocabulary(config, tokenizer.vocab_size + 1), "--vocab-size and an end-of-document token"
    if not list(missing_tokenizer(tokenizer)):
        try:
            return with_vocabulary(config, build_tokenizer(tokenizer).vocab_size), "the tokenizer"
        except MegatronLiteError as error:
            source = f"the tokenizer cannot be read ({error.description})"
    else:
        source = "the tokenizer's files are not here"
    if model.padded_vocab_size:
        filled = replace(config, model=replace(model, vocab_size=model.padded_vocab_size))
        return filled, f"--pad-vocab-size-to, since {source}"
    return with_vocabulary(config, GPT2_ENTRIES), f"assumed to be GPT-2's, since {source}"
