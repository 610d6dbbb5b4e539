"""Job plan: time, saves, goodput and cost of a run from its first to its last iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf

from megatron_lite.config.counts import parameter_count
from megatron_lite.config.run import RunConfig
from megatron_lite.planner.disk import Storage, storage_of
from megatron_lite.planner.goodput import LLAMA3_NODE_HOURS, Goodput, goodput
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.step_time import StepModel, StepTime
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.length import consumed_at, equal_iterations, last_iteration, tokens_at
from megatron_lite.schedules.microbatches import idle_share

WRITE_RATE, WRITE_RATE_MOST = 1e9, 16e9
"""Assumed bytes per second to the file system: of one node, and of all."""
HOST_COPY_RATE = 10e9
"""Assumed bytes per second of one device's copies to host memory, which alone block training under --async-save."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the training command does not say.

    Attributes:
        write_rate: bytes per second of all nodes to the file system; 0: WRITE_RATE for each node.
        restart_seconds: from the end of a job to the first iteration of the next, queue left out.
        node_hours: mean time between failures of one node.
        job_seconds: time limit of one job; 0: --exit-duration-in-mins, or no limit.
        watts: power of a device; 0: that of its data sheet.
        pue: energy of the computing center per energy of the devices.
        carbon: grams of CO2 per kWh; 0: not given.
        price: of a device's hour; 0: not given.
    """

    write_rate: float = 0.0
    restart_seconds: float = 600.0
    node_hours: float = LLAMA3_NODE_HOURS
    job_seconds: float = 0.0
    watts: float = 0.0
    pue: float = 1.2
    carbon: float = 0.0
    price: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Iterations of equal batch size and sequence length.

    Attributes:
        first_iteration: from 1, as in the log; `last_iteration` likewise, both included.
        skipped: iterations among them that are not trained on (--skip-train-iteration-range).
        idle: share of the replicas' time without micro-batches.
        step: time of one iteration.
    """

    first_iteration: int
    last_iteration: int
    global_batch: int
    seq_length: int
    skipped: int
    idle: float
    step: StepTime

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return self.last_iteration - self.first_iteration + 1

    @property
    def seconds(self) -> float:
        """Time of all of them."""
        return (self.iterations - self.skipped) * self.step.total


