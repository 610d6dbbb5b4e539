"""Tests of the start-up lines."""

from dataclasses import replace

from support.layout_matrix import Cell

from megatron_lite.backend.fake import FakeBackend
from megatron_lite.formatting import format_size
from megatron_lite.planner.memory import rank_memory
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.batches import BatchParts, RunData
from megatron_lite.train.introduction import introduction
from megatron_lite.train.start import Start


def lines(config, *, asynchronous):
    backend = FakeBackend(0, config.parallel.world_size)
    backend.asynchronous = asynchronous
    data = RunData(backend, BatchParts(), -1, 0)
    return introduction(config, backend, data, Start(), Progress(), ()).splitlines()


def test_a_device_with_memory_of_its_own_has_a_plan_of_it():
    config = Cell(pp=2, dtype="bf16").config()
    config = replace(config, batch=replace(config.batch, global_batch_size=8))
    fullest = max(rank_memory(config), key=lambda rank: rank.total)
    (line,) = [line for line in lines(config, asynchronous=True) if line.split()[0] == "memory"]
    assert f"{format_size(fullest.total)} planned for the tensors of pipeline rank {fullest.pp_rank}" in line
    assert f"{format_size(fullest.model_state)} of weights" in line
    assert not [line for line in lines(config, asynchronous=False) if line.split()[0] == "memory"]
