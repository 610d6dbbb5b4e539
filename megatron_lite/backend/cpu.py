"""CPU backend: one device per rank, gloo between ranks."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_lite.backend.base import Backend, Capabilities
from megatron_lite.backend.environment import Launch
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig


class CpuBackend(Backend):
    """Ranks on CPU cores; the cores of a machine are shared out among its ranks."""

    name = "cpu"

    def __init__(self, runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch) -> None:
        super().__init__(launch)
        self.device = torch.device("cpu")
        threads = runtime.num_threads
        if not threads and launch.local_world_size > 1:
            threads = max(1, _available_cores() // launch.local_world_size)
        if threads:
            torch.set_num_threads(threads)
        if launch.world_size > 1:
            self._join(parallel, "gloo")

    def seed(self, value: int) -> None:
        """Seeds torch's default CPU generator (not numpy's, nor other devices')."""
        torch.default_generator.manual_seed(value)

    def synchronize(self) -> None:
        """CPU operations have ended when they return."""

    def memory_stats(self) -> dict[str, int]:
        """The process's resident set and its high-water mark, in bytes."""
        # ru_maxrss counts KiB on Linux and bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        now = peak
        statm = Path("/proc/self/statm")
        if statm.exists():
            now = int(statm.read_text().split()[1]) * resource.getpagesize()
        peak = max(peak, now)  # the kernel updates its high-water mark late
        return {"allocated": now, "max_allocated": peak, "reserved": now, "max_reserved": peak}

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Unknown: it depends on clock, vector units and neighbours."""
        return None

    def device_name(self) -> str:
        """The processor's model and the threads in use."""
        model = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
            model = names[0].partition(":")[2].strip() if names else model
        threads = torch.get_num_threads()
        return f"{model} ({threads} thread{'' if threads == 1 else 's'})"

    def capabilities(self) -> Capabilities:
        """Everything, slowly."""
        return Capabilities()

    def to_device(self, array: np.ndarray) -> Tensor:
        """A tensor that shares the array's memory where the array may be written to."""
        return torch.from_numpy(array if array.flags.writeable else array.copy())


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
