"""Tensor names in checkpoints, and the choice of the saved tensor for a run in another precision.

Weights have their parameter's global name and are saved in the parameter's dtype. Optimizer state is named
`optimizer.<kind>.<parameter>`. A run in bf16 or fp16 also saves its fp32 main parameters as `optimizer.main_param.…`;
they are the true values, of which the weights are roundings, so they win wherever they hold more:

- bf16 run from an fp32 checkpoint: weights are rounded, main parameters are the fp32 weights, exactly.
- fp32 run from a bf16 checkpoint: weights are the main parameters, exactly.
- weights only, into a bf16 run: main parameters come along, so a fine-tune starts from the true values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatron_lite.runs.manifest import SavedTensor

OPTIMIZER_PREFIX = "optimizer."
MAIN_PREFIX = "optimizer.main_param."


def is_model_tensor(name: str) -> bool:
    """Whether a load without optimizer state takes it: a weight, or the fp32 main parameter of one."""
    return not name.startswith(OPTIMIZER_PREFIX) or name.startswith(MAIN_PREFIX)


def source_of(name: str, wide: bool, saved: Mapping[str, SavedTensor]) -> str | None:
    """The saved tensor that fills the run's tensor `name`, or None if there is none.

    Args:
        name: global name of the tensor to fill.
        wide: whether it is fp32, and so can hold a main parameter without rounding.
        saved: the checkpoint's tensors.
    """
    main = MAIN_PREFIX + name
    if wide and main in saved:
        return main
    if name in saved:
        return name
    weight = name.removeprefix(MAIN_PREFIX)
    return weight if weight in saved else None


def is_superseded(name: str, run: Collection[str]) -> bool:
    """Whether a saved tensor that the run has no place for is no loss, because another saved one carries its values.

    Args:
        name: a saved tensor.
        run: names of the run's tensors.
    """
    return name.startswith(MAIN_PREFIX) and name.removeprefix(MAIN_PREFIX) in run
