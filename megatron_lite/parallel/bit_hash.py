"""Bit hash of tensors: exact 64-bit checksum computed on their device, equal on all devices for equal bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 21
"""Elements hashed at once: bounds the memory for their int64 copy."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP = 0x2545F4914F6CDD1D
"""Odd number below 2^63; the hash of each chunk is multiplied by a power of it."""


class BitHash:
    """Hash function for tensors of one device.

    The bits of each element, read as an integer, are multiplied by an odd number that depends on the element's index,
    and summed modulo 2^64. Integer sums are exact in any order, so that the hash does not depend on how a device
    reduces. A single changed element always changes the hash, as the multipliers are odd; several changes cancel with a
    probability of 2^-64. NaNs are hashed by their bits.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._multipliers = _odd_numbers(CHUNK).to(device)

    @torch.no_grad()
    def __call__(self, tensor: Tensor) -> Tensor:
        """Hash a tensor of any dtype and shape to an int64 scalar, without synchronization."""
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for chunk in bits.split(CHUNK):
            total = total * _STEP + (chunk.long() * self._multipliers[: chunk.numel()]).sum()
        return total


def _odd_numbers(count: int) -> Tensor:
    """Return [count] pseudo-random odd int64: the mixer of SplitMix64 (Steele et al. 2014), equal on all machines."""
    numbers = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((numbers ^ (numbers >> np.uint64(31))) | np.uint64(1)).view(np.int64))
