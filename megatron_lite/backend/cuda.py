"""CUDA backend: one GPU per rank, NCCL between ranks, gloo for tensors in host memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lite.backend.base import Capabilities, scaled_dot_product_attention
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.gpu import GpuBackend
from megatron_lite.backend.group import GroupOptions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR_SETTINGS = "expandable_segments:True"
"""Settings of the caching allocator where the environment has none."""


_HIGH_PRIORITY = ("tp", "cp", "pp")
"""Axes whose collectives the next layer or stage waits for. Without priority, a product that is already enqueued fills
the GPU first, and nothing overlaps with it."""
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that prepare nothing for a shape."""


class CudaBackend(GpuBackend):
    """Backend of one GPU of NVIDIA, or of AMD: ROCm builds of PyTorch have the same interface, and RCCL as NCCL."""

    name = "cuda"
    vendor_kernels = True
    api = torch.cuda
    visible_variable = "CUDA_VISIBLE_DEVICES (of AMD: HIP_VISIBLE_DEVICES)"

    def __init__(self, runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch) -> None:
        super().__init__(launch)
        if runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._settings = _configure(runtime)
        self._chooses_kernel = runtime.attention == "auto"
        self._flash = runtime.attention in ("auto", "flash")
        # Of ROCm, varlen attention is that of the package flash-attn (backend/kernels.py).
        self._varlen = find_varlen_kernel() if self._flash and not torch.version.hip else None
        if launch.world_size > 1:
            self._join(parallel, "cpu:gloo,cuda:nccl", self.device)

    def settings(self) -> list[str]:
        """Return the choices of TF32, attention kernel and allocator."""
        return self._settings

    def record_memory_history(self, on: bool) -> bool:
        """Start or stop recording allocations with their stack traces."""
        torch.cuda.memory._record_memory_history("all" if on else None)
        return True

    def dump_memory_history(self, path: Path) -> None:
        """Write a snapshot for pytorch.org/memory_viz."""
        torch.cuda.memory._dump_snapshot(str(path))

    def device_uuid(self) -> str:
        """Return GPU-… or MIG-…; empty where torch does not give it."""
        uuid = str(getattr(torch.cuda.get_device_properties(self.device), "uuid", ""))
        return uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"

    def library_versions(self) -> dict[str, str]:
        """Return the versions of torch, CUDA (ROCm) and NCCL."""
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
        if torch.version.hip:
            return {**super().library_versions(), "ROCm": torch.version.hip, "RCCL": nccl}
        return {**super().library_versions(), "CUDA": torch.version.cuda or "", "NCCL": nccl}

    def capabilities(self) -> Capabilities:
        """Return the capabilities; bf16 needs Ampere or newer, fp8 Ada or Hopper. AMD's fp8 has other formats."""
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fp8 = not torch.version.hip and torch.cuda.get_device_capability(self.device) >= (8, 9)
        return Capabilities(dtypes=frozenset({"fp32", "fp16"} | ({"bf16"} if bf16 else set())), fp8=fp8)

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
        """Pass grouped heads to the fused kernels, which take them in half precision without a mask.

        In other cases enable_gqa would rule out every fused kernel, and the heads are repeated. cuDNN builds a plan for
        each new shape, for tens of milliseconds, so that it is left out where shapes keep changing.
        """
        kernels = sdpa_kernel(_WITHOUT_PLANS) if new_shapes and self._chooses_kernel else nullcontext()
        with kernels:
            if mask is None and q.dtype in (torch.float16, torch.bfloat16):
                return scaled_dot_product_attention(q, k, v, None, dropout=dropout, causal=causal)
            return super().attention(q, k, v, mask, dropout=dropout, causal=causal)

    def has_block_kernel(self, q: Tensor) -> bool:
        """Return whether FlashAttention takes these queries, and is not ruled out."""
        return self._flash and _flash_takes(q)

    def has_varlen_attention(self, q: Tensor) -> bool:
        """Return whether torch has FlashAttention for these queries (torch 2.10 and newer), and it is not ruled out."""
        return self._varlen is not None and _flash_takes(q)

    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Call torch's varlen attention."""
        assert self._varlen is not None
        if q.shape[1] != k.shape[1] and not self._varlen.takes_groups:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out: Tensor = self._varlen.call(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        return out

    def _group_options(self, axis: str) -> GroupOptions:
        assert self._timeout is not None, "groups are created after the rendezvous"
        nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=axis in _HIGH_PRIORITY)
        nccl._timeout = self._timeout
        return GroupOptions("nccl", self._timeout, nccl, splits="backend" in signature(dist.split_group).parameters)


def _flash_takes(q: Tensor) -> bool:
    """Return whether FlashAttention computes queries [..., d] of this dtype and number of channels."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


class VarlenKernel(NamedTuple):
    """Causal varlen attention of torch.

    Attributes:
        call: takes queries, keys, values, their cu_seqlens and their longest lengths.
        takes_groups: it takes fewer heads of keys and values than of queries.
    """

    call: Callable[..., Any]
    takes_groups: bool


def find_varlen_kernel() -> VarlenKernel | None:
    """Return torch.nn.attention.varlen's kernel, in the form of its version; None: before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return VarlenKernel(partial(varlen_attn, **options), "enable_gqa" in known)


def _configure(runtime: RuntimeConfig) -> list[str]:
    """Set PyTorch's TF32, attention and allocator options; return them for the start-up lines."""
    torch.set_float32_matmul_precision("high" if runtime.tf32 else "highest")
    lines = [f"fp32 products in {'TF32' if runtime.tf32 else 'full precision (--allow-tf32: TF32)'}"]
    if torch.version.hip and runtime.attention == "fused":
        raise ConfigError(
            f"--attention-backend fused is cuDNN's kernel, which PyTorch for ROCm {torch.version.hip} does not have",
            fix="Use --attention-backend auto or flash",
        )
    if runtime.attention != "auto":
        switches = torch.backends.cuda
        switches.enable_flash_sdp(runtime.attention == "flash")
        switches.enable_mem_efficient_sdp(False)
        switches.enable_cudnn_sdp(runtime.attention == "fused")
    kernel = {"auto": "PyTorch's choice", "flash": "FlashAttention", "fused": "cuDNN", "unfused": "separate products"}
    lines.append(f"attention by {kernel[runtime.attention]}")
    # Ramp-up, validation and generation change the sizes of tensors: segments that grow keep memory from fragmenting.
    given = next((os.environ[name] for name in _ALLOCATOR if os.environ.get(name)), "")
    if not given and not torch.version.hip:  # ROCm has no such segments
        torch.cuda.memory._set_allocator_settings(given := ALLOCATOR_SETTINGS)
    lines.append(f"allocator: {given or 'defaults'}")
    return lines
