"""No iteration reads values of the device on the host before the next one is enqueued."""

import dataclasses

import pytest
import torch
from support.host_reads import NoHostReads
from support.layout_matrix import SP, ZERO1, Cell, mesh_of, reader

from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow

CELLS = (
    Cell(dropout="all", dtype="bf16", recompute="full"),
    Cell(dtype="fp16", documents=True),
    Cell(schedule="zb-v", model="llama"),
    Cell(tp=2, dtype="fp16", **SP),
    Cell(dp=2, dtype="bf16", **ZERO1),
    Cell(pp=2, model="bloom"),
    Cell(dp=2, tuning=TuningConfig(freeze=("embedding",), answer_loss=True)),
    Cell(optimizer="adafactor", dtype="fp16", ema=0.9),
    Cell(optimizer="lion", dtype="fp16"),
    Cell(optimizer="adamw8bit", ema=0.9),
    Cell(tp=2, optimizer="muon", model="llama"),
    Cell(dp=2, optimizer="muon", **ZERO1),
    Cell(dp=2, optimizer="adafactor", **ZERO1),
)


def train(backend, cell):
    """Enqueue four iterations, taking each outcome as late as allowed; return the finite flags."""
    config = dataclasses.replace(
        cell.config(),
        optimizer=dataclasses.replace(cell.config().optimizer, clip_grad=0.1),
        metrics=MetricsConfig(log_num_zeros=True, log_params_norm=True),
    )
    mesh = mesh_of(backend, cell.tp, cell.pp)
    engine, progress, pending, outcomes = build_engine(config, mesh, num_sources=2), Progress(), None, []
    with NoHostReads() as reads:
        for _ in range(4):
            plan = plan_iteration(config, progress, replica=mesh.dp.rank)
            samples = reader(mesh, plan.first_sample, 1, cell.documents)

            def read(index, samples=samples):
                with reads.allowed():
                    return dataclasses.replace(samples(index), sources=(1,))

            def rates(previous=pending, plan=plan):
                if previous is not None and cell.dtype == "fp16":
                    with reads.allowed():
                        outcomes.append(previous.outcome())
                return plan.learning_rate, plan.weight_decay

            step = engine.train_step(plan, read, rates)
            if pending is not None and cell.dtype != "fp16":
                with reads.allowed():
                    outcomes.append(pending.outcome())
            pending, progress = step, progress.advance(plan.global_batch, plan.tokens, applied=True)
    return [outcome.finite for outcome in (*outcomes, pending.outcome())]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_an_iteration_reads_no_value_of_the_device(cell, on_ranks):
    if cell.world > 1:
        results = on_ranks(cell.world, train, cell)
    else:
        results = [train(select_backend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch()), cell)]
    assert all(len(result) == 4 for result in results)
    assert all(all(result) for result in results) or cell.dtype == "fp16"


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: float(x),
        lambda x: int(x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.expand(3)[x.expand(3) > 0],
        lambda x: torch.equal(x, x),
    ],
)
def test_the_detector_finds_host_reads(read):
    x = torch.tensor(1.5)
    with NoHostReads() as reads, reads.allowed():
        read(x)
    with pytest.raises(AssertionError, match="a host read"), NoHostReads():
        read(x)
    assert read(x) is not None


def test_the_backend_of_cpus_reads_when_it_is_told_to():
    values = torch.tensor([1.0, 2.0])
    with NoHostReads() as reads:
        reading = CpuBackend.read_later(None, values)
        with reads.allowed():
            assert reading() == [1.0, 2.0]
