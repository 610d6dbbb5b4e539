"""Record of machine properties that change numerics: device, library versions, environment variables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import numpy as np
import torch

from megatron_lite.backend.comparison import Comparison

MACHINES = Comparison(
    topic="machines",
    problem="Ranks differ in the kind of device or in variables that change numerics",
    fix="Give every rank the same --device, and every node the same environment variables",
    # Results may differ in their last digits, or all ranks wait for the slowest device.
    warn=frozenset({"device name", "PyTorch", "NumPy", "Python", "architecture"}),
)

VARIABLES = (
    # Precision of matrix products and reductions.
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "DISABLE_ADDMM_CUDA_LT",
    # CPU instruction sets and reproducibility modes.
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    # Algorithms of collectives: another one sums in another order, and ranks that choose differently hang.
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_NVLS_ENABLE",
    "NCCL_COLLNET_ENABLE",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_BUFFSIZE",
)
"""Environment variables that must have the same value, or none, on all ranks."""


def machine_values(kind: str, device_name: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the machine properties that all ranks must share, by name, as text for a comparison.

    Args:
        kind: kind of device: cpu, cuda.
        device_name: name of the device.
        environment: variables to read; None: the process's own.
    """
    variables = os.environ if environment is None else environment
    cuda = f" for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    cuda = f" for ROCm {torch.version.hip}" if torch.version.hip else cuda
    return {
        "device": f"--device {kind}",
        **{name: f"{name}={variables[name]}" if name in variables else f"no {name}" for name in VARIABLES},
        "device name": f"device {device_name}",
        "PyTorch": f"PyTorch {torch.__version__}{cuda}",
        "NumPy": f"NumPy {np.__version__}",
        "Python": f"Python {platform.python_version()}",
        "architecture": f"architecture {platform.machine()}",
    }
