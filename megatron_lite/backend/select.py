"""Backend selection from --device, launcher environment and available GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_lite.backend.base import Backend
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.cuda import CudaBackend
from megatron_lite.backend.devices import automatic_kind, find_device, list_devices
from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.backend.mps import MpsBackend
from megatron_lite.backend.xla import XlaBackend
from megatron_lite.backend.xpu import XpuBackend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import DEVICE_SPELLINGS, RuntimeConfig
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count

_BACKENDS: dict[str, Callable[[RuntimeConfig, ParallelConfig, Launch], Backend]] = {
    "cpu": CpuBackend,
    "cuda": CudaBackend,
    "xpu": XpuBackend,
    "mps": MpsBackend,
}
_BUILDS = {
    "cuda": "a build of PyTorch for CUDA or ROCm, and the GPU's driver",
    "xpu": "a build of PyTorch for Intel GPUs (https://download.pytorch.org/whl/xpu), and their driver",
    "mps": "PyTorch on a Mac with macOS 14 or newer",
}


def select_backend(runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch | None = None) -> Backend:
    """Create this rank's backend; in a job of several ranks a collective call that joins torch.distributed.

    Args:
        runtime: device, threads, determinism.
        parallel: the configured world size, and the time-outs.
        launch: this rank's place in the job; None: read from the launcher's variables.

    Raises:
        ConfigError: there is no such device, or the launcher's world size is not the configured one.
    """
    launch = launch or read_launch()
    if runtime.device == "xla":
        return XlaBackend(runtime, parallel, launch)
    if launch.world_size != parallel.world_size:
        raise ConfigError(
            f"{launch.launcher} started {format_count(launch.world_size, 'rank')}, but --world-size "
            f"is {parallel.world_size}",
            fix=f"Remove --world-size, or start {format_count(parallel.world_size, 'rank')}",
        )
    if runtime.deterministic:
        torch.use_deterministic_algorithms(True)
    device = automatic_kind() if runtime.device == "auto" else runtime.device
    if missing := find_device(device).missing:
        there = ", ".join(entry.kind for entry in list_devices() if entry.found)
        also = ", ".join(spelled for spelled, kind in DEVICE_SPELLINGS.items() if kind == device)
        raise ConfigError(
            f"--device {device}{f' (or {also})' if also else ''} is given, but {missing}",
            fix=f"Use a device of this host (--device {there}), or install {_BUILDS[device]}; `megatron-lite "
            "devices` says why the others are missing",
        )
    return _BACKENDS[device](runtime, parallel, launch)
