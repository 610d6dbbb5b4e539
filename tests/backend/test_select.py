"""Tests of backend selection: CPU and GPU of each rank, and refusals."""

import numpy as np
import pytest
import torch

from megatron_lite.backend.base import claim_device
from megatron_lite.backend.cuda import CudaBackend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError, TrainingError

CPU = RuntimeConfig(device="cpu")


def test_properties_of_the_cpu_backend():
    backend = select_backend(CPU, ParallelConfig(), Launch())
    assert (backend.name, backend.device.type, backend.rank, backend.world_size) == ("cpu", "cpu", 0, 1)
    assert backend.device_name() and backend.peak_flops(torch.float32) is None
    assert "fp32" in backend.capabilities().dtypes
    before = backend.memory_stats()
    held = torch.ones(64 * 2**20)  # larger than what the allocator keeps
    after = backend.memory_stats()
    assert after["allocated"] - before["allocated"] > 0.9 * held.nbytes
    assert after["max_allocated"] >= after["allocated"]
    backend.synchronize()
    backend.shutdown()


def test_read_only_arrays_are_copied_without_warnings(recwarn):
    backend = select_backend(CPU, ParallelConfig(), Launch())
    array = np.arange(4)
    array.flags.writeable = False
    tensor = backend.to_device(backend.host_tensor(array))
    tensor[0] = 7
    assert array[0] == 0 and not recwarn.list


def test_the_same_seed_draws_the_same():
    backend = select_backend(CPU, ParallelConfig(), Launch())
    draws = []
    for seed in (5, 5, 6, 2**63 - 1):
        backend.seed(seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


def test_a_world_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="torchrun started 2 ranks, but --world-size is 1"):
        select_backend(CPU, ParallelConfig(), Launch(world_size=2, launcher="torchrun"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"--device cuda \(or gpu, rocm\) is given, but PyTorch"):
        select_backend(RuntimeConfig(device="cuda"), ParallelConfig(), Launch())


@pytest.mark.slow
def test_a_rendezvous_timeout_names_this_rank(tmp_path):
    parallel = ParallelConfig(world_size=2, rendezvous_timeout_minutes=0.01, distributed_timeout_minutes=0.01)
    launch = Launch(rank=1, world_size=2, host="node7", init_method=f"file://{tmp_path}/store")
    with pytest.raises(TrainingError, match="rank 1 of 2 on node7"):
        select_backend(RuntimeConfig(device="cpu", num_threads=1), parallel, launch)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(4, 3, 3), (1, 3, 0), (1, 0, 0), (4, 5, 1)])
def test_a_rank_uses_the_gpu_of_its_local_rank_among_those_that_it_sees(visible, local_rank, index, monkeypatch):
    """With srun --gpus-per-task=1 every task sees one GPU, number 0; with =4, ranks 4 to 7 see numbers 0 to 3."""
    chosen = gpus(monkeypatch, visible)
    launch = Launch(local_rank=local_rank, local_world_size=8)
    backend = CudaBackend(RuntimeConfig(), ParallelConfig(), launch)
    assert backend.device == torch.device("cuda", index) == chosen[0]


def test_a_rank_that_sees_no_gpu_is_refused(monkeypatch):
    gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="Rank 2 on n1 sees no GPU"):
        CudaBackend(RuntimeConfig(), ParallelConfig(), Launch(rank=2, world_size=4, host="n1"))


def test_ranks_that_share_a_gpu_are_refused():
    store = torch.distributed.HashStore()
    for rank, host, device in ((0, "n1", "GPU-a"), (1, "n1", "GPU-b"), (2, "n2", "GPU-a"), (3, "n2", "")):
        claim_device(store, Launch(rank=rank, host=host), device)
    claim_device(store, Launch(rank=4, host="n2"), "")
    with pytest.raises(
        ConfigError, match=r"Ranks 1 and 5 on n1 have the same GPU \(GPU-b\).* \(3 were started there\)"
    ):
        claim_device(store, Launch(rank=5, host="n1", local_world_size=3), "GPU-b")


@pytest.mark.parametrize("failed", [False, True])
def test_groups_are_destroyed_unless_an_error_ends_the_job(failed, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("destroyed"))
    select_backend(CPU, ParallelConfig(), Launch()).shutdown(failed=failed)
    assert calls == ([] if failed else ["destroyed"])


def gpus(monkeypatch, visible):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", lambda text: chosen.append(text))
    return chosen


@pytest.fixture
def switches(monkeypatch):
    """Return what is set in torch, by name."""
    found = {}
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: found.update(fp32=value))
    for name in ("flash", "mem_efficient", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", lambda on, name=name: found.update({name: on}))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    return found


def test_settings_of_a_gpu(monkeypatch, switches):
    chosen = gpus(monkeypatch, 1)
    lines = CudaBackend(RuntimeConfig(), ParallelConfig(), Launch()).settings()
    assert switches == {"fp32": "highest"} and "expandable_segments:True" in chosen
    assert lines[1:] == ["attention by PyTorch's choice", "allocator: expandable_segments:True"]
    lines = CudaBackend(RuntimeConfig(attention="fused", tf32=True), ParallelConfig(), Launch()).settings()
    assert switches == {"fp32": "high", "flash": False, "mem_efficient": False, "cudnn": True}
    assert lines[:2] == ["fp32 products in TF32", "attention by cuDNN"]


def test_the_allocator_settings_of_the_environment_are_kept(monkeypatch, switches):
    chosen = gpus(monkeypatch, 1)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    lines = CudaBackend(RuntimeConfig(), ParallelConfig(), Launch()).settings()
    assert lines[-1] == "allocator: max_split_size_mb:128"
    assert "expandable_segments:True" not in chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_chosen_and_seeded():
    backend = select_backend(RuntimeConfig(), ParallelConfig(), Launch())
    assert backend.name == "cuda" and backend.to_device(backend.host_tensor(np.arange(3))).is_cuda
    draws = []
    for _ in range(2):
        backend.seed(11)
        draws.append(torch.rand(3, device=backend.device))
    assert torch.equal(draws[0], draws[1])
    assert set(backend.memory_stats()) == {"allocated", "max_allocated", "reserved", "max_reserved"}
