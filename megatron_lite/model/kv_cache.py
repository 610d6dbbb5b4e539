"""KV cache for generation: keys and values of earlier tokens, so that a new token costs one token's work.

Letters: T maximum length, t new tokens, b batch, g key/value heads of this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class KVCache:
    """Keys and values [T, b, g, d] of each layer of a stage. All rows of the batch have the same length.

    Args:
        layers: numbers of the stage's layers in the whole model.
        shape: (T, b, g, d).
        dtype: of the model's parameters.
        device: of the model.
    """

    def __init__(
        self, layers: Iterable[int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._store = {layer: torch.empty((2, *shape), dtype=dtype, device=device) for layer in layers}
        self.max_length = shape[0]
        self.length = 0
        """Number of cached tokens."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's key and value [t, b, g, d]; return those of all tokens, [length + t, b, g, d].

        The length changes in advance(), once every layer has appended.
        """
        end = self.length + key.shape[0]
        assert end <= self.max_length, f"{end} tokens exceed the cache's {self.max_length}"
        keys, values = self._store[layer]
        keys[self.length : end] = key
        values[self.length : end] = value
        return keys[:end], values[:end]

    def advance(self, tokens: int) -> None:
        """Add `tokens` to the number of cached tokens."""
        self.length += tokens
