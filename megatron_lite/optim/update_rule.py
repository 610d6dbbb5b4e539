"""Update rules: torch's AdamW and SGD over flat main parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_lite.config.optimizer import OptimizerConfig

_MOMENTS = {"adam": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}, "sgd": {"momentum": "momentum_buffer"}}


class UpdateRule:
    """torch's AdamW or SGD over main parameters.

    Args:
        config: kind of rule and hyperparameters.
        mains: flat fp32 main parameters, with their gradients in `.grad`.
        classes: for each main parameter, whether weight decay applies and the factor of the learning rate.
        fused: whether to use torch's fused kernels. Others (of meta tensors) neither scale gradients nor skip steps.

    Attributes:
        applied: number of steps so far, used by Adam's bias correction.
        moments: for each main parameter, its state by its name in checkpoints.
    """

    def __init__(
        self, config: OptimizerConfig, mains: Sequence[Tensor], classes: Sequence[tuple[bool, float]], *, fused: bool
    ) -> None:
        # A rank whose parameters are all frozen has an empty group: torch refuses a list without groups.
        self._groups = [
            {
                "params": [main for main, own in zip(mains, classes, strict=True) if own == (decay, factor)],
                "decays": decay,
                "factor": factor,
            }
            for decay, factor in dict.fromkeys(classes or [(False, 1.0)])
        ]
        self._mains = tuple(mains)
        self._steps: list[Tensor] = []
        self._fused = fused
        self.applied = 0
        if config.kind == "adam":
            betas = (config.adam_beta1, config.adam_beta2)
            self._rule: torch.optim.Optimizer = torch.optim.AdamW(
                self._groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=fused
            )
        else:
            self._rule = torch.optim.SGD(self._groups, lr=0.0, momentum=config.sgd_momentum, fused=fused)
        names = _MOMENTS[config.kind] if config.kind == "adam" or config.sgd_momentum else {}
        self.moments: list[Mapping[str, Tensor]] = []
        for main in self._mains:
            moments = {name: torch.zeros_like(main) for name in names}
            self._rule.state[main] = {names[name]: moment for name, moment in moments.items()}
            self.moments.append(moments)
            if config.kind == "adam":
                # Fused kernels read the step count on the device, other kernels on the host without synchronization.
                step = torch.zeros((), dtype=torch.float32, device=main.device if fused else "cpu")
                self._rule.state[main]["step"] = step
                self._steps.append(step)

    def load(self, applied: int) -> None:
        """Restore the number of steps so far."""
        self.applied = applied
        for step in self._steps:
            step.fill_(applied)

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters, in one pass over them, their gradients and moments.

        The caller counts the step in `applied` once it knows that it was applied.

        Args:
            lr: learning rate, multiplied by each group's factor.
            weight_decay: of the parameters with weight decay; 0 for the others. AdamW's is decoupled from the gradient,
                SGD's is added to the gradient.
            divisor: scalar on the device that gradients are divided by, in place; None: 1.
            applies: bool scalar on the device. False: parameters, moments and Adam's step count stay as they are.
        """
        for group in self._rule.param_groups:
            group["lr"] = lr * group["factor"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        if self._fused:
            # Inputs of the fused kernels for mixed precision; torch's GradScaler passes them in the same way.
            self._rule.grad_scale = None if divisor is None else divisor.float()  # type: ignore[attr-defined]
            self._rule.found_inf = 1.0 - applies.float()  # type: ignore[attr-defined]
        self._rule.step()
