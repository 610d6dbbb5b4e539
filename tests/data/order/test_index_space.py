"""Memory and disk of sample indices: estimates, and refusal of an index that does not fit."""

from __future__ import annotations

import shutil
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.order import index_cache, index_space
from megatron_lite.data.order.index_cache import Notices, cached_index, write_index
from megatron_lite.data.order.index_space import available_memory, check_disk, check_memory
from megatron_lite.data.order.sample_index import IndexPlan, build_index, plan_index
from megatron_lite.errors import DataError
from megatron_lite.formatting import format_size

HUGE = IndexPlan(0, 45, 12_000, 4_000_000_000, 32, 1234, "legacy")


@pytest.fixture
def data(tmp_path):
    rng = np.random.RandomState(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for size in rng.randint(1, 40, 300):
            writer.add_document(rng.randint(0, 100, size))
    return IndexedDataset(tmp_path / "corpus")


def plan_for(data, samples, length):
    return plan_index(
        data.sizes, (0, 300), num_samples=samples, seq_length=length, seed=1, order="legacy", prefix=data.prefix
    )


@pytest.mark.parametrize(("samples", "length"), [(600_000, 8), (100_000, 400), (2_000_000, 1)])
def test_memory_and_disk_of_a_build_stay_within_the_estimate(data, tmp_path, samples, length, monkeypatch):
    monkeypatch.setattr("megatron_lite.data.order.sample_index.CHUNK", 1 << 12)
    plan = plan_for(data, samples, length)
    tracemalloc.start()
    index = build_index(plan, data.sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.9 * plan.build_bytes <= peak <= 1.02 * plan.build_bytes + (1 << 18)
    write_index(index, tmp_path / "index", Notices())
    size = sum(path.stat().st_size for path in (tmp_path / "index").glob("*.npy"))
    assert plan.file_bytes == pytest.approx(size, abs=4096)


def test_index_larger_than_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(index_space, "available_memory", lambda: 10 * 10**9)
    with pytest.raises(DataError) as caught:
        check_memory(HUGE, "corpus", "Give a smaller --train-iters")
    text = str(caught.value)
    assert '4,000,000,000 samples, 10,666,667 epochs of 45 documents of "corpus"' in text
    assert f"takes {format_size(HUGE.build_bytes)} of memory, and 9.31 GiB are free" in text
    assert 'Check that "corpus" is the intended dataset' in text
    assert (
        "Give a smaller --train-iters: about 1,000,000,000 samples fit, 25 % of those requested; or use a machine"
        in text
    )
    monkeypatch.setattr(index_space, "available_memory", lambda: 10 * HUGE.build_bytes)
    check_memory(HUGE, "corpus", "")
    monkeypatch.setattr(index_space, "available_memory", lambda: None)
    check_memory(HUGE, "corpus", "")


def test_index_larger_than_the_disk_is_refused_with_both_sizes(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(
        DataError, match=r"take 1[67].*GiB, and 954 MiB are free on .*Give --data-cache-path a folder with"
    ):
        check_disk(HUGE, "corpus", tmp_path, "Give a smaller --train-iters")


def test_refused_index_leaves_no_files_and_a_cached_one_needs_no_memory(data, tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "WORTH_KEEPING", 0)
    plan = plan_for(data, 5000, 8)
    monkeypatch.setattr(index_space, "available_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"takes 49 KiB of memory, and 0.977 KiB are free"):
        cached_index(plan, data, tmp_path / "cache", Notices())
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(index_cache, "WORTH_KEEPING", 0)
    built = cached_index(plan, data, tmp_path / "cache", Notices())
    monkeypatch.setattr(index_space, "available_memory", lambda: 1000)
    assert len(cached_index(plan, data, tmp_path / "cache", Notices())) == len(built)


def write_group(folder, files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_the_least_limit(tmp_path, monkeypatch, version):
    """A container has less memory than its machine; the page cache counts as free."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    write_group(proc, {"meminfo": "MemTotal: 99 kB\nMemAvailable:   64000000 kB\n"})
    if version == 2:
        write_group(proc / "self", {"cgroup": "0::/job/step\n"})
        top, names = groups, ("memory.max", "memory.current", "inactive_file")
    else:
        write_group(proc / "self", {"cgroup": "5:cpu:/\n4:memory:/job/step\n0::/\n"})
        top, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    stat = f"anon 5\n{names[2]} 400\n"
    write_group(top / "job", {names[0]: "5000", names[1]: "1000", "memory.stat": stat})
    write_group(top / "job" / "step", {names[0]: "max", names[1]: "900"})
    monkeypatch.setattr(index_space, "PROC", proc)
    monkeypatch.setattr(index_space, "CGROUPS", groups)
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert available_memory() == 5000 - 1000 + 400
    (top / "job" / names[0]).write_text("max")
    assert available_memory() == 64_000_000 * 1024
    monkeypatch.setattr("resource.getrlimit", lambda _: (3000, -1))
    assert available_memory() == 3000


def test_available_memory_is_unknown_without_proc_files(tmp_path, monkeypatch):
    monkeypatch.setattr(index_space, "PROC", tmp_path / "absent")
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert available_memory() is None
