"""FP8 matrix products of linear layers: operands scaled and rounded to 8 bits; emulated where the device has none.

Formats of Micikevicius et al. 2022 (arXiv:2209.05433): e4m3 has 3 bits of mantissa and values to 448, e5m2 has 2 bits
and values to 57,344, for gradients. Scales are computed from the operands themselves, on the device. GPUs multiply the
8-bit values (torch._scaled_mm); elsewhere their values are multiplied in fp32, with the same rounding of the operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.fp8 import Fp8Config


@dataclass(frozen=True)
class Fp8:
    """Number formats and scaling of the products of a layer.

    Attributes:
        gradients: format of gradients; activations and weights are in e4m3.
        rowwise: a scale for each row of an operand, along the summed dim; False: one for the whole operand.
    """

    gradients: torch.dtype
    rowwise: bool

    def product(self, a: Tensor, b: Tensor, *, gradient: bool = False) -> Tensor:
        """Return a bᵀ: `a` [m, k], `b` [n, k] -> [m, n] in the dtype of `a`.

        Args:
            a: the first operand.
            b: the second operand.
            gradient: `a` is a gradient.
        """
        first, a_scale = quantize(a, self.gradients if gradient else torch.float8_e4m3fn, rowwise=self.rowwise)
        second, b_scale = quantize(b, torch.float8_e4m3fn, rowwise=self.rowwise)
        if a.device.type != "cuda":
            return (first.float() @ second.float().t() * a_scale * b_scale.t()).to(a.dtype)
        return torch._scaled_mm(
            first,
            second.t(),
            scale_a=a_scale,
            scale_b=b_scale.t(),
            out_dtype=a.dtype,
            use_fast_accum=not gradient,  # gradients are accumulated in fp32 throughout
        )


def fp8_of(config: Fp8Config, layer: int, num_layers: int) -> Fp8 | None:
    """Return the formats and the scaling of a layer's products; None: they are in bf16."""
    inner = not config.bf16_ends or config.bf16_start <= layer < num_layers - config.bf16_end
    if config.format == "off" or not inner:
        return None
    gradients = torch.float8_e5m2 if config.format == "hybrid" else torch.float8_e4m3fn
    return Fp8(gradients, rowwise=config.recipe == "rowwise")


def quantize(x: Tensor, dtype: torch.dtype, *, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Return `x` [m, k] in an fp8 format, contiguous, and its scale: x is about the result times the scale.

    Returns:
        The values, and fp32 scales: [m, 1] if `rowwise`, else a scalar.
    """
    largest = torch.finfo(dtype).max
    size = x.abs().amax(dim=-1, keepdim=True) if rowwise else x.abs().amax()
    # Zeros stay zeros whatever their scale is.
    scale = (size.float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale
