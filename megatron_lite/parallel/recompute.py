"""Activation recomputation (checkpointing): selects layers and runs their forward again in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lite.backend.xla import checkpoint_with_barrier


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run `function`, keep only its arguments, and run it again in backward.

    The generator's state is not saved: dropout reseeds at each site (parallel/random.py) and draws the same masks.
    """
    if args[0].device.type == "xla":
        return checkpoint_with_barrier(function, *args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def run_units(
    x: Tensor, layers: Sequence[Callable[..., Tensor]], units: Sequence[tuple[range, bool]], *context: Any
) -> Tensor:
    """Run `x` [s, b, h] through the layers, recomputing the units that are marked -> [s, b, h].

    Args:
        x: hidden states.
        layers: called as layer(x, *context).
        units: from recompute_units.
        context: further arguments of every layer.
    """

    def run(x: Tensor, numbers: range) -> Tensor:
        for number in numbers:
            x = layers[number](x, *context)
        return x

    for numbers, again in units:
        x = recomputed(run, x, numbers) if again else run(x, numbers)
    return x
