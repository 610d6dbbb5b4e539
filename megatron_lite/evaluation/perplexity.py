"""Text loss over sliding windows: every token is predicted once.

Letters: n tokens of the text, s tokens of a window, b windows at once, V vocabulary, tp the group's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.formatting import format_perplexity
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy


@dataclass(frozen=True)
class TextLoss:
    """The cross entropy of a text, in nats."""

    total: float
    """Sum over the predicted tokens."""
    tokens: int
    """How many were predicted."""

    @property
    def mean(self) -> float:
        """Loss per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean), or infinity where that overflows."""
        return math.exp(self.mean) if self.mean < 700.0 else math.inf

    def bits_per_byte(self, size: int) -> float:
        """Comparable between tokenizers, unlike the loss per token; `size` is the text's length in UTF-8 bytes."""
        return self.total / size / math.log(2.0)


@dataclass(frozen=True)
class Window:
    """Inputs [start, end) of the text; of their predictions those from `fresh` on count."""

    start: int
    end: int
    fresh: int


def windows(length: int, size: int, stride: int) -> Iterator[Window]:
    """Windows of `size` inputs, `stride` apart, so that each token but the first is a fresh prediction exactly once.

    A stride below the size gives every later prediction at least size - stride tokens of context, at more work.
    """
    predicted = 0
    for start in range(0, max(0, length - 1), stride):
        end = min(start + size, length - 1)
        yield Window(start, end, predicted)
        predicted = end
        if end == length - 1:
            return


@torch.inference_mode()
def text_loss(
    stage: GPTStage,
    tokens: Sequence[int] | NDArray[np.generic],
    seq_length: int,
    *,
    stride: int = 0,
    batch_size: int = 8,
    on_tokens: Callable[[int], None] | None = None,
) -> TextLoss:
    """The loss of a text that is longer than the model's context.

    Args:
        stage: the whole model on one pipeline stage; every tp rank calls this alike.
        tokens: the text's ids [n].
        seq_length: s.
        stride: how far apart windows start; 0: s, so that they do not overlap.
        batch_size: b.
        on_tokens: told after every batch how many tokens it predicted.

    Raises:
        ConfigError: the text has less than two tokens, or ids that the model lacks; the model has less than s
            positions; or the stride is not between 1 and s.
        TrainingError: the loss is not finite.
    """
    stride = stride or seq_length
    ids = np.asarray(tokens).astype(np.int64)
    _check(ids, seq_length, stride, stage.config)
    device, tp = stage.sharding.backend.device, stage.sharding.tp
    text = torch.from_numpy(ids).to(device)
    total, count = 0.0, 0
    was_training = stage.training
    stage.eval()
    try:
        for group in _groups(list(windows(len(ids), seq_length, stride)), batch_size):
            inputs = torch.stack([text[window.start : window.end] for window in group])
            labels = torch.stack([text[window.start + 1 : window.end + 1] for window in group])
            logits = stage(None, MicroBatch(tokens=inputs, labels=labels))
            losses = vocab_parallel_cross_entropy(logits, labels.t(), stage.config.vocab_size, tp)
            before = count
            for column, window in enumerate(group):
                fresh = losses[window.fresh - window.start :, column]
                total += float(fresh.double().sum())
                count += fresh.shape[0]
            if on_tokens is not None:
                on_tokens(count - before)
    finally:
        stage.train(was_training)
    if not math.isfinite(total):
        raise TrainingError(
            "The model's loss must be finite",
            found=f"a loss of {total} over {count} tokens",
            fix="Take an earlier checkpoint with --load-iteration: this one's weights are broken",
        )
    return TextLoss(total, count)


def _check(ids: NDArray[np.int64], seq_length: int, stride: int, model: ModelConfig) -> None:
    if len(ids) < 2 or not 1 <= stride <= seq_length:
        raise ConfigError(
            "A loss needs a text of at least two tokens, and windows that leave no gap",
            found=f"{len(ids)} tokens, stride {stride}, sequence length {seq_length}",
            fix="Give more text, or a --stride from 1 to the sequence length",
        )
    if model.position_embedding == "learned" and seq_length > model.max_position_embeddings:
        raise ConfigError(
            "A window must fit the model's learned positions",
            found=f"--seq-length {seq_length}, the model has {model.max_position_embeddings} positions",
            fix="Lower --seq-length",
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= model.vocab_size:
        raise ConfigError(
            "A text's tokens must be in the model's vocabulary",
            found=f"ids from {least} to {most}, the model has {model.vocab_size}",
            fix="Use text or a dataset made with the tokenizer that the model was trained with",
        )


def _groups(found: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of one length, `batch_size` at a time; the last window of a text may be shorter than the others."""
    group: list[Window] = []
    for window in found:
        if group and (len(group) == batch_size or window.end - window.start != group[0].end - group[0].start):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


@dataclass(frozen=True)
class TextMetrics:
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


def format_table(figures: list[TextMetrics]) -> str:
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
