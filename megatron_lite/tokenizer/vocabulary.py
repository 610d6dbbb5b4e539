"""The vocabulary's size as the model sees it: padded, so that every tensor-parallel rank holds equally many rows."""

from __future__ import annotations

from megatron_lite.errors import ConfigError


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int, fixed: int = 0) -> int:
    """Megatron's padded vocabulary: the next multiple of `divisible_by * tp`, or `fixed` (--pad-vocab-size-to).

    >>> padded_vocab_size(50257, 128, 1), padded_vocab_size(50257, 128, 4)
    (50304, 50688)

    Raises:
        ConfigError: `fixed` is smaller than the vocabulary or not divisible by `tp`.
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
