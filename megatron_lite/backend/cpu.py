"""CPU backend: one device per rank, gloo between ranks."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch

from megatron_lite.backend.base import Backend, Capabilities
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.seeding import seed_generator
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig


class CpuBackend(Backend):
    """Backend of one rank on CPU cores; the cores of a machine are divided among its ranks."""

    name = "cpu"

    def __init__(self, runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch) -> None:
        super().__init__(launch)
        self.device = torch.device("cpu")
        threads = runtime.num_threads
        if not threads and launch.local_world_size > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = max(1, cores // launch.local_world_size)
        if threads:
            torch.set_num_threads(threads)
        if launch.world_size > 1:
            self._join(parallel, "gloo")

    def seed(self, value: int) -> None:
        """Seed torch's default CPU generator (not numpy's, nor other devices')."""
        seed_generator(self.device, value)

    def synchronize(self) -> None:
        """Do nothing: CPU operations have finished when they return."""

    def memory_stats(self) -> dict[str, int]:
        """Return the process's resident set and its maximum so far, in bytes."""
        # ru_maxrss counts KiB on Linux and bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        now = peak
        statm = Path("/proc/self/statm")
        if statm.exists():
            now = int(statm.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
        peak = max(peak, now)  # the kernel updates ru_maxrss late
        return {"allocated": now, "max_allocated": peak, "reserved": now, "max_reserved": peak}

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return None: it depends on clock, vector units and other processes."""
        return None

    def device_name(self) -> str:
        """Return the processor's model and the number of threads."""
        threads = torch.get_num_threads()
        return f"{processor_name()} ({threads} thread{'' if threads == 1 else 's'})"

    def capabilities(self) -> Capabilities:
        """Return the defaults: all dtypes, compilation and fused kernels."""
        return Capabilities()


def processor_name() -> str:
    """Return the model of this host's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()
