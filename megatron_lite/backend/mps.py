"""MPS backend: the GPU of a Mac, one rank."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from megatron_lite.backend.base import Backend, Capabilities
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.explicit_attention import explicit_attention
from megatron_lite.backend.seeding import seed_generator
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError


class MpsBackend(Backend):
    """Backend of Apple's Metal Performance Shaders."""

    name = "mps"
    device = torch.device("mps")
    asynchronous = True
    loss_chunk = 1024

    def __init__(self, runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch) -> None:
        super().__init__(launch)
        if launch.world_size > 1:
            raise ConfigError(
                f"--device mps supports one rank, and {launch.launcher} started {launch.world_size}",
                fix="Start one rank, or use --device cpu",
            )
        self._largest = 0

    def seed(self, value: int) -> None:
        """Seed the device's default generator."""
        seed_generator(self.device, value)

    def synchronize(self) -> None:
        """Wait for all queued work."""
        torch.mps.synchronize()

    def mark(self) -> Any:
        """Return an event, recorded in the stream."""
        event = torch.mps.event.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: Any, end: Any) -> float | None:
        """Return the seconds between two events; None: the device has not reached the second one."""
        return begin.elapsed_time(end) / 1000.0 if end.query() else None

    def memory_stats(self) -> dict[str, int]:
        """Return bytes of tensors and of the driver; maxima are those of the calls so far."""
        allocated, reserved = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        self._largest = max(self._largest, allocated)
        return {
            "allocated": allocated,
            "max_allocated": self._largest,
            "reserved": reserved,
            "max_reserved": reserved,
        }

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return None: Apple publishes no figure."""
        return None

    def device_name(self) -> str:
        """Return the kind of processor."""
        return f"Apple GPU ({platform.processor() or platform.machine()}, macOS {platform.mac_ver()[0]})"

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        dropout: float,
        causal: bool,
        new_shapes: bool = False,
    ) -> Tensor:
        """Return attention by products.

        Without gradients, scaled_dot_product_attention runs kernels that return wrong values for permuted inputs and,
        in 16 bits, attend to later tokens (pytorch/pytorch issues 163597, 174861, 181133, 195910).
        """
        return explicit_attention(q, k, v, mask, dropout=dropout, causal=causal)

    def capabilities(self) -> Capabilities:
        """Return the capabilities: bf16 from macOS 14 on. config/devices.py has what no Apple GPU can run.

        torch's fused optimizers ignore the scale of gradients and overflows (pytorch/pytorch pull request 186360).
        """
        bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
        return Capabilities(
            dtypes=frozenset({"fp32", "fp16"} | ({"bf16"} if bf16 else set())),
            fused_adam=False,
            float64=False,
        )
