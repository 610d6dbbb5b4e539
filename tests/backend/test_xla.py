"""Tests of the XLA backend's refusals, without its package; tests/xla has those of its devices."""

import sys
from types import SimpleNamespace

import pytest
import torch

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
            r"--world-size 8 is not the number of XLA devices: 16 \(TPU\). Give --world-size 16",
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


@pytest.fixture
def runtime(monkeypatch):
    """Stand in for torch_xla on a slice of two hosts with four TPU chips each; return the record of calls."""
    calls = SimpleNamespace(cache=[], placed=[])
    native = SimpleNamespace(
        _xla_computation_cache_is_initialized=lambda: bool(calls.cache),
        _xla_set_mat_mul_precision=lambda name: None,
        _xla_get_runtime_devices=lambda: [f"TPU:{n}" for n in range(4)],
    )
    xr = SimpleNamespace(
        is_spmd=lambda: True,
        device_type=lambda: "TPU",
        initialize_cache=calls.cache.append,
        global_runtime_device_count=lambda: 8,
        process_count=lambda: 2,
    )
    spmd = SimpleNamespace(
        Mesh=lambda devices, shape, names: SimpleNamespace(device_ids=list(devices), mesh_shape=shape),
        mark_sharding=lambda tensor, mesh, spec: calls.placed.append((tensor, spec)),
    )
    modules = {
        "torch_xla": SimpleNamespace(_XLAC=native, runtime=xr, device=lambda: torch.device("cpu")),
        "torch_xla.core": SimpleNamespace(xla_model=SimpleNamespace()),
        "torch_xla.debug": SimpleNamespace(metrics=SimpleNamespace()),
        "torch_xla.distributed": SimpleNamespace(spmd=spmd),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(XlaBackend, "_join", lambda *args: None)
    group = SimpleNamespace(size=2, all_gather_object=lambda own: [own, [4 + number for number in own]])
    monkeypatch.setattr(XlaBackend, "new_group", lambda *args: group)
    return calls


def host(rank, cache=""):
    return XlaBackend(
        RuntimeConfig(device="xla", xla_cache=cache), ParallelConfig(world_size=8), Launch(rank=rank, world_size=2)
    )


def test_torch_xla_keeps_compiled_graphs_in_the_folder(runtime, tmp_path, monkeypatch):
    assert host(0, "off").settings()[1] == "compilation cache off" and not runtime.cache
    folder = str(tmp_path / "cache")
    assert host(0, folder).settings() == [
        "SPMD over 8 x 1 devices (data x tensor) on 2 hosts",
        f"compilation cache {folder}",
    ]
    assert runtime.cache == [folder]
    runtime.cache.clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    host(0)
    assert runtime.cache == [f"{tmp_path}/.cache/megatron_lite/xla"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_copies_its_own_samples_to_its_devices(runtime, rank):
    rows = torch.arange(8).view(4, 2) + 1  # a micro-batch of 8 samples: one for each device
    batch = host(rank, "off").to_device(rows)
    assert batch.shape == (8, 2) and runtime.placed[-1][1] == ("dp", None)
    assert torch.equal(batch[4 * rank : 4 * rank + 4], rows)
    assert batch.sum() == rows.sum()
