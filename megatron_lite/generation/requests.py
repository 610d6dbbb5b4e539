"""Generation requests: prompt, limits and sampling of one text, context length, and the generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count
from megatron_lite.generation.sampling import Sampling

FinishReason = Literal["eod", "length", "stop", "interrupted"]
"""Why a text ends: end-of-document token, max_new_tokens, the caller (a stop string), Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: maximum number of new tokens.
        sampling: sampling parameters.
        seed: of the text's own random generator.
        name: of the prompt, for errors.
        limit: flag or key of max_new_tokens, for errors.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    name: str = "The prompt"
    limit: str = "--max-new-tokens"


@dataclass
class Generated:
    """New tokens of one text.

    Attributes:
        tokens: ids, without the end-of-document token.
        log_probs: log-probability of each token under the model (temperature 1, all tokens).
        eod_log_prob: log-probability of the end-of-document token that ends the text; None: it ends otherwise.
        reason: why the text ends.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    eod_log_prob: float | None = None
    reason: FinishReason = "length"

    @property
    def log_prob(self) -> float:
        """Sum of the log-probabilities of all tokens that the model has chosen, end-of-document included."""
        return sum(self.log_probs) + (self.eod_log_prob or 0.0)

    @property
    def mean_log_prob(self) -> float:
        """Mean of the log-probabilities that log_prob adds up."""
        return self.log_prob / max(1, len(self.log_probs) + (self.eod_log_prob is not None))


@dataclass(frozen=True)
class Context:
    """Tokens that the model attends to.

    Attributes:
        length: maximum number of tokens.
        step: tokens that are dropped at the beginning whenever a text outgrows `length` (sliding window); 0: longer
            texts are refused.
    """

    length: int
    step: int = 0

    def start(self, tokens: int) -> int:
        """Return the first token in the window of a text of so many tokens; it depends on the text's length only."""
        excess = tokens - self.length
        return -(-excess // self.step) * self.step if excess > 0 else 0


def check_request(request: Request, model: ModelConfig, context: Context) -> None:
    """Check a request against the vocabulary and the context of the model.

    Raises:
        ConfigError: the prompt is empty, has an id outside the vocabulary, or is too long.
    """
    prompt, name = request.prompt, request.name
    if not prompt:
        raise ConfigError(f"{name} has no tokens", fix="Write text in the prompt")
    if max(prompt) >= model.vocab_size or min(prompt) < 0:
        raise ConfigError(
            f"{name} has token ids from {min(prompt)} to {max(prompt)}, but the model's vocabulary has "
            f"{model.vocab_size:,} entries",
            fix="Give the tokenizer with which the model was trained (--tokenizer-type, --tokenizer-model)",
        )
    left = context.length - len(prompt)
    if context.step or request.max_new_tokens <= left:
        return
    # Learned positions end with their table; others may be extrapolated.
    learned = model.position_embedding == "learned"
    needed = len(prompt) + request.max_new_tokens
    new = ("at least " if request.max_new_tokens == 1 else "") + format_count(request.max_new_tokens, "new token")
    unit = "learned position" if learned and context.length == model.max_position_embeddings else "token"
    if left > 0:
        fixes = [f"use {request.limit} {left} or less"]
    else:
        fixes = [f"shorten the prompt to {format_count(context.length - 1, 'token')}"] if context.length > 1 else []
    if not learned:
        fixes.append(f"add --context {needed} to extrapolate")
    elif needed <= model.max_position_embeddings:
        fixes.append(f"use --context {needed} or more")
    fix = ", or ".join([*fixes, "add --sliding-window to drop the oldest tokens"])
    raise ConfigError(
        f"{name} of {format_count(len(prompt), 'token')} and {new} ({request.limit}) "
        f"exceed the context of {format_count(context.length, unit)}",
        fix=fix[0].upper() + fix[1:],
    )
