"""Token scoring: negative log-likelihoods of token spans in their context, over all ranks of a model.

Letters: n tokens of a sequence, s sequence, b batch, h hidden, k scored tokens, V vocabulary, tp size of the
tensor-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import ConfigError, NotFiniteError
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.pipeline.forward import stage_forward

CHUNK = 256
"""Tokens whose logits are computed at once."""

OnTokens = Callable[[int], None]
"""Called with the number of tokens that were scored since the last call, over all replicas."""


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens ids[start:end], to be scored in the context ids[begin:start], which has at least one token.

    Attributes:
        ids: a whole text, [n] integers. Spans of one text share the array.
        begin: first token of the context.
        start: first token to score.
        end: end of the tokens to score.
    """

    ids: NDArray[np.integer]
    begin: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Return the number of input tokens: the last scored token is no input."""
        return self.end - 1 - self.begin


@dataclass(frozen=True)
class Score:
    """Result of a span.

    Attributes:
        loss: negative log-likelihood of the scored tokens, in nats, summed.
        tokens: number of scored tokens.
        greedy: whether each of them is the likeliest token at its place, so that greedy decoding would produce them.
    """

    loss: float
    tokens: int
    greedy: bool


class Scorer:
    """Scores spans with the model of a checkpoint; all ranks of the job call `score` with the same arguments.

    Data-parallel replicas score different batches. Within a replica every rank runs its stage and its shards.

    Args:
        stage: this rank's layers, without sequence parallelism.
        mesh: groups of this rank.
        batch_size: b, spans per batch.
    """

    def __init__(self, stage: GPTStage, mesh: Mesh, batch_size: int) -> None:
        self.stage = stage
        self.mesh = mesh
        self.batch_size = batch_size

    def score(self, spans: Sequence[Span], on_tokens: OnTokens | None = None) -> list[Score]:
        """Return the score of each span; a collective call.

        Spans are batched by length, the longest first, and padded on the right, which causal attention never sees.

        Raises:
            ConfigError: a token is outside the vocabulary, or a span is longer than the model's learned positions.
            TrainingError: a loss is not finite.
        """
        check_spans(spans, self.stage.config)
        order = sorted(range(len(spans)), key=lambda index: -spans[index].length)
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        dp, backend = self.mesh.dp, self.stage.sharding.backend
        # Of each span: summed loss, and number of tokens that are not the likeliest.
        totals = torch.zeros(len(spans), 2, dtype=backend.sum_dtype, device=backend.device)
        was_training = self.stage.training
        self.stage.eval()
        try:
            for number in range(dp.rank, len(batches), dp.size):
                self._run(spans, batches[number], totals)
                if on_tokens is not None:
                    of_replicas = batches[number - dp.rank : number - dp.rank + dp.size]
                    on_tokens(sum(spans[index].end - spans[index].start for batch in of_replicas for index in batch))
        finally:
            self.stage.train(was_training)
        if self.mesh.tp.rank:  # all tensor-parallel ranks have the same values
            totals.zero_()
        self.mesh.world.all_reduce_(totals)
        losses, misses = totals.cpu().T.tolist() if spans else ([], [])
        counts = [span.end - span.start for span in spans]
        if not math.isfinite(total := sum(losses)):
            raise NotFiniteError(
                f"The loss of the text is {total} over {sum(counts):,} tokens", fix="Load another checkpoint"
            )
        return [Score(loss, count, miss == 0) for loss, count, miss in zip(losses, counts, misses, strict=True)]

    @torch.inference_mode()
    def _run(self, spans: Sequence[Span], batch: Sequence[int], totals: Tensor) -> None:
        """Add the losses and misses of a batch of spans, given by their numbers, to their rows of `totals`."""
        rows = [spans[index] for index in batch]
        tokens = np.zeros((len(rows), max(span.length for span in rows)), np.int64)
        for row, span in enumerate(rows):
            tokens[row, : span.length] = span.ids[span.begin : span.end - 1]
        inputs = torch.from_numpy(tokens).to(totals.device)
        hidden = stage_forward(self.stage, self.mesh.pp, MicroBatch(tokens=inputs, labels=inputs))
        if self.stage.output_layer is None:
            return
        # Places of the scored tokens: their row in the batch, and the input position that predicts them.
        row_of = np.concatenate([np.full(span.end - span.start, row) for row, span in enumerate(rows)])
        position = np.concatenate([np.arange(span.start, span.end) - span.begin - 1 for span in rows])
        labels = np.concatenate([span.ids[span.start : span.end] for span in rows]).astype(np.int64)
        number = np.asarray(batch)[row_of]
        at, label, owner = (torch.from_numpy(x).to(totals.device) for x in (position, labels, number))
        scored = hidden[at, torch.from_numpy(row_of).to(totals.device)]
        for first in range(0, len(labels), CHUNK):
            part = slice(first, first + CHUNK)
            logits = self._logits(scored[part])
            losses = F.cross_entropy(logits, label[part], reduction="none").to(totals.dtype)
            missed = (logits.argmax(-1) != label[part]).to(totals.dtype)
            totals.index_add_(0, owner[part], torch.stack((losses, missed), 1))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [k, h] of the last stage -> logits [k, V] in at least fp32, gathered over tp."""
        head, tp = self.stage.output_layer, self.mesh.tp
        assert head is not None, "only the last stage computes logits"
        logits: Tensor = head(hidden.unsqueeze(1)).squeeze(1)
        if tp.size > 1:
            logits = tp.all_gather(logits.t().contiguous()).t()
        return logits[:, : self.stage.config.vocab_size].to(torch.promote_types(logits.dtype, torch.float32))


def check_spans(spans: Sequence[Span], model: ModelConfig) -> None:
    """Check token ids and lengths against vocabulary and positions of the model.

    Raises:
        ConfigError: see Scorer.score.
    """
    check_length(max((span.length for span in spans), default=0), model)
    for ids in {id(span.ids): span.ids for span in spans}.values():
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= model.vocab_size:
            raise ConfigError(
                f"The text has token ids from {least} to {most}, but the model's vocabulary has {model.vocab_size:,} "
                f"entries (ids 0 to {model.vocab_size - 1})",
                fix="Give the tokenizer with which the model was trained, or a dataset that was preprocessed with it",
            )


def check_length(seq_length: int, model: ModelConfig) -> None:
    """Check the length of a window against the positions of the model.

    Raises:
        ConfigError: the model has fewer learned positions.
    """
    if model.position_embedding == "learned" and seq_length > model.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {seq_length} is longer than the model's table of {model.max_position_embeddings} learned "
            "positions",
            fix=f"Use --seq-length {model.max_position_embeddings} or less",
        )
