"""Tests of the device list and of the ROCm, XPU and MPS backends, with stand-ins for what PyTorch finds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.vendor_modules import install

from megatron_lite.backend import devices
from megatron_lite.backend.cuda import CudaBackend
from megatron_lite.backend.devices import automatic_kind, find_device, list_devices
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.mps import MpsBackend
from megatron_lite.backend.select import select_backend
from megatron_lite.backend.xpu import XpuBackend
from megatron_lite.cli.main import main
from megatron_lite.config.optimizer import OptimizerConfig, PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError
from megatron_lite.train.comparison import check_capabilities


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets which devices PyTorch finds, and for which it is built."""

    def build(found=(), built=(), hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 * ("cuda" in found))
        monkeypatch.setattr(
            torch.cuda, "get_device_name", lambda index: "AMD Instinct MI300X" if hip else "NVIDIA H100"
        )
        monkeypatch.setattr(torch.version, "cuda", "12.8" if "cuda" in (*built, *found) and not hip else None)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in found)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: 2 * ("xpu" in found))
        monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: "Intel(R) Data Center GPU Max 1550")
        monkeypatch.setattr(torch.version, "xpu", "2025.1" if "xpu" in (*built, *found) else None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in found)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: "mps" in (*built, *found))
        monkeypatch.setattr(devices, "find_spec", lambda name: object() if "xla" in (*built, *found) else None)
        monkeypatch.setattr(devices, "count_xla_devices", lambda: 8 if "xla" in found else None)

    return build


@pytest.mark.parametrize(
    ("found", "kind"),
    [((), "cpu"), (("cuda",), "cuda"), (("xpu",), "xpu"), (("cuda", "xpu"), "cuda"), (("mps", "xla"), "cpu")],
)
def test_auto_takes_the_gpu_of_a_server(machine, found, kind):
    machine(found)
    assert automatic_kind() == kind


def test_a_device_is_described_or_the_reason_why_there_is_none(machine):
    machine()
    texts = {device.kind: device.missing for device in list_devices()}
    assert "built without CUDA and ROCm" in texts["cuda"] and "built without Intel GPUs" in texts["xpu"]
    assert "built without Apple's GPUs" in texts["mps"] and "torch_xla is not installed" in texts["xla"]
    assert find_device("cpu").found and not texts["cpu"]
    machine(built=("cuda", "xpu", "mps", "xla"))
    texts = {device.kind: device.missing for device in list_devices()}
    assert "for CUDA 12.8 finds no GPU or driver, which nvidia-smi lists" in texts["cuda"]
    assert "no device file of a TPU" in texts["xla"]
    assert "which xpu-smi lists" in texts["xpu"] and "is too old for PyTorch's kernels" in texts["mps"]
    machine(built=("cuda",), hip="6.4")
    assert "for ROCm 6.4 finds no GPU or driver, which rocm-smi lists" in find_device("cuda").missing
    machine(found=("cuda", "xpu", "mps", "xla"), hip="6.4")
    assert [device.found for device in list_devices()][:4] == [
        "4 x AMD Instinct MI300X (ROCm 6.4)",
        "2 x Intel(R) Data Center GPU Max 1550",
        "Apple GPU",
        "8 devices of torch_xla",
    ]


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_device_that_is_missing_is_refused_with_those_that_are_there(machine, kind):
    machine(found=("xla",))
    also = r" \(or gpu, rocm\)" if kind == "cuda" else ""
    with pytest.raises(ConfigError, match=f"--device {kind}{also} is given, but PyTorch .* is built without") as caught:
        select_backend(RuntimeConfig(device=kind), ParallelConfig(), Launch())
    assert "Use a device of this host (--device xla, cpu), or install" in str(caught.value)


def test_the_command_lists_devices_and_kernels(machine, capsys, monkeypatch):
    install(monkeypatch, "flash_attn")
    machine(found=("xpu",))
    assert main(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("--device cuda  none: PyTorch")
    assert lines[1] == "--device xpu   2 x Intel(R) Data Center GPU Max 1550"
    assert "--device auto  xpu" in lines
    assert "flash-attn     installed (attention)" in lines
    assert "apex           not installed (norm, weight gradient)" in lines


@pytest.fixture
def rocm(machine, monkeypatch):
    machine(found=("cuda",), hip="6.4")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device))
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", lambda text: chosen.append(text))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return chosen


