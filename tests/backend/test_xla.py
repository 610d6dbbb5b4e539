"""Tests of the XLA backend's refusals, without its package; tests/xla has those of its devices."""

import sys

import pytest

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.backend.xla import XlaBackend, cache_folder
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ConfigError, match=r"--device xla \(or tpu\) needs torch_xla, .*\[xla\]"):
        select_backend(RuntimeConfig(device="xla"), ParallelConfig(), Launch())


@pytest.mark.parametrize(
    ("world", "tp", "devices", "hosts", "message"),
    [
        (8, 1, 8, 2, r"spans 2 hosts, but torchrun started 4 ranks. Each host runs one process"),
        (
            8,
            1,
            16,
            4,
            r"--world-size 8 is not the number of devices that the XLA runtime found: 16 \(TPU\). Give "
            r"--world-size 16",
        ),
        (16, 8, 16, 4, r"Cannot divide 2 data-parallel replicas of 8 devices .* among 4 hosts.*-size 1, 2 or 4"),
    ],
)
def test_devices_and_hosts_of_the_runtime_must_fit(world, tp, devices, hosts, message):
    backend = XlaBackend.__new__(XlaBackend)
    backend.launch, backend.kind = Launch(world_size=4, launcher="torchrun"), "TPU"
    with pytest.raises(ConfigError, match=message):
        backend._check_devices(ParallelConfig(world_size=world, tp=tp), devices, hosts)


def test_the_cache_must_be_writable(tmp_path):
    assert cache_folder(str(tmp_path / "new" / "folder")) == str(tmp_path / "new" / "folder")
    with pytest.raises(ConfigError, match=r"Cannot write to the compilation cache /proc/nowhere \(--xla-cache-path\)"):
        cache_folder("/proc/nowhere")
