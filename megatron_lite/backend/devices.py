"""Device list: the kinds of --device, what PyTorch finds of each on this host, and why it finds none."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from megatron_lite.backend.cpu import processor_name
from megatron_lite.backend.xla_devices import count_xla_devices
from megatron_lite.formatting import format_count


class Device(NamedTuple):
    """One kind of --device.

    Attributes:
        kind: value of --device.
        found: what there is; empty: none.
        missing: why there is none.
    """

    kind: str
    found: str
    missing: str


def list_devices() -> list[Device]:
    """Return every kind of device; those that --device auto prefers come first."""
    return [find() for find in _FINDERS.values()]


def find_device(kind: str) -> Device:
    """Return the entry of one kind; no other kind of device is touched."""
    return _FINDERS[kind]()


def automatic_kind() -> str:
    """Return the kind that --device auto uses: a GPU of a server if there is one. A Mac's GPU must be asked for."""
    return next(kind for kind in ("cuda", "xpu", "cpu") if find_device(kind).found)


def _cuda() -> Device:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Device("cuda", f"{count} x {torch.cuda.get_device_name(0)} ({build})", "")
    if not torch.version.cuda and not torch.version.hip:
        return Device("cuda", "", f"PyTorch {torch.__version__} is built without CUDA and ROCm")
    tool = "nvidia-smi" if torch.version.cuda else "rocm-smi"
    return Device("cuda", "", f"PyTorch {torch.__version__} for {build} finds no GPU or driver, which {tool} lists")


def _xpu() -> Device:
    if torch.xpu.is_available():
        return Device("xpu", f"{torch.xpu.device_count()} x {torch.xpu.get_device_name(0)}", "")
    if not torch.version.xpu:
        return Device("xpu", "", f"PyTorch {torch.__version__} is built without Intel GPUs")
    return Device("xpu", "", f"PyTorch {torch.__version__} finds no Intel GPU or driver, which xpu-smi lists")


def _mps() -> Device:
    if torch.backends.mps.is_available():
        return Device("mps", "Apple GPU", "")
    if not torch.backends.mps.is_built():
        return Device("mps", "", f"PyTorch {torch.__version__} is built without Apple's GPUs")
    return Device("mps", "", f"macOS {platform.mac_ver()[0]} is too old for PyTorch's kernels, or has no GPU")


def _xla() -> Device:
    if find_spec("torch_xla") is None:
        return Device("xla", "", "torch_xla is not installed (docs/tpu.md)")
    if count := count_xla_devices():
        return Device("xla", f"{format_count(count, 'device')} of torch_xla", "")
    return Device("xla", "", "this host has no device file of a TPU, such as /dev/accel0")


def _cpu() -> Device:
    return Device("cpu", processor_name(), "")


_FINDERS: dict[str, Callable[[], Device]] = {"cuda": _cuda, "xpu": _xpu, "mps": _mps, "xla": _xla, "cpu": _cpu}
