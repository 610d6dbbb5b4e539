"""Evaluation metrics from a summed loss: perplexity, bits per byte, word perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_lite.evaluation.perplexity import TextLoss
from megatron_lite.formatting import format_perplexity


@dataclass(frozen=True)
class Figures:
    """One text's loss with the sizes that make it comparable.

    Attributes:
        name: of the text.
        loss: over its tokens.
        num_bytes: of its UTF-8; None where only its tokens are known.
        num_words: in it as it was published; None where only its tokens are known.
    """

    name: str
    loss: TextLoss
    num_bytes: int | None = None
    num_words: int | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, unlike the loss per token."""
        return self.loss.bits_per_byte(self.num_bytes) if self.num_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """exp(total loss / words): comparable between tokenizers, too, and what is published of WikiText."""
        if not self.num_words:
            return None
        mean = self.loss.total / self.num_words
        return math.exp(mean) if mean < 700.0 else math.inf

    def record(self) -> dict[str, Any]:
        """Every figure by its name, as JSON values; an infinite perplexity is a string, for JSON has none."""
        values = {
            "name": self.name,
            "tokens": self.loss.tokens,
            "loss": self.loss.mean,
            "perplexity": self.loss.perplexity,
            "bytes": self.num_bytes,
            "bits_per_byte": self.bits_per_byte,
            "words": self.num_words,
            "word_perplexity": self.word_perplexity,
        }
        return {name: "Infinity" if value == math.inf else value for name, value in values.items() if value is not None}


def in_lines(figures: list[Figures]) -> str:
    """A table of 80 columns or less, but for long names, which have a line of their own."""
    lines = [f"{'tokens':>14}{'loss':>10}{'perplexity':>13}{'bits/byte':>11}{'words':>13}{'word ppl':>12}"]
    for one in figures:
        loss = one.loss
        bits = "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        words = "-" if one.num_words is None else f"{one.num_words:,}"
        word_perplexity = "-" if one.word_perplexity is None else format_perplexity(one.word_perplexity)
        lines.append(one.name)
        lines.append(
            f"{loss.tokens:14,}{loss.mean:10.4f}{format_perplexity(loss.perplexity):>13}{bits:>11}{words:>13}{word_perplexity:>12}"
        )
    return "\n".join(lines)
