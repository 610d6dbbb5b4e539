"""Text loss over sliding windows, and the derived perplexity, bits per byte and word perplexity.

Every token but the first is predicted exactly once.
Letters: n tokens of the text, s tokens per window, b windows per batch.
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
from megatron_lite.formatting import format_count, format_perplexity
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage


@dataclass(frozen=True)
class TextLoss:
    """Cross entropy of a text, in nats."""

    total: float
    """Sum over the predicted tokens."""
    tokens: int
    """Number of predicted tokens."""

    @property
    def mean(self) -> float:
        """Loss per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean), or infinity on overflow."""
        return math.exp(self.mean) if self.mean < 700.0 else math.inf

    def bits_per_byte(self, size: int) -> float:
        """Return bits per byte of a text of `size` UTF-8 bytes; comparable between tokenizers."""
        return self.total / size / math.log(2.0)


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
    """Return the loss of a text of any length.

    Args:
        stage: the whole model as one pipeline stage; every tp rank calls with the same arguments.
        tokens: token ids of the text, [n].
        seq_length: s.
        stride: distance between starts of windows; 0: s, without overlap.
        batch_size: b.
        on_tokens: called after every batch with the number of predicted tokens.

    Raises:
        ConfigError: the text has fewer than two tokens or ids outside the vocabulary, the model has fewer than s
            positions, or the stride is not between 1 and s.
        TrainingError: the loss is not finite.
    """
    stride = stride or seq_length
    ids = np.asarray(tokens).astype(np.int64)
    _check(ids, seq_length, stride, stage.config)
    head, device = stage.output_layer, stage.sharding.backend.device
    assert head is not None, "the stage is the whole model"
    text = torch.from_numpy(ids).to(device)
    total, count = 0.0, 0
    was_training = stage.training
    stage.eval()
    try:
        for group in _groups(list(windows(len(ids), seq_length, stride)), batch_size):
            inputs = torch.stack([text[window.start : window.end] for window in group])
            labels = torch.stack([text[window.start + 1 : window.end + 1] for window in group])
            hidden = stage(None, MicroBatch(tokens=inputs, labels=labels))
            losses = head.token_losses(hidden, labels.t())
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
            f"The loss of the text is {total} over {count:,} tokens: the weights of this checkpoint contain NaN or "
            "infinity, or "
            "overflow",
            fix="Load an earlier checkpoint with --load-iteration",
        )
    return TextLoss(total, count)


def _check(ids: NDArray[np.int64], seq_length: int, stride: int, model: ModelConfig) -> None:
    if len(ids) < 2:
        raise ConfigError(
            f"The text has {format_count(len(ids), 'token')}, and a loss needs at least 2",
            fix="Give a longer text",
        )
    if not 1 <= stride <= seq_length:
        raise ConfigError(
            f"--stride {stride} is outside 1 to {seq_length} (--seq-length {seq_length})",
            fix=f"Use --stride 1 to {seq_length}, for example --stride {max(1, seq_length // 2)}",
        )
    if model.position_embedding == "learned" and seq_length > model.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {seq_length} is longer than the model's table of {model.max_position_embeddings} learned "
            "positions",
            fix=f"Use --seq-length {model.max_position_embeddings} or less",
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= model.vocab_size:
        raise ConfigError(
            f"The text has token ids from {least} to {most}, but the model's vocabulary has {model.vocab_size:,} "
            f"entries (ids 0 to {model.vocab_size - 1})",
            fix="Give the tokenizer with which the model was trained, or a dataset that was preprocessed with it",
        )


def _groups(found: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Yield batches of windows of equal length; the last window of a text may be shorter."""
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
    """Metrics of one text: loss, and sizes for metrics that are comparable between tokenizers.

    Attributes:
        name: name of the text.
        loss: loss over its tokens.
        num_bytes: UTF-8 bytes of the text; None: unknown (datasets).
        num_words: words of the original text; None: unknown (datasets).
    """

    name: str
    loss: TextLoss
    num_bytes: int | None = None
    num_words: int | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte; comparable between tokenizers, unlike the loss per token."""
        return self.loss.bits_per_byte(self.num_bytes) if self.num_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """exp(total loss / words): comparable between tokenizers; published for WikiText."""
        if not self.num_words:
            return None
        mean = self.loss.total / self.num_words
        return math.exp(mean) if mean < 700.0 else math.inf

    def record(self) -> dict[str, Any]:
        """Return the metrics by name, as JSON values; an infinite perplexity is the string "Infinity"."""
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
    """Return a table of at most 80 columns; names have lines of their own."""
    lines = [f"{'tokens':>14}{'loss':>10}{'perplexity':>13}{'bits/byte':>11}{'words':>13}{'word ppl':>12}"]
    for one in figures:
        loss = one.loss
        bits = "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        words = "-" if one.num_words is None else f"{one.num_words:,}"
        word_perplexity = "-" if one.word_perplexity is None else format_perplexity(one.word_perplexity)
        lines.append(one.name)
        lines.append(
            f"{loss.tokens:14,}{loss.mean:10.4f}{format_perplexity(loss.perplexity):>13}{bits:>11}{words:>13}"
            f"{word_perplexity:>12}"
        )
    return "\n".join(lines)
