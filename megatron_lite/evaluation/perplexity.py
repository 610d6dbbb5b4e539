"""Text loss over sliding windows, and the derived perplexity, bits per byte and word perplexity.

Every token but the first is predicted exactly once. Letters: n tokens of the text, s tokens per window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import ConfigError
from megatron_lite.evaluation.scoring import Score, Span
from megatron_lite.formatting import format_count


@dataclass(frozen=True)
class TextLoss:
    """Cross entropy of a text, in nats.

    Attributes:
        total: sum over the predicted tokens.
        tokens: number of predicted tokens.
    """

    total: float
    tokens: int

    @classmethod
    def of(cls, scores: Sequence[Score]) -> TextLoss:
        """Return the loss of a text from the scores of its windows."""
        return cls(math.fsum(score.loss for score in scores), sum(score.tokens for score in scores))

    @property
    def mean(self) -> float:
        """Loss per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean), or infinity on overflow."""
        return self.perplexity_per(self.tokens)

    def perplexity_per(self, units: int) -> float:
        """Return exp(total / units), or infinity on overflow; per word it is comparable between tokenizers."""
        mean = self.total / units
        return math.exp(mean) if mean < 700.0 else math.inf

    def bits_per(self, units: int) -> float:
        """Return bits per unit; per byte or character they are comparable between tokenizers."""
        return self.total / units / math.log(2.0)


@dataclass(frozen=True)
class Window:
    """Window with inputs [start, end) of the text, whose predictions count from input `fresh` on."""

    start: int
    end: int
    fresh: int


def windows(length: int, size: int, stride: int) -> Iterator[Window]:
    """Yield windows of `size` inputs, `stride` apart; each token but the first counts in exactly one window.

    A stride below the size gives every prediction after the first window at least size - stride tokens of context, at
    higher cost.
    """
    predicted = 0
    for start in range(0, max(0, length - 1), stride):
        end = min(start + size, length - 1)
        yield Window(start, end, predicted)
        predicted = end
        if end == length - 1:
            return


def text_spans(ids: NDArray[np.integer], seq_length: int, stride: int = 0) -> list[Span]:
    """Return the spans by which all tokens of a text but the first are predicted.

    Args:
        ids: token ids of the text, [n]; none for fewer than two.
        seq_length: s.
        stride: distance between starts of windows; 0: s, without overlap.
    """
    return [
        Span(ids, window.start, window.fresh + 1, window.end + 1)
        for window in windows(len(ids), seq_length, stride or seq_length)
    ]


def require_tokens(ids: Sequence[int] | NDArray[np.integer], name: str) -> None:
    """Require the two tokens that a loss needs.

    Raises:
        ConfigError: the text has fewer.
    """
    if len(ids) < 2:
        raise ConfigError(
            f"The text {name} has {format_count(len(ids), 'token')}, and a loss needs at least 2",
            fix="Give a longer text",
        )


def check_stride(stride: int, seq_length: int) -> None:
    """Check --stride against a window.

    Raises:
        ConfigError: it is longer than the window, so that tokens between windows would not be predicted.
    """
    if stride > seq_length:
        raise ConfigError(
            f"--stride {stride} is outside 1 to {seq_length} (--seq-length {seq_length}): tokens between the windows "
            "would not be predicted",
            fix=f"Use --stride 1 to {seq_length}, for example --stride {max(1, seq_length // 2)}",
        )
