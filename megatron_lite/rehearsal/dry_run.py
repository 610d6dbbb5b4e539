"""Simulation of one rank: builds its engine and runs an iteration of every ramp-up stage."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from megatron_lite.planner.explain import BatchStage, batch_stages
from megatron_lite.rehearsal.shapes import ShapesOnly
from megatron_lite.schedules.iteration import IterationPlan, plan_iteration
from megatron_lite.schedules.length import tokens_at
from megatron_lite.schedules.microbatches import microbatch_number
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine
from megatron_lite.train.capabilities import check_capabilities
from megatron_lite.train.engine import BatchReader
from megatron_lite.train.native import NativeEngine


class RehearsalBackend(FakeBackend):
    """Fake backend with the memory of a GPU's fused attention kernel, which keeps no matrix of scores for backward.

    On the meta device torch would choose the kernel that keeps it.
    """

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, causal: bool
    ) -> Tensor:
        """Return the result's shape through the flash attention operator; with a mask, GPUs do not use it either."""
        if mask is not None:
            return super().attention(q, k, v, mask, dropout=dropout, causal=causal)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) if k.shape[2] < q.shape[2] else x for x in (k, v))
        flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = flash(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), dropout, causal)[0]
        return out.permute(2, 0, 1, 3)


@dataclass(frozen=True)
class IterationRecord:
    """One iteration of one rank.

    Attributes:
        transfers: what it sent and received, in order.
        working_bytes: most bytes alive at once besides the buffers: activations, logits, gradients under way.
    """

    transfers: tuple[Transfer, ...]
    working_bytes: int


@dataclass
class RankReport:
    """What playing one rank showed.

    Attributes:
        rank: in the job.
        at: its coordinates.
        parameters: of its stages, without padding.
        buffers: bytes that it holds throughout, by what they are for.
        plans: its iteration in each stage of the ramp-up.
        played: what happened in them; None: it was left out. Iterations alike in micro-batches and length are the same
            program, played once.
        seconds: that playing took.
        error: what stopped it; empty: nothing did.
    """

    rank: int
    at: Coordinates
    parameters: int = 0
    buffers: dict[str, int] = field(default_factory=dict)
    plans: list[IterationPlan] = field(default_factory=list)
    played: list[IterationRecord | None] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def rehearse_ranks(config: RunConfig, ranks: Mapping[int, bool]) -> Iterator[RankReport]:
    """Plays ranks of a job, one after the other.

    Args:
        config: the run, its vocabulary's size filled in. Its world is not started, its files are not read.
        ranks: which ones, and whether they play every stage of the ramp-up. The others leave out stages in which the
            pipeline repeats itself: those with more than two micro-batches for each of its stages, but for the last.
    """
    # Compilation would compile for this machine, not for the job's.
    config = replace(config, runtime=replace(config.runtime, compile=False))
    stages = batch_stages(config)
    shapes = ShapesOnly()
    with shapes:
        for rank, all_stages in ranks.items():
            yield _play_rank(config, rank, stages, shapes, all_stages)
            gc.collect()  # an engine is full of circles, and the next rank's memory is counted


def _play_rank(
    config: RunConfig, rank: int, stages: Sequence[BatchStage], shapes: ShapesOnly, all_stages: bool
) -> RankReport:
    report = RankReport(rank, coordinates(rank, config.parallel))
    started = time.perf_counter()
    with _explained(report, "start-up"):
        backend = RehearsalBackend(rank, config.parallel.world_size)
        check_capabilities(config, backend)
        mesh = build_mesh(backend, config.parallel)
        engine = build_engine(config, mesh)
        report.parameters = sum(p.rectangle.numel for p in engine.buffers.parameters)
        report.buffers = buffer_bytes(engine)
        plans = [plan_iteration(config, progress_before(config, stage), replica=mesh.dp.rank) for stage in stages]
        report.plans = plans
        enough = plans[-1].microbatches if all_stages else 2 * num_stages(config.model, config.parallel)
        seen: dict[tuple[int, int], IterationRecord] = {}
        for plan in plans:
            key = plan.microbatches, plan.seq_length
            if key not in seen and (plan.microbatches <= enough or plan is plans[-1]):
                with _explained(report, f"iteration {plan.iteration:,}"):
                    seen[key] = _play_iteration(config, engine, backend, plan, shapes)
            if report.error:
                break
            report.played.append(seen.get(key))
    report.seconds = time.perf_counter() - started
    return report


def _play_iteration(
    config: RunConfig, engine: NativeEngine, backend: FakeBackend, plan: IterationPlan, shapes: ShapesOnly
) -> IterationRecord:
    backend.traffic.clear()
    shapes.reset_peak()
    before = shapes.live
    engine.train_step(plan, _reader(config, plan))
    return IterationRecord(tuple(backend.traffic), shapes.peak - before)


def progress_before(config: RunConfig, stage: BatchStage) -> Progress:
    """The progress with which a stage of the ramp-up begins, if no iteration was skipped."""
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


def buffer_bytes(engine: NativeEngine) -> dict[str, int]:
    """Bytes of an engine's buffers by what they are for, padding included."""
    buffers = engine.buffers
    names = {tensor.name.split(".")[1] for tensor in engine.state_tensors() if tensor.name.startswith("optimizer.")}
    shard = sum(shard.values.numel() for shard in buffers.shards) * torch.float32.itemsize
    return {
        "parameters": sum(flat.values.nbytes for flat in buffers.buffers),
        "gradients": sum(flat.gradients.nbytes for flat in buffers.buffers),
        "main parameters": shard if "main_param" in names else 0,
        "moments": shard * len(names - {"main_param"}),
    }


def _reader(config: RunConfig, plan: IterationPlan) -> BatchReader:
    data, shape = config.data, (config.batch.micro_batch_size, plan.seq_length)

    def empty(dtype: torch.dtype, wanted: bool = True) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if wanted else None

    def read(index: int) -> MicroBatch:
        tokens, labels = torch.empty((2, *shape), dtype=torch.int64, device="meta")
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            loss_mask=empty(torch.float32, data.eod_mask_loss),
            position_ids=empty(torch.int64, data.reset_position_ids),
            documents=_whole_samples(shape) if data.reset_attention_mask else None,
            number=microbatch_number(config.parallel.dp, plan.replica, index),
        )

    return read


def _whole_samples(shape: tuple[int, int]) -> Documents:
    """One document a sample, of [b, s] tokens, yet taken apart: shorter ones need no more memory."""
    rows, places = torch.empty((2, shape[0] * shape[1]), dtype=torch.int64, device="meta")
    return Documents(rows, places, (shape,))


@contextmanager
def _explained(report: RankReport, phase: str) -> Iterator[None]:
    """Turns whatever goes wrong into the report's error: it is what this rank of the cluster would have died of."""
    try:
        yield
    except MegatronLiteError as error:
        report.error = f"{phase}: {type(error).__name__}: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        report.error = f"{phase}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def representative_ranks(config: RunConfig) -> dict[int, bool]:
    """The first replica's stages and the last rank, in order, and of each whether it is to play the whole ramp-up.

    Every pipeline stage is among them. The first replica has the most micro-batches of all, and the last rank's has the
    fewest: it is the one without any in a ramp-up stage that is too small for the replicas. These two play all.
    """
    parallel = config.parallel
    last = parallel.world_size - 1
    stages = [rank_of({**dict.fromkeys(AXES, 0), "pp": stage}, parallel) for stage in range(parallel.pp)]
    return {rank: rank in (0, last) for rank in dict.fromkeys([*stages, last])}
