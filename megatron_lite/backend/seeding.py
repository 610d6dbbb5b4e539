"""Seeding of a device's default generator."""

from __future__ import annotations

import torch


def seed_generator(device: torch.device, value: int) -> None:
    """Seed the default generator of one device, without synchronization (not numpy's, nor other devices')."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)
    elif device.type == "xpu":
        torch.xpu.default_generators[device.index].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(value)
