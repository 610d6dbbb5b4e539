"""FP8 matrix products of linear layers: operands scaled and rounded to 8 bits; emulated where the device has none.

Formats of Micikevicius et al. 2022 (arXiv:2209.05433): e4m3 has 3 bits of mantissa and values to 448, e5m2 has 2 bits
and values to 57,344, for gradients. Scales are computed on the device, from the operands themselves or from those of
earlier iterations (parallel/delayed_scaling.py). GPUs multiply the 8-bit values (torch._scaled_mm); elsewhere their
values are multiplied in fp32, with the same rounding of the operands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_lite.config.fp8 import Fp8Config

Role = Literal["input", "weight", "gradient"]
"""Role of an operand in the products of a linear layer; the gradient is that of the layer's output."""
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


class DelayedScales:
    """Scales of one linear layer, constant during an iteration, and the largest sizes of this iteration's operands.

    Each value is a tensor of its own: forward and backward of a compiled layer change different ones.

    Attributes:
        scales: by role, fp32 scalars: an operand is about its 8-bit values times the scale.
        maxima: by role, the largest absolute value so far in this iteration, over this rank's operands.
        known: whether the scales follow from earlier iterations; False: products use those of the operands.
    """

    def __init__(self, device: torch.device) -> None:
        self.scales: dict[Role, Tensor] = {role: torch.ones((), device=device) for role in ROLES}
        self.maxima: dict[Role, Tensor] = {role: torch.zeros((), device=device) for role in ROLES}
        self.known = False


@dataclass(frozen=True)
class Fp8:
    """Number formats and scaling of the products of a layer.

    Attributes:
        gradients: format of gradients; activations and weights are in e4m3.
        rowwise: a scale for each row of an operand, along the summed dim; False: one for the whole operand.
        is_delayed: the scales of each linear layer follow from earlier iterations.
        delayed: scales of this linear layer; None: those of the operands are used.
        records: take the operands into account for the scales of later iterations.
    """

    gradients: torch.dtype
    rowwise: bool
    is_delayed: bool = False
    delayed: DelayedScales | None = None
    records: bool = False

    def modes(self, device: torch.device) -> tuple[Fp8, Fp8]:
        """Return the formats of one linear layer, with own scales if they are delayed: (evaluation, training)."""
        if not self.is_delayed:
            return self, self
        evaluation = replace(self, delayed=DelayedScales(device))
        return evaluation, replace(evaluation, records=True)

    def record(self, x: Tensor, role: Role) -> None:
        """Take an operand into account for the scales of later iterations. Repetitions do not change the result."""
        if self.delayed is not None and self.records:
            maximum = self.delayed.maxima[role]
            maximum.copy_(torch.maximum(maximum, x.detach().abs().amax()))

    def product(self, a: Tensor, b: Tensor, roles: tuple[Role, Role]) -> Tensor:
        """Return a bᵀ: `a` [m, k], `b` [n, k] -> [m, n] in the dtype of `a`.

        Args:
            a: the first operand.
            b: the second operand.
            roles: of both.
        """
        (first, a_scale), (second, b_scale) = (self._quantize(x, role) for x, role in zip((a, b), roles, strict=True))
        if a.device.type != "cuda":
            return (first.float() @ second.float().t() * a_scale * b_scale.t()).to(a.dtype)
        return torch._scaled_mm(
            first,
            second.t(),
            scale_a=a_scale,
            scale_b=b_scale.t(),
            out_dtype=a.dtype,
            use_fast_accum="gradient" not in roles,  # gradients are accumulated in fp32 throughout
        )

    def _quantize(self, x: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        dtype = self.gradients if role == "gradient" else torch.float8_e4m3fn
        if self.delayed is not None and self.delayed.known:
            scale = self.delayed.scales[role]
            return round_to(x, dtype, scale), scale
        return quantize(x, dtype, rowwise=self.rowwise)


def fp8_of(config: Fp8Config, layer: int, num_layers: int) -> Fp8 | None:
    """Return the formats and the scaling of a layer's products; None: they are in bf16."""
    inner = not config.bf16_ends or config.bf16_start <= layer < num_layers - config.bf16_end
    if config.format == "off" or not inner:
        return None
    return Fp8(gradient_format(config), rowwise=config.recipe == "rowwise", is_delayed=config.recipe == "delayed")


def gradient_format(config: Fp8Config) -> torch.dtype:
    """Return the format of gradients."""
    return torch.float8_e5m2 if config.format == "hybrid" else torch.float8_e4m3fn


def quantize(x: Tensor, dtype: torch.dtype, *, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Return `x` [m, k] in an fp8 format, contiguous, and its scale: x is about the result times the scale.

    Returns:
        The values, and fp32 scales: [m, 1] if `rowwise`, else a scalar.
    """
    largest = torch.finfo(dtype).max
    size = x.abs().amax(dim=-1, keepdim=True) if rowwise else x.abs().amax()
    # Zeros stay zeros whatever their scale is.
    scale = (size.float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return round_to(x, dtype, scale), scale


def round_to(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Return x / scale in an fp8 format, contiguous. Finite values beyond the format become its largest ones.

    Infinite values become NaN, since e4m3 has no infinity: the loss shows them, as in bf16.
    """
    largest = torch.finfo(dtype).max
    scaled = x.float() / scale
    return torch.where(scaled.isinf(), float("nan"), scaled.clamp(-largest, largest)).to(dtype).contiguous()
