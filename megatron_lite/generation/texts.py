"""Text generation for prompts: encoding, decoding with stop strings, several samples and best-of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_lite.errors import ConfigError, DataError
from megatron_lite.generation.generate import generate
from megatron_lite.generation.prompts import Prompt
from megatron_lite.generation.requests import Context, Generated, Request
from megatron_lite.generation.restore import TrainedModel, naming_checkpoint
from megatron_lite.generation.results import Result
from megatron_lite.generation.stream import StopStrings, TextStream
from megatron_lite.tokenizer.base import Tokenizer

T = TypeVar("T")
MAX_NEW_TOKENS = 128
"""Default of --max-new-tokens, where the context leaves as many."""


@dataclass(frozen=True, eq=False)
class TextGenerator:
    """Generator of texts with a trained model.

    Attributes:
        model: the model.
        context: maximum length, or sliding window.
        batch_size: texts that are generated at once.
        eod: end-of-document token; None: the tokenizer has none, and texts end at their maximum length.
        prefix: token ids before every prompt (--prepend-bos).
    """

    model: TrainedModel
    context: Context
    batch_size: int
    eod: int | None
    prefix: Sequence[int] = ()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        on_piece: Callable[[str], None] = lambda piece: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, list[Result]]]:
        """Check the prompts; return an iterator over the number of each and its texts, in the order of their ends.

        Args:
            prompts: the prompts.
            on_piece: called with each new piece of text, for a single text.
            interrupted: see generate.

        Raises:
            ConfigError: see check_request; nothing has been generated.
            TrainingError: see generate.
        """
        owners = [number for number, prompt in enumerate(prompts) for _ in range(prompt.settings.num_generated)]
        requests = [self._request(prompt, n) for prompt in prompts for n in range(prompt.settings.num_generated)]
        texts = [
            _Text(self.model.tokenizer, request.prompt, prompts[owner].settings.stop)
            for request, owner in zip(requests, owners, strict=True)
        ]

        def on_token(number: int, token: int) -> bool:
            on_piece(texts[number].push(token))
            return texts[number].stopped

        generated = generate(
            self.model.stage,
            requests,
            context=self.context,
            eod=self.eod,
            pp=self.model.mesh.pp,
            batch_size=self.batch_size,
            on_token=on_token,
            interrupted=interrupted,
        )

        def complete() -> Iterator[tuple[int, list[Result]]]:
            ended: dict[int, dict[int, Generated]] = {}
            with naming_checkpoint(self.model.path):
                for number, one in generated:
                    on_piece(texts[number].flush())
                    of_prompt = ended.setdefault(owners[number], {})
                    of_prompt[number] = one
                    if len(of_prompt) == prompts[owners[number]].settings.num_generated:
                        yield owners[number], _select(prompts[owners[number]], requests, texts, of_prompt)
                        del ended[owners[number]]

        return complete()

    def _request(self, prompt: Prompt, sample: int) -> Request:
        settings = prompt.settings
        ids = [*self.prefix, *self.model.tokenizer.encode(prompt.text)]
        if not ids and self.eod is not None:
            # As documents do in training.
            ids = [self.eod]
        left = self.context.length - len(ids)
        default = MAX_NEW_TOKENS if self.context.step else max(1, min(MAX_NEW_TOKENS, left))
        return Request(
            prompt=ids,
            max_new_tokens=settings.max_new_tokens or default,
            sampling=settings.sampling,
            # By sample number: the texts of a prompt do not depend on the other prompts.
            seed=settings.seed + sample,
            name=prompt.name,
            limit=prompt.limit,
        )


def _select(
    prompt: Prompt, requests: Sequence[Request], texts: Sequence[_Text], generated: Mapping[int, Generated]
) -> list[Result]:
    """Return the texts of a prompt in the order of their seeds; with best-of the likeliest per token, in that order.

    Args:
        prompt: the prompt.
        requests: of all prompts.
        texts: of the requests.
        generated: tokens of the prompt's requests, by number.
    """
    numbers = sorted(generated)
    if prompt.settings.best_of:
        numbers.sort(key=lambda number: -generated[number].mean_log_prob)
    return [
        Result(sample, requests[number].seed, texts[number].text, generated[number])
        for sample, number in enumerate(numbers[: prompt.settings.num_samples])
    ]


class _Text:
    """Text of a request while it is generated, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, prompt)
        self._stop = StopStrings(stop)
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Return whether a stop string is complete."""
        return self._stop.found

    def push(self, token: int) -> str:
        """Add a token; return the new text."""
        return self._add(self._stop.push(self._stream.push(token)))

    def flush(self) -> str:
        """Return the rest of the text."""
        return self._add(self._stop.push(self._stream.flush()) + self._stop.flush())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece


def in_order(items: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Yield items in the order of their numbers 0, 1, …, each as soon as those before it are there."""
    waiting: dict[int, T] = {}
    due = 0
    for number, item in items:
        waiting[number] = item
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def context_of(model: TrainedModel, length: int = 0, step: int | None = None) -> Context:
    """Return the context of a model.

    Args:
        model: the model.
        length: --context; 0: the learned positions, or the longer of --seq-length and --max-position-embeddings of the
            training.
        step: --sliding-window; 0: half of the context; None: no sliding window.

    Raises:
        ConfigError: the context is longer than the learned positions, or the step longer than the context.
    """
    config = model.config.model
    learned = config.position_embedding == "learned"
    longest = config.max_position_embeddings
    trained = longest if learned else max(longest, model.config.batch.seq_length)
    if learned and length > longest:
        raise ConfigError(
            f"--context {length} is longer than the model's table of {longest} learned positions",
            fix=f"Use --context {longest} or less, and --sliding-window for longer texts",
        )
    length = length or trained
    if step is None:
        return Context(length)
    if step > length:
        raise ConfigError(
            f"--sliding-window {step} drops more tokens than the context of {length} has",
            fix=f"Use --sliding-window {max(1, length // 2)}, or without a number for half of the context",
        )
    return Context(length, step or max(1, length // 2))


def end_of_document(tokenizer: Tokenizer) -> int | None:
    """Return the id of the end-of-document token; None if the tokenizer has none."""
    try:
        return tokenizer.eod
    except DataError:
        return None
