"""First values: each parameter from a generator of its own, seeded by (seed, global name).

So the same seed gives the same model at any layout: a rank draws the whole tensor and keeps its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_lite.config.model import ModelConfig
from megatron_lite.parallel.parameters import NamedParameter

_OUTPUT_PROJECTIONS = ("self_attention.proj.weight", "mlp.fc2.weight")


@torch.no_grad()
def initialize(parameters: Iterable[NamedParameter], config: ModelConfig, seed: int) -> None:
    """Fills the parameters: matrices from N(0, init_std), biases 0, norms 1 (zero-centered: 0), padding rows 0.

    Output projections get init_std / sqrt(2 * num_layers) under scaled_init (Radford et al. 2019, GPT-2).
    The draws are the device's: a CPU and a GPU start from different models. On the meta device nothing is drawn.
    """
    for parameter in parameters:
        param = parameter.param
        if param.is_meta:
            continue
        if parameter.name.endswith(".bias"):
            param.zero_()
        elif len(parameter.global_shape) == 1:
            param.fill_(0.0 if config.zero_centered_norm else 1.0)
        else:
            std = config.init_std
            if config.scaled_init and parameter.name.endswith(_OUTPUT_PROJECTIONS):
                std /= math.sqrt(2 * config.num_layers)
            param.zero_()  # the padding
            parameter.local().copy_(_local_part(_draw(parameter, seed, std, param.device), parameter))


def _draw(parameter: NamedParameter, seed: int, std: float, device: torch.device) -> Tensor:
    """The whole global tensor, fp32."""
    key = hashlib.blake2b(f"{seed}/{parameter.name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.empty(parameter.global_shape, device=device).normal_(0.0, std, generator=generator)


def _local_part(whole: Tensor, parameter: NamedParameter) -> Tensor:
    for dim, (start, length) in enumerate(zip(parameter.offset, parameter.local_shape, strict=True)):
        whole = whole.narrow(dim, start, length)
    return whole
