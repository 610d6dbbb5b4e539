"""Vocabulary padding to a multiple of the tensor-parallel size."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int, fixed: int = 0) -> int:
    """Megatron's padded vocabulary: the next multiple of `divisible_by * tp`, or `fixed` (--pad-vocab-size-to).

    >>> padded_vocab_size(50257, 128, 1), padded_vocab_size(50257, 128, 4)
    (50304, 50688)

    Raises:
        ConfigError: `fixed` is smaller than the vocabulary, or `tp` does not divide it.
    """
    if not fixed:
        multiple = divisible_by * tp
        return -(-vocab_size // multiple) * multiple
    if fixed < vocab_size:
        raise ConfigError(
            "The padded vocabulary must hold the tokenizer's",
            found=f"--pad-vocab-size-to is {fixed}, the tokenizer has {vocab_size} tokens",
            fix=f"Give --pad-vocab-size-to at least {vocab_size}, or leave it out",
        )
    if fixed % tp:
        raise ConfigError(
            "The padded vocabulary must be divisible by the tensor-parallel size",
            found=f"--pad-vocab-size-to is {fixed}, --tensor-model-parallel-size is {tp}",
            fix=f"Give --pad-vocab-size-to {-(-fixed // tp) * tp}",
        )
    return fixed


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The run once its tokenizer is known: the model's vocab_size and padded_vocab_size filled in.

    Args:
        config: its model.padded_vocab_size is --pad-vocab-size-to, or 0.
        vocab_size: the tokenizer's entries.

    Raises:
        ConfigError: the tokenizer does not fit --pad-vocab-size-to or --tokenizer-vocab-size.
    """
    model = config.model
    if model.vocab_size and model.vocab_size != vocab_size:
        raise ConfigError(
            "The tokenizer must have the size that the command line says",
            found=f"--tokenizer-vocab-size is {model.vocab_size}, the tokenizer has {vocab_size} tokens",
            fix="Leave --tokenizer-vocab-size out, or choose the other tokenizer",
        )
    padded = padded_vocab_size(
        vocab_size, model.make_vocab_size_divisible_by, config.parallel.tp, model.padded_vocab_size
    )
    return replace(config, model=replace(model, vocab_size=vocab_size, padded_vocab_size=padded))
