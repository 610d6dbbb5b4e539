"""Fixtures of the XLA tests: eight virtual devices of this machine's CPU, opened before any other backward pass."""

import os

import pytest

os.environ |= {
    "PJRT_DEVICE": "CPU",
    "CPU_NUM_DEVICES": "8",
    # The graphs are small, and most of the time of the tests is their compilation.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


@pytest.fixture(scope="session", autouse=True)
def xla_devices():
    """Start the runtime: the autograd engine counts its devices at the first backward pass."""
    import torch
    import torch_xla
    import torch_xla.runtime

    torch_xla.runtime.use_spmd()
    assert torch_xla.runtime.global_runtime_device_count() == 8
    torch.ones(1, device=torch_xla.device()).requires_grad_().sum().backward()
    torch_xla.sync()
