"""Vocabulary padding to a multiple of the tensor-parallel size."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int, fixed: int = 0) -> int:
    """Return Megatron's padded vocabulary: the next multiple of `divisible_by * tp`, or `fixed` (--pad-vocab-size-to).

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
            f"--pad-vocab-size-to {fixed} is smaller than the tokenizer's vocabulary of {vocab_size} tokens",
            fix=f"Use --pad-vocab-size-to {-(-vocab_size // tp) * tp} or more, or remove the flag",
        )
    if fixed % tp:
        raise ConfigError(
            f"Cannot split --pad-vocab-size-to {fixed} over {tp} tensor-parallel ranks (--tensor-model-parallel-size "
            f"{tp})",
            fix=f"Use --pad-vocab-size-to {-(-fixed // tp) * tp}",
        )
    return fixed


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """Return the config with the model's vocab_size and padded_vocab_size filled in.

    Args:
        config: its model.padded_vocab_size is --pad-vocab-size-to, or 0.
        vocab_size: the tokenizer's entries.

    Raises:
        ConfigError: the tokenizer does not fit --pad-vocab-size-to or --tokenizer-vocab-size.
    """
    model = config.model
    if model.vocab_size and model.vocab_size != vocab_size:
        raise ConfigError(
            f"--tokenizer-vocab-size {model.vocab_size} differs from the tokenizer's {vocab_size} tokens",
            fix="Remove --tokenizer-vocab-size, or name the tokenizer of that vocabulary in --tokenizer-model or "
            "--vocab-file",
        )
    padded = padded_vocab_size(
        vocab_size, model.make_vocab_size_divisible_by, config.parallel.tp, model.padded_vocab_size
    )
    return replace(config, model=replace(model, vocab_size=vocab_size, padded_vocab_size=padded))
