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
    """Makes this rank's backend; joins torch.distributed where the job has several ranks.

    Args:
        runtime: device, threads, determinism.
        parallel: the world size that the run was configured for, and the time-outs.
        launch: this rank's place in the job; None: read from the launcher's variables.

    Raises:
        ConfigError: the device is not there, or the launcher's world is not the configured one.
    """
    launch = launch or read_launch()
    if launch.world_size != parallel.world_size:
        raise ConfigError(
            "The launcher starts as many ranks as the run is configured for",
            found=f"{launch.launcher} started {launch.world_size}, the run is configured for {parallel.world_size}",
            fix="Leave out --world-size (the launcher's number is taken), or start that many ranks",
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
            "--device cuda needs a GPU that torch can use",
            found=f"torch {torch.__version__} sees none",
            fix="Check nvidia-smi and that torch is a CUDA build, or train with --device cpu",
        )
    return CudaBackend(runtime, parallel, launch)
