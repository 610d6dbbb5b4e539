"""Dropout without state: every mask is a function of the seed and of where in the run it is drawn.

So no generator needs saving, recomputation draws the same mask again, and how the ranks are laid out changes none.
"""

from __future__ import annotations

import hashlib

import torch

from megatron_lite.backend.base import Backend


class RngStreams:
    """Seeds the device's generator at each dropout site from (seed, site, layer, iteration, micro-batch).

    Args:
        seed: the run's seed.
        backend: whose generator is seeded.
        tp_rank: coordinate on the tp axis; it enters the seed only where activations are split along it.
    """

    def __init__(self, seed: int, backend: Backend, tp_rank: int = 0) -> None:
        self._seed = seed
        self._backend = backend
        self._tp_rank = tp_rank
        self._position = (0, 0)

    def at(self, iteration: int, microbatch: int) -> None:
        """Says which micro-batch comes next; called before each forward and, for recomputation, each backward.

        Args:
            iteration: the iteration under way.
            microbatch: the micro-batch's number in the global batch, the same whichever replica runs it.
        """
        self._position = (iteration, microbatch)

    # It changes a generator that no graph can hold, with numbers that no graph may freeze.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, site: str, layer: int, split: bool) -> None:
        """Seeds the generator for the dropout that follows. Not to be called where nothing is dropped.

        Args:
            site: which dropout of the layer.
            layer: the layer's number in the whole model (-1: the embedding).
            split: whether tp ranks hold different parts of the activation, so that their masks must differ.
        """
        rank = self._tp_rank if split else -1
        key = f"{self._seed}/{site}/{layer}/{self._position[0]}/{self._position[1]}/{rank}"
        self._backend.seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1)
