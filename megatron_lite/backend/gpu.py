"""GPU backend: what CUDA, ROCm and Intel XPU devices have in common in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lite.backend.base import Backend, Reading
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.seeding import seed_generator
from megatron_lite.config.runtime import LOSS_CHUNK
from megatron_lite.errors import ConfigError
from megatron_lite.planner.hardware import device_of


class GpuBackend(Backend):
    """Backend of one GPU: the one with the number of the local rank, counted among those that the process sees.

    Attributes:
        api: torch.cuda or torch.xpu.
        visible_variable: environment variable that hides GPUs from a process.
    """

    asynchronous = True
    loss_chunk = LOSS_CHUNK
    api: Any
    visible_variable: str

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        visible = self.api.device_count()
        if not visible:
            raise ConfigError(
                f"Rank {launch.rank} on {launch.host} sees no GPU",
                fix=f"Request GPUs (sbatch --gpus-per-node=N), unset {self.visible_variable}, or train with --device "
                "cpu",
            )
        # A task may see its own GPUs only (srun --gpus-per-task), numbered from 0; claim_device finds shared ones.
        self.device = torch.device(self.name, launch.local_rank % visible)
        self.api.set_device(self.device)

    def seed(self, value: int) -> None:
        """Seed this device's default generator, without synchronization."""
        seed_generator(self.device, value)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        self.api.synchronize(self.device)

    def mark(self) -> Any:
        """Return an event, recorded in the current stream."""
        event = self.api.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: Any, end: Any) -> float | None:
        """Return the seconds between two events; None: the device has not reached the second one."""
        return begin.elapsed_time(end) / 1000.0 if end.query() else None

    def memory_stats(self) -> dict[str, int]:
        """Return the caching allocator's counters, in bytes."""
        return {
            "allocated": self.api.memory_allocated(self.device),
            "max_allocated": self.api.max_memory_allocated(self.device),
            "reserved": self.api.memory_reserved(self.device),
            "max_reserved": self.api.max_memory_reserved(self.device),
        }

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the data sheet's dense 16-bit FLOP/s; None for other dtypes (fp32 may or may not use tensor cores)."""
        known = device_of(self.device_name())
        if known is None or dtype not in (torch.float16, torch.bfloat16):
            return None
        return known.peak("bf16" if dtype == torch.bfloat16 else "fp16") or None

    def device_name(self) -> str:
        """Return the driver's name of the device."""
        name: str = self.api.get_device_name(self.device)
        return name

    def use_in_thread(self) -> None:
        """Make this GPU the current one of the calling thread."""
        self.api.set_device(self.device)

    def host_tensor(self, array: np.ndarray) -> Tensor:
        """Return a tensor in pinned memory. Pinning takes time, and belongs into a thread."""
        return torch.from_numpy(array if array.flags.writeable else array.copy()).pin_memory()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Enqueue a copy of a pinned tensor; the allocator keeps its memory until the copy is done."""
        return tensor.to(self.device, non_blocking=True)

    def read_later(self, values: Tensor) -> Reading:
        """Copy to pinned memory; the result waits for an event behind the copy."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = self.api.Event()
        copied.record()

        def read() -> list[float]:
            copied.synchronize()
            numbers: list[float] = host.tolist()
            return numbers

        return read
