"""Token sampling: greedy, temperature, top-k and top-p, as pure functions of the logits.

Letters: b batch, V vocabulary (V' with its padding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Applied in this order: temperature, then top_k, then top_p over what top_k left.

    Raises:
        ConfigError: a value is out of its range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0: greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                "--temperature must be 0 (greedy) or more",
                found=f"--temperature {self.temperature}",
                fix="Try 0.8; lower repeats itself more, higher makes more mistakes",
            )
        if self.top_k < 0:
            raise ConfigError(
                "--top-k must be 0 (all tokens) or more", found=f"--top-k {self.top_k}", fix="Try 40, or leave it out"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                "--top-p must be above 0 and at most 1 (all tokens)",
                found=f"--top-p {self.top_p}",
                fix="Try 0.9, or leave it out",
            )

    @property
    def greedy(self) -> bool:
        """Whether always the likeliest token is taken."""
        return self.temperature == 0.0


def candidates(logits: Tensor, sampling: Sampling, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The distribution to draw from.

    Args:
        logits: [b, V'].
        sampling: not greedy.
        vocab_size: V; padding beyond it is never a candidate.

    Returns:
        Probabilities [b, V] in float64, falling, with zeros at the end for what was filtered out; and their ids [b, V].
        Tokens of equal logits are ordered by id.
    """
    ranked, ids = logits[:, :vocab_size].double().sort(dim=-1, descending=True, stable=True)
    # The largest is taken off first: a tiny temperature would divide the others to infinity.
    probabilities = ((ranked - ranked[:, :1]) / sampling.temperature).softmax(dim=-1)
    if 0 < sampling.top_k < vocab_size:
        probabilities[:, sampling.top_k :] = 0.0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        # The first one that reaches top_p belongs to the set, so a token is out once those before it reach it.
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def choose(logits: Tensor, sampling: Sampling, vocab_size: int, uniform: Tensor) -> Tensor:
    """The next token of each row.

    Args:
        logits: [b, V'].
        sampling: how to choose.
        vocab_size: V; padding beyond it is never chosen.
        uniform: [b] numbers in [0, 1), which stand for all randomness: equal numbers choose equal tokens on any device
            and in any batch. Unused if greedy.

    Returns:
        ids [b] int64.
    """
    if sampling.greedy:
        return logits[:, :vocab_size].argmax(dim=-1)
    probabilities, ids = candidates(logits, sampling, vocab_size)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    # right=True: the first token whose cumulative sum lies above the number, which a token of probability 0 never is.
    place = torch.searchsorted(cumulative, drawn, right=True)
    # A parallel sum on a GPU may round the zeros' sums apart, and so point beyond the last candidate.
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last)).squeeze(1)
