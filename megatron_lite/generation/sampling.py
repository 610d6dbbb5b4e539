"""Token sampling: repetition penalty, temperature, top-k, top-p and min-p, as pure functions of the logits.

Letters: b batch, V vocabulary (V' with padding).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters, applied in the order repetition_penalty, temperature, top_k, top_p, min_p.

    Each of top_k, top_p and min_p applies to the probabilities of the tokens that the one before has left.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    """Divisor of the logits; 0: greedy."""
    top_k: int = 0
    """Number of likeliest tokens to sample from; 0: all."""
    top_p: float = 1.0
    """Total probability of the likeliest tokens to sample from (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the likeliest token's (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divisor of the positive logits, and factor of the negative ones, of tokens that the text contains already (Keskar
    et al. 2019, CTRL, arXiv:1909.05858); 1: none. It applies to greedy choice, too."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"--temperature {self.temperature} is out of range: it must be 0 (greedy) or more",
                fix="Use, for example, --temperature 0.8",
            )
        if self.top_k < 0:
            raise ConfigError(
                f"--top-k {self.top_k} is out of range: it must be 0 (all tokens) or more",
                fix="Use, for example, --top-k 40, or remove --top-k",
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"--top-p {self.top_p} is out of range: it must be above 0 and at most 1 (all tokens)",
                fix="Use, for example, --top-p 0.9, or remove --top-p",
            )
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(
                f"--min-p {self.min_p} is out of range: it must be from 0 (all tokens) to 1",
                fix="Use, for example, --min-p 0.05, or remove --min-p",
            )
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                f"--repetition-penalty {self.repetition_penalty} is out of range: it must be above 0",
                fix="Use, for example, --repetition-penalty 1.2, or remove --repetition-penalty",
            )

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is always chosen."""
        return self.temperature == 0.0


def candidates(logits: Tensor, sampling: Sampling, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the distribution to sample from.

    Args:
        logits: [b, V'].
        sampling: parameters, not greedy.
        vocab_size: V; padding beyond it is excluded.

    Returns:
        Probabilities [b, V] in float64, descending, with zeros for excluded tokens, and their ids [b, V]. Tokens of
        equal logits are ordered by id.
    """
    ranked, ids = logits[:, :vocab_size].double().sort(dim=-1, descending=True, stable=True)
    # Subtract the maximum first: division by a tiny temperature would overflow.
    probabilities = ((ranked - ranked[:, :1]) / sampling.temperature).softmax(dim=-1)
    if 0 < sampling.top_k < vocab_size:
        probabilities[:, sampling.top_k :] = 0.0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        # The token that reaches top_p is included, so a token is excluded if the tokens before it reach top_p.
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if sampling.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities[:, :1], 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def penalize(logits: Tensor, tokens: Collection[int], penalty: float) -> Tensor:
    """Return the logits [V'] of the next token after the repetition penalty for the tokens of the text."""
    seen = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def choose(logits: Tensor, sampling: Sampling, vocab_size: int, uniform: Tensor) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: [b, V'].
        sampling: sampling parameters.
        vocab_size: V; padding beyond it is never chosen.
        uniform: [b] random numbers in [0, 1), the only randomness: equal numbers choose equal tokens on any device and
            in any batch. Unused if greedy.

    Returns:
        Token ids [b], int64.
    """
    if sampling.greedy:
        return logits[:, :vocab_size].argmax(dim=-1)
    probabilities, ids = candidates(logits, sampling, vocab_size)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    # right=True: the first token with a larger cumulative sum, so never a token of probability 0.
    place = torch.searchsorted(cumulative, drawn, right=True)
    # A parallel cumsum on a GPU may round differently for zero entries and point beyond the last candidate.
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last)).squeeze(1)
