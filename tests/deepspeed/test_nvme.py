"""Tests of ZeRO stage 3 with NVMe swap files for parameters and optimizer state, on DeepSpeed's I/O extension."""

import dataclasses
import sys
from pathlib import Path

import pytest
from support import async_io
from support.deepspeed_cells import ZeroCell, nvme
from support.layout_matrix import (
    LIMITS,
    SP,
    ZERO1,
    Cell,
    build,
    deviation,
    iterate,
    mesh_of,
    put_together,
    run_cell,
    within,
)
from support.ranks import RankPools
from support.resume import check

from megatron_lite.errors import TrainingError
from megatron_lite.schedules.progress import Progress

PIPELINED = {"pipeline_read": True, "pipeline_write": True}
SMALL_GROUPS = (("sub_group_size", 20_000), ("stage3_param_persistence_threshold", 0))


@pytest.fixture(scope="module", autouse=True)
def operator():
    """Build the operator in the environment's folder, and swap tensors of 4 KiB: DeepSpeed leaves 1 MiB in memory."""
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    try:
        async_io.build(Path(sys.prefix) / "async_io")
    except Exception as error:
        pytest.skip(f"DeepSpeed's operator async_io cannot be built (apt-get install libaio-dev g++): {error}")
    with pytest.MonkeyPatch.context() as patch:
        for module in (optimizer_utils, partitioned_param_swapper):
            patch.setattr(module, "MIN_AIO_BYTES", 4096)
        yield


@pytest.fixture(scope="module")
def on_ranks(operator, tmp_path_factory):
    """Ranks that are forked after `operator` has changed DeepSpeed."""
    pools = RankPools(lambda: tmp_path_factory.mktemp("ranks"))
    yield pools
    pools.close()


@pytest.mark.parametrize(
    ("cell", "optimizer"),
    [
        (ZeroCell(dp=2, stage=3, model="llama"), PIPELINED),
        (ZeroCell(dp=2, stage=3, dtype="bf16"), {}),
        (ZeroCell(tp=2, dp=2, stage=3, **SP), {}),
    ],
    ids=str,
)
def test_swapping_trains_the_same_model(cell, optimizer, on_ranks, tmp_path):
    cell = dataclasses.replace(cell, zero=(*nvme(tmp_path, **optimizer), *SMALL_GROUPS))
    ours = put_together(on_ranks(cell.world, run_cell, cell, timeout=90))
    reference = put_together(on_ranks(cell.reference().world, run_cell, cell.reference()))
    found = deviation(ours, reference)
    assert within(found, LIMITS["fp32" if cell.dtype == "fp32" else "bf16"]), found


def test_a_run_moves_to_swap_files_and_back(on_ranks, tmp_path):
    swapped = ZeroCell(dp=2, stage=3, zero=(*nvme(tmp_path / "swap", **PIPELINED), *SMALL_GROUPS))
    layouts = (Cell(dp=2, **ZERO1), swapped)
    for number, writer in enumerate(layouts):
        check(writer, layouts, on_ranks, tmp_path / str(number))


def count_files(backend, cell, folder):
    """On one rank: train and close the engine; files of optimizer state and of parameters before, and folders after."""
    config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build(config, mesh)
    iterate(config, mesh, engine, Progress(), 1)
    mesh.world.barrier()
    files = [str(path) for path in folder.rglob("*.swp")]
    mesh.world.barrier()
    engine.close()
    mesh.world.barrier()
    return (
        sum("/optimizer/" in name for name in files),
        sum("params/" in name for name in files),
        [path.name for path in folder.iterdir()],
    )


def test_what_is_swapped_and_removed(on_ranks, tmp_path):
    killed = tmp_path / "megatron-lite-swap-rank0-killed"
    killed.mkdir()
    (killed / "lock").touch()
    cell = ZeroCell(dp=2, stage=3, zero=(*nvme(tmp_path), *SMALL_GROUPS))
    state, parameters, left = on_ranks(2, count_files, cell, tmp_path)[0]
    assert state == 2 * 2 * 3, "main parameters and moments of two groups on both ranks"
    assert parameters > 20
    assert left == []


def gather_all(backend, cell):
    config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
    try:
        iterate(config, mesh, build(config, mesh), Progress(), 3)
    except TrainingError as error:
        return str(error)
    return ""


def test_too_few_buffers_are_an_error_with_advice(on_ranks, tmp_path):
    cell = ZeroCell(dp=2, stage=3, zero=(*nvme(tmp_path), *SMALL_GROUPS, ("stage3_max_reuse_distance", 10**9)))
    assert "a larger buffer_count" in on_ranks(2, gather_all, cell)[0]
