"""Dropout random streams: stateless seeds from (run seed, site, layer, iteration, micro-batch).

No generator state has to be saved, recomputation draws the same mask again, and masks do not depend on the layout.
"""

from __future__ import annotations

import hashlib

import torch

from megatron_lite.backend.base import Backend


class RngStreams:
    """Seeds the device's generator at each dropout site.

    Args:
        seed: the run's seed.
        backend: seeds the generator of its device.
        tp_rank: tensor-parallel coordinate; part of the seed only where activations are split over tp.
    """

    def __init__(self, seed: int, backend: Backend, tp_rank: int = 0) -> None:
        self._seed = seed
        self._backend = backend
        self._tp_rank = tp_rank
        self._position = (0, 0)

    def set_microbatch(self, iteration: int, microbatch: int) -> None:
        """Set the micro-batch that the following forward, or backward with recomputation, belongs to.

        Args:
            iteration: number of the iteration.
            microbatch: number of the micro-batch in the global batch, the same whichever replica runs it.
        """
        self._position = (iteration, microbatch)

    # Seeding is a side effect, which a graph of torch.compile cannot hold; traced, the seed would become a constant.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def reseed(self, site: str, layer: int, split: bool) -> None:
        """Seed the generator for the dropout that follows; called only where dropout is on.

        Args:
            site: name of the dropout within the layer.
            layer: number of the layer in the whole model (-1: the embedding).
            split: whether the activation is split over tp, so that masks must differ between tp ranks.
        """
        rank = self._tp_rank if split else -1
        key = f"{self._seed}/{site}/{layer}/{self._position[0]}/{self._position[1]}/{rank}"
        self._backend.seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1)
