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
from megatron_lite.formatting import format_count


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
            f"{launch.launcher} started {format_count(launch.world_size, 'rank')}, but --world-size "
            "is "
            f"{parallel.world_size}",
            fix=f"Remove --world-size, or start {format_count(parallel.world_size, 'rank')}",
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
            f"--device cuda is given, but PyTorch {torch.__version__} finds no GPU",
            fix="Install a CUDA build of PyTorch, and make sure that nvidia-smi lists a GPU on this host; or use "
            "--device cpu",
        )
    return CudaBackend(runtime, parallel, launch)
