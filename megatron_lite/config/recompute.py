"""Recomputed units: the layers of a pipeline stage split into chunks for full activation recomputation."""

from __future__ import annotations

from megatron_lite.config.optimizer import RecomputeConfig


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
