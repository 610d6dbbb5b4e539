"""Parameter initialization: each parameter from a generator of its own, seeded by (seed, global name).

A rank draws the whole global tensor and keeps its part, so that initial weights do not depend on the layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from megatron_lite.backend.base import Backend
from megatron_lite.config.model import ModelConfig
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import narrow

_OUTPUT_PROJECTIONS = ("self_attention.proj.weight", "mlp.fc2.weight")


@torch.no_grad()
def initialize(parameters: Iterable[NamedParameter], config: ModelConfig, seed: int, backend: Backend) -> None:
    """Initialize parameters: matrices from N(0, init_std), biases 0, norms 1 (zero-centered: 0), padding rows 0.

    Under scaled_init, output projections get init_std / sqrt(2 * num_layers) (Radford et al. 2019, GPT-2).
    The generator is the device's: a CPU and a GPU, and GPUs with different numbers of multiprocessors, draw different
    weights. Replicas on unequal cards get those of one of them (train/replica_check.py).
    """
    for parameter in parameters:
        param = parameter.param
        if parameter.name.endswith(".bias"):
            param.zero_()
        elif len(parameter.global_shape) == 1:
            param.fill_(0.0 if config.zero_centered_norm else 1.0)
        else:
            std = config.init_std
            if config.scaled_init and parameter.name.endswith(_OUTPUT_PROJECTIONS):
                std /= math.sqrt(2 * config.num_layers)
            key = hashlib.blake2b(f"{seed}/{parameter.name}".encode(), digest_size=8).digest()
            generator = backend.generator(int.from_bytes(key, "little") >> 1)
            drawn = torch.empty(parameter.global_shape, device=param.device).normal_(0.0, std, generator=generator)
            param.zero_()  # padding rows
            parameter.local().copy_(narrow(drawn, parameter.rectangle))
