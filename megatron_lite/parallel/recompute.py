"""Activation recomputation (checkpointing): selects layers and runs their forward again in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.optimizer import RecomputeConfig


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run `function`, keep only its arguments, and run it again in backward.

    The generator's state is not saved: dropout reseeds at each site (parallel/random.py) and draws the same masks.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_units(num_layers: int, recompute: RecomputeConfig) -> list[tuple[range, bool]]:
    """Split a stage's layers into units, each with a flag: recomputed as one, or not.

    Args:
        num_layers: layers of this stage.
        recompute: full/uniform: units of `num_layers` layers, all recomputed; full/block: the first `num_layers`
            layers are recomputed one by one, the others are not; otherwise no unit is recomputed.
    """
    if recompute.granularity != "full":
        return [(range(num_layers), False)]
    if recompute.method == "uniform":
        size = max(1, recompute.num_layers)
        return [(range(first, min(first + size, num_layers)), True) for first in range(0, num_layers, size)]
    count = min(recompute.num_layers, num_layers)
    units = [(range(layer, layer + 1), True) for layer in range(count)]
    return [*units, (range(count, num_layers), False)] if count < num_layers else units


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
