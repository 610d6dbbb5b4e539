"""lm-evaluation-harness model (LM subclass): answers the harness's requests with a checkpoint. Imports lm_eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_lite.evaluation.harness import Generate, Generation
from megatron_lite.evaluation.jobs import ScoreSpans, Windows
from megatron_lite.evaluation.scoring import Span
from megatron_lite.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class HarnessModel(TemplateLM):
    """Model in the sense of lm_eval. It runs on rank 0 and distributes the requests over all ranks itself.

    Tokens and windows are those of lm_eval's `hf` model. Texts begin after the end-of-document token, as in training,
    or after the beginning-of-text token (--prepend-bos).

    Args:
        tokenizer: of the model.
        windows: length of the context.
        score: scores spans.
        generate: continues prompts.
    """

    def __init__(self, tokenizer: Tokenizer, windows: Windows, score: ScoreSpans, generate: Generate) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._windows = windows
        self._score = score
        self._generate = generate

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end-of-document token."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the token before a text."""
        return self._tokenizer.bos if self._windows.prepend_bos else self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, with the beginning-of-text token under --prepend-bos."""
        prefix = [self._tokenizer.bos] if self._windows.prepend_bos and add_special_tokens is not False else []
        return [*prefix, *self._tokenizer.encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and whether greedy decoding would produce it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([self._span(context, continuation) for _, context, continuation in requests])
        return [(-score.loss, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, in windows without overlap of the predicted tokens."""
        spans = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._windows.seq_length,
                context_len=1,
            )
            spans.append([self._span(*make_disjoint_window(pair)) for pair in pairs])
        scores = iter(self._score([span for of_text in spans for span in of_text]))
        return [-sum(next(scores).loss for _ in of_text) for of_text in spans]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each prompt up to its first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1])
            length = self._windows.seq_length
            new = min(options["max_gen_toks"], length - 1)
            prompts = [self.tok_encode(requests[number].args[0])[-(length - new) :] for number in numbers]
            generation = Generation(
                seq_length=length,
                max_new_tokens=new,
                temperature=float(options["temperature"]),
                top_k=int(options.get("top_k") or 0),
                top_p=float(options.get("top_p") or 1.0),
                stop=tuple(term for term in handle_stop_sequences(options.get("until"), None) if term),
            )
            for number, text in zip(numbers, self._generate(prompts, generation), strict=True):
                texts[number] = text
        return texts

    def _span(self, context: Sequence[int], continuation: Sequence[int]) -> Span:
        """Return the span of a continuation whose context is cut on the left to the window."""
        ids = np.asarray([*context, *continuation], np.int32)
        begin = max(0, len(ids) - 1 - self._windows.seq_length)
        return Span(ids, min(begin, len(context) - 1), len(context), len(ids))
