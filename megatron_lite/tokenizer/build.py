"""Tokenizer factory: builds the tokenizer that a TokenizerConfig describes."""

from __future__ import annotations

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizer.base import Tokenizer


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build a tokenizer, and import only the library of its type.

    Raises:
        ConfigError: a setting is not supported by this type.
        DataError: the tokenizer's files are missing or damaged, or its library is not installed.
    """
    if config.vocab_extra_ids and config.type in ("GPT2BPETokenizer", "NullTokenizer"):
        raise ConfigError(
            f"--tokenizer-type {config.type} does not support --vocab-extra-ids {config.vocab_extra_ids}",
            rule="HuggingFaceTokenizer and SentencePieceTokenizer do",
            fix="Remove --vocab-extra-ids, or use one of these two for --tokenizer-type",
        )
    if config.type == "NullTokenizer":
        from megatron_lite.tokenizer.null import NullTokenizer

        return NullTokenizer(config.vocab_size)
    if config.type == "SentencePieceTokenizer":
        from megatron_lite.tokenizer.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(config.model, eod_token=config.eod_token, extra_ids=config.vocab_extra_ids)
    from megatron_lite.tokenizer.huggingface import ENCODERS, read_gpt2, read_hugging_face

    encoders = ENCODERS if config.fast else ()

    if config.type == "GPT2BPETokenizer":
        return read_gpt2(config.vocab_file, config.merge_file, eod_token=config.eod_token, encoders=encoders)
    return read_hugging_face(
        config.model, eod_token=config.eod_token, extra_ids=config.vocab_extra_ids, encoders=encoders
    )
