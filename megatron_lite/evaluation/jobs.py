"""Evaluation jobs: a corpus with the windows by which it is scored, and the metrics computed from the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.manifest import check_manifest
from megatron_lite.errors import DataError
from megatron_lite.evaluation.corpora import Corpus, Documents
from megatron_lite.evaluation.lambada import Passages, lambada_metrics, last_word_spans
from megatron_lite.evaluation.perplexity import TextLoss, check_stride, require_tokens, text_spans
from megatron_lite.evaluation.scoring import Score, Span
from megatron_lite.tokenizer.base import Tokenizer

ScoreSpans = Callable[[Sequence[Span]], list[Score]]


@dataclass(frozen=True)
class Windows:
    """Windows of an evaluation.

    Attributes:
        seq_length: tokens of a window.
        stride: distance between starts of windows.
        prepend_bos: begin each text with the beginning-of-text token instead of the end-of-document token.
        limit: number of tokens of a dataset, of passages, documents or samples; None: all.
    """

    seq_length: int
    stride: int
    prepend_bos: bool = False
    limit: int | None = None

    def settings(self, **others: Any) -> dict[str, Any]:
        """Return the settings that identify an evaluation; flags that are not given are left out."""
        given = {"prepend_bos": self.prepend_bos or None, "limit": self.limit}
        return {"seq_length": self.seq_length, **others, **{name: v for name, v in given.items() if v is not None}}

    def context(self, tokenizer: Tokenizer) -> list[int]:
        """Return the token before a text: the end of another document, as in training; [] if there is no such token."""
        if self.prepend_bos:
            return [tokenizer.bos]
        try:
            return [tokenizer.eod]
        except DataError:
            return []

    def text(self, tokenizer: Tokenizer, text: str) -> NDArray[np.integer]:
        """Return the ids of a text after its context, [n] int32."""
        return np.asarray([*self.context(tokenizer), *tokenizer.encode(text)], np.int32)


@dataclass(frozen=True)
class Measured:
    """Metrics of a job, and those of its subsets by name."""

    metrics: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Job:
    """Task to evaluate on any checkpoint of a run.

    Attributes:
        task: see Evaluation.
        name: file as given.
        settings: see Evaluation.
        measure: computes the metrics with the tokenizer and a function that scores spans.
    """

    task: str
    name: str
    settings: Mapping[str, Any]
    measure: Callable[[Tokenizer, ScoreSpans], Measured]


def corpus_job(corpus: Corpus, windows: Windows) -> Job:
    """Return the job of a text that is scored as one document.

    Raises:
        ConfigError: the stride is longer than the window.
    """
    check_stride(windows.stride, windows.seq_length)
    settings = windows.settings(stride=windows.stride, fingerprint=corpus.fingerprint)
    settings.pop("limit", None)
    return Job(corpus.task, corpus.name, settings, partial(_measure_corpus, corpus, windows))


def dataset_job(prefix: str, windows: Windows) -> Job:
    """Return the job of a .bin/.idx dataset, whose documents are scored as one text.

    Raises:
        DataError: the dataset is missing or damaged.
        ConfigError: the stride is longer than the window.
    """
    check_stride(windows.stride, windows.seq_length)
    dataset = IndexedDataset(prefix)
    size = bin_path(prefix).stat().st_size
    settings = windows.settings(stride=windows.stride, data=Path(prefix).name, bytes=size)
    settings.pop("prepend_bos", None)
    return Job("dataset", prefix, settings, partial(_measure_dataset, dataset, prefix, windows))


def lambada_job(passages: Passages, windows: Windows) -> Job:
    """Return the job of a LAMBADA file."""
    settings = windows.settings(fingerprint=passages.fingerprint, variant=passages.variant)
    return Job("lambada", passages.name, settings, partial(_measure_lambada, passages, windows))


def documents_job(documents: Documents, windows: Windows) -> Job:
    """Return the job of documents that are scored one by one, as the Pile's (Gao et al. 2020, section 3.1).

    Raises:
        ConfigError: the stride is longer than the window.
    """
    check_stride(windows.stride, windows.seq_length)
    settings = windows.settings(stride=windows.stride, fingerprint=documents.fingerprint)
    return Job("documents", documents.name, settings, partial(_measure_documents, documents, windows))


def _measure_corpus(corpus: Corpus, windows: Windows, tokenizer: Tokenizer, score: ScoreSpans) -> Measured:
    ids = windows.text(tokenizer, corpus.text)
    require_tokens(ids, corpus.name)
    loss = TextLoss.of(score(text_spans(ids, windows.seq_length, windows.stride)))
    metrics = _token_metrics(loss)
    if corpus.num_characters is not None:
        metrics |= {"characters": corpus.num_characters, "bits_per_character": loss.bits_per(corpus.num_characters)}
    else:
        metrics |= {"bytes": corpus.num_bytes, "bits_per_byte": loss.bits_per(corpus.num_bytes)}
    if corpus.num_words:
        metrics |= {"words": corpus.num_words, "word_perplexity": loss.perplexity_per(corpus.num_words)}
    return Measured(metrics)


def _measure_dataset(
    dataset: IndexedDataset, prefix: str, windows: Windows, tokenizer: Tokenizer, score: ScoreSpans
) -> Measured:
    check_manifest(prefix, tokenizer.fingerprint())
    wanted = dataset.num_tokens if windows.limit is None else windows.limit + 1
    parts: list[NDArray[np.generic]] = []
    count = 0
    for number in range(dataset.num_documents):
        if count >= wanted:
            break
        parts.append(dataset.document(number)[: wanted - count])
        count += len(parts[-1])
    ids = np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)
    require_tokens(ids, prefix)
    return Measured(_token_metrics(TextLoss.of(score(text_spans(ids, windows.seq_length, windows.stride)))))


def _measure_lambada(passages: Passages, windows: Windows, tokenizer: Tokenizer, score: ScoreSpans) -> Measured:
    prefix = windows.context(tokenizer) if windows.prepend_bos else []
    spans = last_word_spans(passages, tokenizer.encode, prefix, windows.seq_length)[: windows.limit]
    return Measured(lambada_metrics(score(spans), sum(span.begin > 0 for span in spans)))


def _measure_documents(documents: Documents, windows: Windows, tokenizer: Tokenizer, score: ScoreSpans) -> Measured:
    wanted = documents.documents[: windows.limit]
    spans = [
        text_spans(windows.text(tokenizer, document.text), windows.seq_length, windows.stride) for document in wanted
    ]
    scores = iter(score([span for of_document in spans for span in of_document]))
    losses = [TextLoss.of([next(scores) for _ in of_document]) for of_document in spans]
    sizes = [len(document.text.encode()) for document in wanted]
    subsets: dict[str, list[int]] = {}
    for number, document in enumerate(wanted):
        subsets.setdefault(document.subset, []).append(number)
    parts = {name: _document_metrics([(losses[n], sizes[n]) for n in numbers]) for name, numbers in subsets.items()}
    whole = _document_metrics(list(zip(losses, sizes, strict=True)))
    return Measured(whole, parts if subsets.keys() != {""} else {})


def _document_metrics(documents: Sequence[tuple[TextLoss, int]]) -> dict[str, float]:
    """Return metrics of documents, given by loss and bytes: over all bytes, and the mean bits/byte of a document."""
    size = sum(of_document for _, of_document in documents)
    loss = TextLoss(math.fsum(one.total for one, _ in documents), sum(one.tokens for one, _ in documents))
    return {
        "documents": len(documents),
        "tokens": loss.tokens,
        "loss": loss.mean if loss.tokens else math.nan,
        "bytes": size,
        "bits_per_byte": loss.bits_per(size),
        "mean_bits_per_byte": math.fsum(one.bits_per(size) for one, size in documents) / len(documents),
    }


def _token_metrics(loss: TextLoss) -> dict[str, float]:
    return {"tokens": loss.tokens, "loss": loss.mean, "perplexity": loss.perplexity}
