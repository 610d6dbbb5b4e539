"""Supervised finetuning data: JSON lines of prompt and completion or of chats, parsed into prompts and answers.

A document is a tuple of texts, alternately prompt and answer. They are tokenized one by one, as at inference, where the
prompt is known alone; the loss mask is 1 for the tokens of answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.format.loss_mask import MASK_TYPE
from megatron_lite.data.preparation.batch import Batch
from megatron_lite.data.preparation.chat import ChatTemplate, TemplateError
from megatron_lite.data.preparation.documents import (
    SURROGATE,
    BadLineError,
    ParsedBatch,
    parse_object,
    text_of,
    value_of,
)
from megatron_lite.data.preparation.lines import LineBatch
from megatron_lite.tokenizer.base import TokenBatch


class AnswerParser:
    """Parser of batches of JSON lines into segments.

    Args:
        keys: of prompt and completion, or of the messages of a chat.
        template: renders chats; None: lines hold prompts with completions.
    """

    def __init__(self, keys: tuple[str, ...], template: ChatTemplate | None) -> None:
        self.keys = keys
        self.template = template

    def parse(self, batch: LineBatch, chosen: npt.NDArray[np.bool_]) -> ParsedBatch:
        """Return the documents of the lines of a mask, [lines]."""
        parsed = ParsedBatch([[]])
        for row in np.flatnonzero(chosen).tolist():
            try:
                line = batch.line(row)
                entry = parse_object(line)
                if entry is None:
                    parsed.blank += 1
                    continue
                segments = self._segments(entry, line.content)
            except BadLineError as error:
                parsed.bad.append((row, str(error)))
                continue
            parsed.rows.append(row)
            parsed.texts[0].append(segments)
        return parsed

    def _segments(self, entry: dict[str, Any], content: bytes) -> tuple[str, ...]:
        if self.template is None:
            texts = tuple(text_of(entry, key, content) for key in self.keys)
            if not texts[-1].strip():
                raise BadLineError(f"the answer under {self.keys[-1]!r} is empty")
            return texts
        messages = value_of(entry, self.keys[0])
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise BadLineError(f"the value of {self.keys[0]!r} is not a list of messages with role and content")
        try:
            segments = self.template.segments(messages)
        except TemplateError as error:
            raise BadLineError(str(error)) from error
        if b"\\u" in content and any(map(SURROGATE.search, segments)):
            raise BadLineError(f"half a surrogate pair in {self.keys[0]!r}")
        return segments


def segment_batch(encoded: TokenBatch, counts: npt.NDArray[np.int64]) -> Batch:
    """Join the segments of documents to one sequence each.

    Args:
        encoded: tokens of the segments of all documents.
        counts: [documents] number of segments of each.
    """
    document = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = np.repeat((place % 2).astype(MASK_TYPE), encoded.lengths)
    lengths = np.bincount(document, weights=encoded.lengths, minlength=len(counts)).astype(np.int64)
    filled = lengths > 0
    # The first token of a document is predicted from the document before it.
    mask[(np.cumsum(lengths) - lengths)[filled]] = 0
    return Batch(encoded.ids, lengths[filled], filled.astype(np.int64), mask)