@dataclass(frozen=True)
class Cost:
    """Resources of the run, failures included; None: not given."""

    device_hours: float
    megawatt_hours: float
    tons_of_co2: float | None
    price: float | None


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """Plan of a run.

    Attributes:
        stages: in the order of the iterations.
        seconds: by part: training, evaluation, saves, job starts, failures.
        classic_seconds: 8 B P / (n T) for B tokens, P parameters, n devices (Narayanan et al. 2021, eq. 4), with
            the hardware FLOP/s of the last stage as T.
        write_rate: bytes per second to the file system.
        save_seconds: of writing one checkpoint.
        blocking_seconds: of those, the ones in which training waits.
        between_saves: training time between two scheduled saves at the end of the run; inf: there is no schedule.
        jobs: number of jobs under the time limit.
        job_seconds: that limit; 0: none.
    """

    iterations: int
    samples: int
    tokens: int
    nodes: int
    stages: tuple[Stage, ...]
    seconds: dict[str, float]
    classic_seconds: float
    storage: Storage
    write_rate: float
    save_seconds: float
    blocking_seconds: float
    between_saves: float
    jobs: int
    job_seconds: float
    goodput: Goodput
    cost: Cost

    @property
    def repeats_first_job(self) -> bool:
        """Whether every job starts at iteration 0, since nothing is saved within the time limit."""
        return self.jobs > 1 and not self.storage.saves

    @property
    def can_finish(self) -> bool:
        """Whether the run reaches its last iteration; failures that prevent it are not in its time."""
        return self.goodput.can_finish and not self.repeats_first_job

    @property
    def total_seconds(self) -> float:
        """Expected time of the run."""
        return sum(self.seconds.values())

    def seconds_after(self, iteration: int) -> float:
        """Return the expected time of the run after `iteration` iterations, as their share of the training."""
        left = sum(
            stage.seconds * min(1.0, max(0.0, (stage.last_iteration - iteration) / stage.iterations))
            for stage in self.stages
        )
        training = self.seconds["training"]
        return self.total_seconds * left / training if training else 0.0

    @property
    def final(self) -> StepTime:
        """Step time of the last stage."""
        return self.stages[-1].step

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training, over the whole run."""
        return self.tokens / self.seconds["training"] if self.seconds["training"] else 0.0

    @property
    def model_flops_per_second(self) -> float:
        """Model FLOP/s of one device over the iterations of the run."""
        return self._rate(sum(stage.step.model_flops * (stage.iterations - stage.skipped) for stage in self.stages))

    @property
    def hardware_flops_per_second(self) -> float:
        """FLOP/s of one device with recomputation, over the iterations of the run."""
        return self._rate(sum(stage.step.hardware_flops * (stage.iterations - stage.skipped) for stage in self.stages))

    def _rate(self, flops: float) -> float:
        seconds = self.seconds["training"]
        return flops / seconds / self.final.devices if seconds else 0.0


def plan_job(config: RunConfig, machine: Hardware, assumptions: Assumptions) -> JobPlan:
    """Return the plan of a run from iteration 0.

    Args:
        config: with the vocabulary filled in, and at least one iteration.
        machine: device, node size and efficiencies.
        assumptions: what the command does not say.
    """
    parallel, end = config.parallel, last_iteration(config)
    nodes = ceil(parallel.world_size / machine.per_node)
    stages = tuple(run_stages(config, machine))
    training = sum(stage.seconds for stage in stages)
    storage = storage_of(config, [])
    rate = assumptions.write_rate or min(nodes * WRITE_RATE, WRITE_RATE_MOST)
    save = storage.checkpoint / rate
    copy = storage.checkpoint / (parallel.world_size * HOST_COPY_RATE)
    blocking = min(save, copy) if config.checkpoint.asynchronous else save
    interval = config.checkpoint.phases[-1].interval if config.checkpoint.save and config.checkpoint.phases else 0
    between = interval * stages[-1].step.total if interval else inf
    saves = storage.saves * blocking + storage.weights_only * storage.weights / rate
    evaluation = evaluations(config) * StepModel(config, machine, config.batch.seq_length).forward_seconds(
        final_batch_size(config.batch, parallel.dp)
    )
    limit = assumptions.job_seconds or 60.0 * config.training.exit_duration_minutes
    useful = training + evaluation
    jobs = max(1, ceil((useful + saves) / limit)) if limit else 1
    failures = goodput(
        useful=useful,
        between=between,
        save=blocking,
        restart=assumptions.restart_seconds,
        node_hours=assumptions.node_hours,
        nodes=nodes,
    )
    seconds = {
        "training": training,
        "evaluation": evaluation,
        "saves": saves,
        "job starts": jobs * assumptions.restart_seconds,
        # Without a schedule, a failure may cost any time: a warning says so.
        "failures": failures.lost_seconds if interval and failures.can_finish else 0.0,
    }
    final = stages[-1].step
    tokens = tokens_at(config, end)
    return JobPlan(
        iterations=end,
        samples=consumed_at(config, end),
        tokens=tokens,
        nodes=nodes,
        stages=stages,
        seconds=seconds,
        classic_seconds=8.0
        * tokens
        * parameter_count(config.model)
        / (parallel.world_size * final.hardware_flops_per_second),
        storage=storage,
        write_rate=rate,
        save_seconds=save,
        blocking_seconds=blocking,
        between_saves=between,
        jobs=jobs,
        job_seconds=limit,
        goodput=failures,
        cost=_cost(sum(seconds.values()), parallel.world_size, machine, assumptions),
    )


def run_stages(config: RunConfig, machine: Hardware) -> Iterator[Stage]:
    """Yield the stages of equal batch size and sequence length up to the last iteration."""
    end, batch, dp = last_iteration(config), config.batch, config.parallel.dp
    models: dict[int, StepModel] = {}
    known: dict[tuple[int, int], StepTime] = {}
    for run in equal_iterations(config):
        if run.iteration >= end:
            return
        last = end if run.count is None else min(end, run.iteration + run.count)
        shape = (run.global_batch, run.seq_length)
        if shape not in known:
            if run.seq_length not in models:
                models[run.seq_length] = StepModel(config, machine, run.seq_length)
            known[shape] = models[run.seq_length].time(run.global_batch)
        yield Stage(
            first_iteration=run.iteration + 1,
            last_iteration=last,
            global_batch=run.global_batch,
            seq_length=run.seq_length,
            skipped=_overlap(config.training.skip_iteration_ranges, run.iteration + 1, last),
            idle=idle_share(run.global_batch, batch.micro_batch_size, dp),
            step=known[shape],
        )


def evaluations(config: RunConfig) -> int:
    """Return the global batches that the run evaluates: every interval and at the end, of every dataset."""
    training, data = config.training, config.data
    if not training.eval_iters:
        return 0
    _, valid, test = (float(share) > 0 for share in data.split.split(","))
    every, end = training.eval_interval, last_iteration(config)
    times = (end // every if every else 0) + 1
    valid_sets, test_sets = len(data.valid_groups) or valid, len(data.test_groups) or test
    weights = 2 if config.optimizer.ema_decay else 1
    return training.eval_iters * weights * (times * valid_sets + test_sets)


def _overlap(ranges: tuple[tuple[int, int], ...], first: int, last: int) -> int:
    """Return how many iterations of [first, last] are in any of the ranges, which do not overlap."""
    return sum(max(0, min(last, end) - max(first, begin) + 1) for begin, end in ranges)


def _cost(seconds: float, devices: int, machine: Hardware, assumptions: Assumptions) -> Cost:
    hours = devices * seconds / 3600.0
    energy = hours * (assumptions.watts or machine.device.watts) * assumptions.pue / 1e6
    return Cost(
        device_hours=hours,
        megawatt_hours=energy,
        # Grams per kWh are kilograms per MWh.
        tons_of_co2=energy * assumptions.carbon / 1e3 if assumptions.carbon else None,
        price=hours * assumptions.price if assumptions.price else None,
    )