def test_rocm_is_the_cuda_backend_without_its_fp8_and_its_segments(rocm):
    backend = select_backend(RuntimeConfig(), ParallelConfig(), Launch(local_rank=3))
    assert isinstance(backend, CudaBackend) and backend.device == torch.device("cuda", 3)
    assert rocm == [torch.device("cuda", 3)]  # no settings of the allocator
    assert backend.settings()[-1] == "allocator: defaults"
    able = backend.capabilities()
    assert not able.fp8 and "bf16" in able.dtypes
    assert not backend.has_varlen_attention(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    assert backend.peak_flops(torch.bfloat16) == 1307e12
    versions = backend.library_versions()
    assert versions["ROCm"] == "6.4" and "RCCL" in versions and "CUDA" not in versions


def test_cudnn_is_refused_on_rocm(rocm):
    with pytest.raises(ConfigError, match="--attention-backend fused is cuDNN's kernel, which PyTorch for ROCm 6"):
        select_backend(RuntimeConfig(attention="fused"), ParallelConfig(), Launch())


@pytest.fixture
def xpu(machine, monkeypatch):
    machine(found=("xpu",))
    monkeypatch.setattr(torch.xpu, "set_device", lambda device: None)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=False))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: None)


def test_an_intel_gpu(xpu, monkeypatch):
    backend = select_backend(RuntimeConfig(), ParallelConfig(), Launch(local_rank=1))
    assert isinstance(backend, XpuBackend) and backend.device == torch.device("xpu", 1)
    assert backend.capabilities().float64 is False and backend.library_versions()["oneAPI"] == "2025.1"
    seeds = []
    generators = [SimpleNamespace(manual_seed=lambda value, n=n: seeds.append((n, value))) for n in range(2)]
    monkeypatch.setattr(torch.xpu, "default_generators", generators)
    backend.seed(5)
    assert seeds == [(1, 5)]
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.xpu, name, lambda device: device.index)
    assert backend.memory_stats() == {"allocated": 1, "max_allocated": 1, "reserved": 1, "max_reserved": 1}
    sections_with_flash = sections() | {"runtime": RuntimeConfig(attention="flash")}  # --device auto, which found XPUs
    with pytest.raises(ConfigError, match="--device xpu cannot run --attention-backend flash"):
        check_capabilities(SimpleNamespace(**sections_with_flash), backend)


def test_ranks_on_intel_gpus_join_by_xccl(xpu, monkeypatch):
    two, launch = ParallelConfig(world_size=2), Launch(world_size=2)
    monkeypatch.setattr(torch.distributed, "is_xccl_available", lambda: False)
    with pytest.raises(ConfigError, match="has no XCCL, by which ranks with --device xpu communicate"):
        select_backend(RuntimeConfig(), two, launch)
    monkeypatch.setattr(torch.distributed, "is_xccl_available", lambda: True)
    joined = []
    monkeypatch.setattr(XpuBackend, "_join", lambda backend, parallel, transports: joined.append(transports))
    backend = select_backend(RuntimeConfig(), two, launch)
    assert joined == ["cpu:gloo,xpu:xccl"] and backend._group_options("tp").backend == "xccl"


def test_the_gpu_of_a_mac_is_asked_for_and_has_one_rank(machine, monkeypatch):
    machine(found=("mps",))
    backend = select_backend(RuntimeConfig(device="mps"), ParallelConfig(), Launch())
    assert isinstance(backend, MpsBackend) and backend.device.type == "mps" and "Apple" in backend.device_name()
    with pytest.raises(ConfigError, match="--device mps supports one rank, and torchrun started 2"):
        select_backend(
            RuntimeConfig(device="mps"), ParallelConfig(world_size=2), Launch(world_size=2, launcher="torchrun")
        )
    for bf16 in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor, bf16=bf16: bf16)
        assert ("bf16" in backend.capabilities().dtypes) is bf16
    sizes = iter([300, 200])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(sizes))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 400)
    assert [backend.memory_stats()["max_allocated"] for _ in range(2)] == [300, 300]
    tensor = backend.host_tensor(np.arange(3))
    assert tensor.tolist() == [0, 1, 2] and not tensor.is_pinned()


def test_what_a_macs_gpu_cannot_do_is_refused(machine, monkeypatch):
    machine(found=("mps",))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    backend = MpsBackend(RuntimeConfig(), ParallelConfig(), Launch())
    refused = {
        "does not support bf16": {"precision": PrecisionConfig(dtype="bf16")},
        "cannot run --compile": {"runtime": RuntimeConfig(compile="layer")},
        "cannot run --optimizer adafactor": {"optimizer": OptimizerConfig(kind="adafactor")},
    }
    for text, changes in refused.items():
        with pytest.raises(ConfigError, match=text):
            check_capabilities(SimpleNamespace(**sections() | changes), backend)


def sections():
    """Return the sections that the check reads."""
    from support.layout_matrix import Cell

    config = Cell().config()
    return {name: getattr(config, name) for name in ("runtime", "precision", "optimizer", "fp8", "parallel")}
