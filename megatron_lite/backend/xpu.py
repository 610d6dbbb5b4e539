"""XPU backend: one Intel GPU per rank, XCCL between ranks, gloo for tensors in host memory."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_lite.backend.base import Capabilities
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.gpu import GpuBackend
from megatron_lite.backend.group import GroupOptions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError


class XpuBackend(GpuBackend):
    """Backend of one Intel GPU, or of one of its tiles, which are devices of their own by default."""

    name = "xpu"
    api = torch.xpu
    visible_variable = "ZE_AFFINITY_MASK"

    def __init__(self, runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch) -> None:
        super().__init__(launch)
        torch.set_float32_matmul_precision("high" if runtime.tf32 else "highest")
        if launch.world_size > 1:
            if not dist.is_xccl_available():
                raise ConfigError(
                    f"PyTorch {torch.__version__} has no XCCL, by which ranks with --device xpu communicate",
                    fix="Install PyTorch 2.8 or newer from https://download.pytorch.org/whl/xpu",
                )
            self._join(parallel, "cpu:gloo,xpu:xccl")

    def library_versions(self) -> dict[str, str]:
        """Return the versions of torch and oneAPI."""
        return {**super().library_versions(), "oneAPI": torch.version.xpu or ""}

    def capabilities(self) -> Capabilities:
        """Return the capabilities: client GPUs have no float64. config/devices.py has what no Intel GPU can run."""
        float64 = bool(getattr(torch.xpu.get_device_properties(self.device), "has_fp64", True))
        return Capabilities(float64=float64)

    def _group_options(self, axis: str) -> GroupOptions:
        return GroupOptions("xccl", self._timeout)
