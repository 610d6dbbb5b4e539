"""Keys and values of the tokens seen so far, so that generating a token costs one token's work.

Letters: T tokens at most, t new tokens, b batch, g key/value heads of this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class KVCache:
    """Keys and values [T, b, g, d] of a stage's layers. Rows of the batch move in step, left to right.

    Args:
        layers: the stage's layers, by their numbers in the whole model.
        max_length: T.
        batch_size: b.
        heads: g.
        head_dim: d.
        dtype: of the model's parameters.
        device: where the model lies.
    """

    def __init__(
        self,
        layers: Iterable[int],
        *,
        max_length: int,
        batch_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, max_length, batch_size, heads, head_dim)
        self._store = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}
        self.max_length = max_length
        self.length = 0
        """Tokens that the cache holds."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a layer's key and value [t, b, g, d]; returns those of all tokens so far, [length + t, b, g, d].

        The length moves on only with advance(), once every layer has appended.
        """
        end = self.length + key.shape[0]
        assert end <= self.max_length, f"{end} tokens do not fit a cache of {self.max_length}"
        keys, values = self._store[layer]
        keys[self.length : end] = key
        values[self.length : end] = value
        return keys[:end], values[:end]

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens as seen."""
        self.length += tokens
