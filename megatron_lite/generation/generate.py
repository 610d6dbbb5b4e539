"""Decoding loop: continuous batching; a request gets the same text as if it were generated alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_lite.backend.group import Group, LocalGroup
from megatron_lite.errors import NotFiniteError
from megatron_lite.generation.cached_model import CachedModel
from megatron_lite.generation.requests import Context, FinishReason, Generated, Request, check_request
from megatron_lite.generation.sampling import Sampling, choose, penalize
from megatron_lite.model.gpt import GPTStage

BATCH_SIZE = 32
"""Default number of texts that are generated at once."""

OnToken = Callable[[int, int], bool]
"""Called with (number of the request, token) for each new token; returns True to end the text (a stop string)."""


def generate(
    stage: GPTStage,
    requests: Sequence[Request],
    *,
    context: Context,
    eod: int | None = None,
    pp: Group | None = None,
    batch_size: int = BATCH_SIZE,
    on_token: OnToken = lambda number, token: False,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Generated]]:
    """Check the requests; return an iterator over the number of each and its text, in the order in which they end.

    A text does not depend on the other requests: each has its own random generator, its own positions and its own
    window. A finished text makes room for the next request. All ranks of a model make the same call and yield the same
    texts.

    Args:
        stage: the stages of this rank, in evaluation mode while texts are generated.
        requests: the texts.
        context: maximum length, or sliding window.
        eod: end-of-document token, which ends a text and is not returned; None: texts end at max_new_tokens.
        pp: pipeline group; None: the stage is the whole model.
        batch_size: texts that are generated at once.
        on_token: called with each new token.
        interrupted: called before each forward pass; True ends all texts.

    Raises:
        ConfigError: see check_request; nothing has been generated.
        TrainingError: from the iterator: the logits are not finite.
    """
    for request in requests:
        check_request(request, stage.config, context)
    return _generate(stage, requests, context, eod, pp or LocalGroup("pp"), batch_size, on_token, interrupted)


def _generate(
    stage: GPTStage,
    requests: Sequence[Request],
    context: Context,
    eod: int | None,
    pp: Group,
    batch_size: int,
    on_token: OnToken,
    interrupted: Callable[[], bool],
) -> Iterator[tuple[int, Generated]]:
    yield from ((number, Generated()) for number, request in enumerate(requests) if not request.max_new_tokens)
    pending = deque((number, request) for number, request in enumerate(requests) if request.max_new_tokens)
    rows = min(batch_size, len(pending))
    if not rows:
        return
    longest = max(min(context.length, len(request.prompt) + request.max_new_tokens) for _, request in pending)
    was_training = stage.training
    stage.eval()
    try:
        model = CachedModel(stage, pp, rows, longest)
        texts: list[_Text | None] = [None] * rows
        while pending or any(texts):
            texts = [text or (_Text(*pending.popleft(), context) if pending else None) for text in texts]
            if not pending and 2 * sum(text is not None for text in texts) <= len(texts):
                kept = [row for row, text in enumerate(texts) if text is not None]
                model.keep(kept)
                texts = [texts[row] for row in kept]
            stop = interrupted()
            finished: dict[int, FinishReason] = {}
            if not stop:
                for row, token, log_prob in _next_tokens(model, texts, stage, pp):
                    text = texts[row]
                    assert text is not None
                    if reason := text.take(token, log_prob, eod, on_token):
                        finished[row] = reason
            for row, text in enumerate(texts):
                if text is not None and (stop or row in finished):
                    text.generated.reason = finished.get(row, "interrupted")
                    texts[row] = None
                    yield text.number, text.generated
            if stop:
                return
    finally:
        stage.train(was_training)


class _Text:
    """State of one text: its tokens, the part of them in the cache, and its random generator.

    Args:
        number: of the request.
        request: the request.
        context: see Context.
    """

    def __init__(self, number: int, request: Request, context: Context) -> None:
        self.number = number
        self.request = request
        self.generated = Generated()
        self.tokens = list(request.prompt)
        self.position = -1
        """Position of the newest token in the cache; -1: the window has to be computed."""
        self._context = context
        self._start = context.start(len(self.tokens))
        # Random numbers from the CPU: a seed gives the same tokens on any device.
        self._generator = torch.Generator().manual_seed(request.seed)

    @property
    def window(self) -> list[int]:
        """Tokens that the model attends to."""
        return self.tokens[self._start :]

    def draw(self) -> Tensor:
        """Return the next random number, [1] float64 from 0 to 1."""
        return torch.rand(1, generator=self._generator, dtype=torch.float64)

    def take(self, token: int, log_prob: float, eod: int | None, on_token: OnToken) -> FinishReason | None:
        """Append a token; return why the text ends, None if it does not."""
        if token == eod:
            self.generated.eod_log_prob = log_prob
            return "eod"
        self.position = len(self.window)
        self.tokens.append(token)
        self.generated.tokens.append(token)
        self.generated.log_probs.append(log_prob)
        if on_token(self.number, token):
            return "stop"
        if len(self.generated.tokens) == self.request.max_new_tokens:
            return "length"
        start = self._context.start(len(self.tokens))
        if start != self._start:
            self._start, self.position = start, -1
        return None


def _next_tokens(
    model: CachedModel, texts: Sequence[_Text | None], stage: GPTStage, pp: Group
) -> Iterator[tuple[int, int, float]]:
    """Compute the new windows if there are any, otherwise the next token of every text.

    Yields:
        Row, chosen token and its log-probability.
    """
    running = {row: text for row, text in enumerate(texts) if text is not None}
    new = {row: text for row, text in running.items() if text.position < 0}
    if new:
        running = new
        logits = model.first(list(new), [text.window for text in new.values()])
    else:
        # The results of rows without a text are ignored, and `first` replaces what they write.
        tokens = [0 if text is None else text.tokens[-1] for text in texts]
        logits = model.next(tokens, [0 if text is None else text.position for text in texts])
        if logits is not None:
            logits = logits[list(running)]
    backend = stage.sharding.backend
    chosen = torch.empty(len(running), 2, dtype=backend.sum_dtype, device=backend.device)
    if logits is not None:
        # Probabilities are computed in float64, on the host if the device has none.
        logits = logits if backend.sum_dtype == torch.float64 else logits.cpu()
        chosen.copy_(_choose(logits, list(running.values()), stage.config.vocab_size))
    pp.broadcast_(chosen, pp.size - 1)
    for row, (token, log_prob) in zip(running, chosen.tolist(), strict=True):
        if token < 0:
            raise NotFiniteError(
                "The model computed NaN or infinite logits for a prompt", fix="Load another checkpoint"
            )
        yield row, int(token), log_prob


def _choose(logits: Tensor, texts: Sequence[_Text], vocab_size: int) -> Tensor:
    """Return the next token of each text and its log-probability, [b, 2] float64; token -1: logits are not finite.

    Args:
        logits: [b, V'].
        texts: of the rows.
        vocab_size: V.
    """
    logits = logits[:, :vocab_size]
    finite = torch.isfinite(logits).all(dim=-1)
    logits = logits.masked_fill(~finite.unsqueeze(1), 0.0)
    log_probs = logits.double().log_softmax(dim=-1)
    # Each text draws once for each of its tokens, whatever texts are beside it.
    uniform = torch.cat([text.draw() for text in texts]).to(logits.device)
    tokens = torch.empty(len(texts), dtype=torch.int64, device=logits.device)
    alike: dict[Sampling, list[int]] = {}
    for row, text in enumerate(texts):
        alike.setdefault(text.request.sampling, []).append(row)
    for sampling, rows in alike.items():
        of_group = logits[rows]
        if sampling.repetition_penalty != 1.0:
            penalized = zip(of_group, rows, strict=True)
            of_group = torch.stack(
                [penalize(x, texts[row].tokens, sampling.repetition_penalty) for x, row in penalized]
            )
        tokens[rows] = choose(of_group, sampling, vocab_size, uniform[rows])
    of_tokens = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return torch.stack([torch.where(finite, tokens, -1).double(), of_tokens], dim=1)
