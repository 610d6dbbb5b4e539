"""Checkpoint keys of parameters and optimizer state; choice of the fp32 or the model-dtype tensor at load.

Weights have their parameter's global name and are saved in the parameter's dtype. Optimizer state is named
`optimizer.<kind>.<parameter>`. A run in bf16 or fp16 also saves its fp32 main parameters as `optimizer.main_param.…`;
the weights are roundings of them, so they are loaded wherever the run can hold the exact values:

- bf16 run from an fp32 checkpoint: weights are rounded, main parameters are the fp32 weights, exactly.
- fp32 run from a bf16 checkpoint: weights are the main parameters, exactly.
- weights only, into a bf16 run: main parameters come along, so a fine-tune starts from the true values.

Histories of fp8 operands, `optimizer.amax_history.<linear layer>`, are loaded if run and checkpoint have them in the
same shape: precision and recipe may change during a run.

A moving average of the weights is named `ema.<parameter>`. A run that begins one takes the weights for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from megatron_lite.runs.manifest import SavedTensor

OPTIMIZER_PREFIX = "optimizer."
MAIN_PREFIX = "optimizer.main_param."
AMAX_PREFIX = "optimizer.amax_history."
EMA_PREFIX = "ema."


def is_weight(name: str) -> bool:
    """Return True for a parameter of the model in its own dtype."""
    return not name.startswith((OPTIMIZER_PREFIX, EMA_PREFIX))


def is_model_tensor(name: str) -> bool:
    """Return True for weights and their fp32 main parameters, which a load without optimizer state includes."""
    return is_weight(name) or name.startswith(MAIN_PREFIX)


def is_optional(name: str) -> bool:
    """Return True for tensors that a run or its checkpoint may lack."""
    return name.startswith(AMAX_PREFIX)


def has_optimizer(names: Iterable[str]) -> bool:
    """Return whether tensors of these names include optimizer state other than main parameters and fp8 histories."""
    return any(name.startswith(OPTIMIZER_PREFIX) and not (is_model_tensor(name) or is_optional(name)) for name in names)


def source_of(name: str, wide: bool, saved: Mapping[str, SavedTensor]) -> str | None:
    """Return the name of the saved tensor that fills the run's tensor `name`; None: there is none.

    Args:
        name: global name of the tensor to fill.
        wide: True if it is fp32, and so can hold a main parameter without rounding.
        saved: the checkpoint's tensors.
    """
    if name.startswith(EMA_PREFIX) and name not in saved:
        return source_of(name.removeprefix(EMA_PREFIX), wide, saved)
    main = MAIN_PREFIX + name
    if wide and main in saved:
        return main
    if name in saved:
        return name
    weight = name.removeprefix(MAIN_PREFIX)
    return weight if weight in saved else None


def is_superseded(name: str, run: Collection[str]) -> bool:
    """Return True for a saved main parameter that a run without main parameters may leave out: it has the weight.

    Args:
        name: a saved tensor.
        run: names of the run's tensors.
    """
    return name.startswith(MAIN_PREFIX) and name.removeprefix(MAIN_PREFIX) in run
