"""Backend selection from --device, launcher environment and available GPUs."""

from __future__ import annotations

import torch

from megatron_lite.backend.base import Backend
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.cuda import CudaBackend
from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError


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
    if launch.world_size != parallel.world_size:
        raise ConfigError(
            f"{launch.launcher} started {launch.world_size} ranks, but --world-size is {parallel.world_size}",
            fix="Leave out --world-size (the launcher's number is used), or start that many ranks",
        )
    if runtime.deterministic:
        torch.use_deterministic_algorithms(True)
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return CpuBackend(runtime, parallel, launch)
    if not torch.cuda.is_available():
        raise ConfigError(
            f"No GPU for --device cuda: torch {torch.__version__} finds none",
            fix="Check nvidia-smi and that torch is a CUDA build, or train with --device cpu",
        )
    return CudaBackend(runtime, parallel, launch)
