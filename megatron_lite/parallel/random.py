"""Dropout random streams: stateless seeds from (run seed, site, layer, iteration, micro-batch).

No generator state has to be saved, recomputation draws the same mask again, and masks do not depend on the layout.

Seeding a generator is a side effect, which a graph of torch.compile cannot hold, and a seed would become a constant of
the graph. In traced code custom operators set the seed; their inputs hold everything that it depends on.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from megatron_lite.backend.base import Backend
from megatron_lite.backend.seeding import seed_generator


class RngStreams:
    """Draws dropout masks from the device's generator, which is seeded at each dropout site.

    Args:
        seed: the run's seed.
        backend: seeds the generator of its device.
        tp_rank: tensor-parallel coordinate; part of the seed only where activations are split over tp.
        cp_rank: context-parallel coordinate; part of every seed, since all activations are split over cp.
    """

    def __init__(self, seed: int, backend: Backend, tp_rank: int = 0, cp_rank: int = 0) -> None:
        self._backend = backend
        self._fixed = seed, tp_rank, cp_rank
        self.set_microbatch(0, 0)

    def set_microbatch(self, iteration: int, microbatch: int) -> None:
        """Set the micro-batch that the following forward, or backward with recomputation, belongs to.

        Args:
            iteration: number of the iteration.
            microbatch: number of the micro-batch in the global batch, the same whichever replica runs it.
        """
        seed, tp_rank, cp_rank = self._fixed
        # A tensor on the host, and a new one each time: a compiled graph may keep the previous one for its backward.
        self._position = torch.tensor([seed, iteration, microbatch, tp_rank, cp_rank], dtype=torch.int64, device="cpu")

    def dropout(
        self, x: Tensor, rate: float, site: str, layer: Tensor, split: bool, after: Tensor | None = None
    ) -> Tensor:
        """Return `x` after dropout; called only in training and where the rate is above 0.

        Args:
            x: an activation.
            rate: probability of an element to become 0.
            site: name of the dropout within the layer.
            layer: number of the layer in the whole model (-1: the embedding), as a host tensor (layer_number).
            split: whether the activation is split over tp, so that masks must differ between tp ranks.
            after: result of an operation that uses a seed and must have run before.
        """
        if torch.compiler.is_compiling():
            return _dropout(x, rate, self._position, site, layer, split, after)[0]
        self.reseed(site, layer, split)
        # As GPUs run F.dropout: for backward it keeps a mask of a byte an element, on every device.
        return torch.native_dropout(x, rate, True)[0]

    def seeded(self, x: Tensor, site: str, layer: Tensor, split: bool) -> Tensor:
        """Return `x`; an operation with dropout that uses the result draws its mask from this site's stream.

        Args: as for dropout.
        """
        if torch.compiler.is_compiling():
            # The sum makes the operation depend on the seed, so that the compiler keeps their order.
            return x + _seed(x, self._position, site, layer, split)
        self.reseed(site, layer, split)
        return x

    def reseed(self, site: str, layer: Tensor, split: bool) -> None:
        """Seed the device's generator for a site; not in code that torch.compile traces. Args: as for dropout."""
        self._backend.seed(stream_seed(self._position, site, layer, split))


def layer_number(layer: int) -> Tensor:
    """Return the number of a layer as a host tensor: an integer would be compiled into a graph of its own per layer."""
    return torch.tensor(layer, dtype=torch.int64, device="cpu")


def stream_seed(position: Tensor, site: str, layer: Tensor, split: bool) -> int:
    """Return the seed of a stream; `position` is (run seed, iteration, micro-batch, tp rank, cp rank)."""
    seed, iteration, microbatch, tp_rank, cp_rank = position.tolist()
    key = f"{seed}/{site}/{int(layer)}/{iteration}/{microbatch}/{tp_rank if split else -1}"
    key += f"/{cp_rank}" if cp_rank else ""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


@torch.library.custom_op(
    "megatron_lite::seeded_dropout",
    mutates_args=(),
    schema="(Tensor x, float rate, Tensor position, str site, Tensor layer, bool split, Tensor? after) "
    "-> (Tensor, Tensor)",
)
def _dropout(
    x: Tensor, rate: float, position: Tensor, site: str, layer: Tensor, split: bool, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `x` after dropout, and the mask of the elements that are kept."""
    seed_generator(x.device, stream_seed(position, site, layer, split))
    return torch.native_dropout(x, rate, True)


@_dropout.register_fake
def _(
    x: Tensor, rate: float, position: Tensor, site: str, layer: Tensor, split: bool, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.scale = 1.0 / (1.0 - inputs[1]) if inputs[1] < 1.0 else 0.0


def _dropout_backward(ctx: Any, gradient: Tensor, of_mask: Tensor | None) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return gradient * mask * ctx.scale, None, None, None, None, None, None


_dropout.register_autograd(_dropout_backward, setup_context=_keep_mask)


@torch.library.custom_op(
    "megatron_lite::seed",
    mutates_args=(),
    schema="(Tensor x, Tensor position, str site, Tensor layer, bool split) -> Tensor",
)
def _seed(x: Tensor, position: Tensor, site: str, layer: Tensor, split: bool) -> Tensor:
    """Seed the generator of the device of `x`, once `x` is computed; return a zero of its dtype."""
    seed_generator(x.device, stream_seed(position, site, layer, split))
    return x.new_zeros(())


@_seed.register_fake
def _(x: Tensor, position: Tensor, site: str, layer: Tensor, split: bool) -> Tensor:
    return x.new_empty(())


_seed.register_autograd(lambda ctx, gradient: (None, None, None, None, None))
