"""Single-rank dry run: runs a simulated rank's engine on meta tensors, one iteration for each batch size."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.backend.accounting import Transfer
from megatron_lite.backend.fake import FakeBackend
from megatron_lite.config.layout import AXES, Coordinates, coordinates, rank_of
from megatron_lite.config.partition import num_stages
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.planner.summary import BatchStage, batch_stages
from megatron_lite.rehearsal.kernels import attention, gpu_kernels
from megatron_lite.rehearsal.shapes import MetaTensorMode
from megatron_lite.schedules.iteration import IterationPlan, plan_iteration
from megatron_lite.schedules.length import tokens_at
from megatron_lite.schedules.microbatches import microbatch_number
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine
from megatron_lite.train.batches import BatchParts, rank_batch_parts
from megatron_lite.train.comparison import check_capabilities
from megatron_lite.train.engine import BatchReader


class RehearsalBackend(FakeBackend):
    """Fake backend with the memory of a GPU's fused attention kernels (rehearsal/kernels.py)."""

    def has_block_kernel(self, q: Tensor) -> bool:
        """Return True: as for attention."""
        return True

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        dropout: float,
        causal: bool,
        new_shapes: bool = False,
    ) -> Tensor:
        """Call the operator of the kernel that a GPU uses."""
        return attention(q, k, v, mask, dropout=dropout, causal=causal)


@dataclass(frozen=True)
class IterationRecord:
    """Communication and memory of one iteration of one rank.

    Attributes:
        transfers: collective calls and P2P messages, in order.
        working_bytes: peak memory in addition to the buffers: activations, logits, temporary gradients.
    """

    transfers: tuple[Transfer, ...]
    working_bytes: int


@dataclass
class RankReport:
    """Result of the dry run of one rank.

    Attributes:
        rank: number in the job.
        at: coordinates.
        parameters: number of parameters, without padding.
        buffers: bytes of parameters, gradients and optimizer state, by kind.
        plans: plan of the first iteration of each ramp-up stage.
        iterations: record of each of these iterations; None: skipped. Iterations with equal numbers of micro-batches
            and sequence lengths share one record.
        seconds: duration of the dry run.
        error: the error that ended the dry run; empty: none.
    """

    rank: int
    at: Coordinates
    parameters: int = 0
    buffers: dict[str, int] = field(default_factory=dict)
    plans: list[IterationPlan] = field(default_factory=list)
    iterations: list[IterationRecord | None] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def rehearse_ranks(config: RunConfig, ranks: Mapping[int, bool]) -> Iterator[RankReport]:
    """Run ranks of a job on meta tensors, one after the other.

    Args:
        config: the run, with the vocabulary size. No other rank is started, and no file is read.
        ranks: rank numbers, and for each whether to run all ramp-up stages. Otherwise stages in which the pipeline
            schedule only repeats, with more than two micro-batches per pipeline stage, are skipped except the last.
    """
    # Compilation would compile for this machine, not for the job's.
    config = replace(config, runtime=replace(config.runtime, compile="off"))
    stages = batch_stages(config)
    mode = MetaTensorMode()
    with mode:
        for rank, all_stages in ranks.items():
            yield _rehearse_rank(config, rank, stages, mode, all_stages)
            gc.collect()  # engines have reference cycles, and the memory of the next rank is counted


def representative_ranks(config: RunConfig) -> dict[int, bool]:
    """Return the first replica's pipeline stages and the last rank, and for each whether to run all ramp-up stages.

    With context parallelism also the last rank that shares the sequences of rank 0, with which it is compared. The
    first replica has the most micro-batches, and the last rank's replica the fewest, possibly none in a ramp-up stage
    whose batch is smaller than the number of replicas. Rank 0 and the last rank run all ramp-up stages.
    """
    parallel = config.parallel
    last = parallel.world_size - 1
    stages = [rank_of({**dict.fromkeys(AXES, 0), "pp": stage}, parallel) for stage in range(parallel.pp)]
    neighbour = rank_of({**dict.fromkeys(AXES, 0), "cp": parallel.cp - 1}, parallel)
    return {rank: rank in (0, last) for rank in dict.fromkeys([*stages, neighbour, last])}


def _rehearse_rank(
    config: RunConfig, rank: int, stages: Sequence[BatchStage], mode: MetaTensorMode, all_stages: bool
) -> RankReport:
    report = RankReport(rank, coordinates(rank, config.parallel))
    started = time.perf_counter()
    with _record_error(report, "start-up"):
        backend = RehearsalBackend(rank, config.parallel.world_size)
        check_capabilities(config, backend)
        mesh = build_mesh(backend, config.parallel)
        engine = build_engine(config, mesh, kernels=gpu_kernels(config))
        report.parameters = sum(p.rectangle.numel for p in engine.buffers.parameters)
        report.buffers = engine.state_bytes()
        parts = rank_batch_parts(config, mesh.pp.rank)
        plans = [plan_iteration(config, _progress_before(config, stage), replica=mesh.dp.rank) for stage in stages]
        report.plans = plans
        enough = plans[-1].microbatches if all_stages else 2 * num_stages(config.model, config.parallel)
        seen: dict[tuple[int, int], IterationRecord] = {}
        for plan in plans:
            key = plan.microbatches, plan.seq_length
            if key not in seen and (plan.microbatches <= enough or plan is plans[-1]):
                with _record_error(report, f"iteration {plan.iteration:,}"):
                    backend.traffic.clear()
                    mode.reset_peak()
                    before = mode.live
                    engine.train_step(plan, _reader(config, plan, parts)).outcome()
                    seen[key] = IterationRecord(tuple(backend.traffic), mode.peak - before)
            if report.error:
                break
            report.iterations.append(seen.get(key))
    report.seconds = time.perf_counter() - started
    return report


def _progress_before(config: RunConfig, stage: BatchStage) -> Progress:
    """Return the progress at the beginning of a ramp-up stage, without skipped iterations."""
    iteration = stage.first_iteration - 1
    tokens = tokens_at(config, iteration)
    return Progress(
        iteration=iteration,
        consumed_train_samples=stage.first_sample,
        consumed_train_tokens=tokens,
        applied_iterations=iteration,
        applied_samples=stage.first_sample,
        applied_tokens=tokens,
    )


def _reader(config: RunConfig, plan: IterationPlan, parts: BatchParts) -> BatchReader:
    shape = config.batch.micro_batch_size, plan.seq_length

    def empty(dtype: torch.dtype, is_used: bool) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if is_used else None

    def read(index: int) -> MicroBatch:
        documents = None
        if parts.documents:
            # One document per sample needs the most memory.
            order, places = torch.empty((2, shape[0] * shape[1]), dtype=torch.int64, device="meta")
            cu_seqlens = torch.empty(shape[0] + 1, dtype=torch.int32, device="meta")
            documents = Documents(order, places, (shape,), cu_seqlens)
        return MicroBatch(
            tokens=empty(torch.int64, parts.tokens),
            labels=empty(torch.int64, parts.labels),
            loss_mask=empty(torch.float32, parts.loss_mask),
            position_ids=empty(torch.int64, parts.position_ids),
            documents=documents,
            shape=shape,
            number=microbatch_number(config.parallel.dp, plan.replica, index),
        )

    return read


@contextmanager
def _record_error(report: RankReport, phase: str) -> Iterator[None]:
    """Record an exception as the report's error: the error with which this rank would have failed in the job."""
    try:
        yield
    except MegatronLiteError as error:
        report.error = f"{phase}: {type(error).__name__}: {error}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        report.error = f"{phase}: {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
