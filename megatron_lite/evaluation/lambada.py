"""LAMBADA: prediction of the last word of a passage (Paperno et al. 2016), from OpenAI's or the original file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lite.config.text_file import require_text, text_lines
from megatron_lite.errors import DataError
from megatron_lite.evaluation.corpora import fingerprint, json_lines
from megatron_lite.evaluation.scoring import Score, Span


@dataclass(frozen=True)
class Passages:
    """Passages of a LAMBADA file.

    Attributes:
        name: path as given.
        variant: "openai" for JSON lines (lambada_test.jsonl, text with case and punctuation), "original" for plain
            lines (lambada_test_plain_text.txt, lower case and tokenized).
        pairs: context and last word of each passage; the word begins with its space.
        fingerprint: hash of the file's text.
        without_word: line numbers of the passages that end with punctuation instead of a word.
    """

    name: str
    variant: str
    pairs: tuple[tuple[str, str], ...]
    fingerprint: str
    without_word: tuple[int, ...] = ()


def read_lambada(path: str) -> Passages:
    """Return the passages of a file: JSON lines with the key "text", or one passage on each line.

    Raises:
        DataError: the file cannot be read, or a passage has fewer than two words.
    """
    text = require_text(path, "--lambada")
    variant = "openai" if text.lstrip().startswith("{") else "original"
    if variant == "openai":
        passages = [(number, record.get("text")) for number, record in json_lines(text, path, "--lambada")]
    else:
        passages = [(number, line) for number, line in enumerate(text_lines(text), 1) if line.strip()]
    pairs, without_word = [], []
    for number, passage in passages:
        context, _, word = passage.strip().rpartition(" ") if isinstance(passage, str) else ("", "", "")
        if not context or not word:
            raise DataError(
                f"--lambada {path}, line {number}, has no passage of two words or more",
                fix='Give lambada_test.jsonl (JSON lines with the key "text") or lambada_test_plain_text.txt (a '
                "passage on each line)",
            )
        pairs.append((context, f" {word}"))
        if not any(map(str.isalnum, word)):
            without_word.append(number)
    if not pairs:
        raise DataError(f"--lambada {path} has no passages", fix="Give a file with passages")
    return Passages(path, variant, tuple(pairs), fingerprint(text), tuple(without_word))


def last_word_spans(
    passages: Passages, encode: Callable[[str], Sequence[int]], prefix: Sequence[int], seq_length: int
) -> list[Span]:
    """Return the spans of the last words; contexts are cut on the left to the window.

    A passage is encoded as a whole, since the tokens of a word depend on the text before it. The word's tokens are
    those beyond the tokens of the context, as in lm-evaluation-harness.

    Args:
        passages: of the file.
        encode: tokenizer.
        prefix: tokens before each passage, such as the beginning-of-text token.
        seq_length: tokens of a window.
    """
    spans = []
    for context, word in passages.pairs:
        ids = np.asarray([*prefix, *encode(context + word)], np.int32)
        start = min(max(1, len(prefix) + len(encode(context))), len(ids) - 1)
        spans.append(Span(ids, min(max(0, len(ids) - 1 - seq_length), start - 1), start, len(ids)))
    return spans


def lambada_metrics(scores: Sequence[Score], cut_passages: int = 0) -> dict[str, float]:
    """Return last-word accuracy, perplexity per last word, the number of passages, and of those that were cut, if any.

    A word is right if greedy decoding produces all of its tokens. Perplexity is exp of the mean negative log-likelihood
    of a word, all its tokens together.
    """
    mean = math.fsum(score.loss for score in scores) / len(scores)
    return {
        "passages": len(scores),
        **({"cut_passages": cut_passages} if cut_passages else {}),
        "accuracy": sum(score.greedy for score in scores) / len(scores),
        "perplexity": math.exp(mean) if mean < 700.0 else math.inf,
    }
