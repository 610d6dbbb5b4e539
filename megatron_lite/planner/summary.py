"""Run summary computed from the config: parameters, FLOPs, layout, length, ramp-up stages and saves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_lite.config.counts import flops_per_token, parameter_count
from megatron_lite.config.layout import AXES, describe_sizes
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig
from megatron_lite.formatting import format_parameters
from megatron_lite.planner.memory import RankMemory, rank_memory
from megatron_lite.planner.model_state import GRADIENT_BYTES, state_bytes
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.learning_rate import lr_steps
from megatron_lite.schedules.length import (
    consumed_at,
    last_iteration,
    ramp_stages,
    test_samples,
    tokens_at,
    train_samples,
    valid_samples,
)
from megatron_lite.schedules.microbatches import idle_share, num_microbatches
from megatron_lite.schedules.saves import save_iterations


@dataclass(frozen=True)
class ModelSize:
    """Size of the model.

    Attributes:
        exact: number of parameters, without those of padding rows.
        name: the same as in names of models: 13B.
        vocab_size: rows of the embedding that `exact` counts.
        flops_per_token: model FLOPs to train on one token, backward included.
    """

    exact: int
    name: str
    without_embedding: int
    vocab_size: int
    padded_vocab_size: int
    flops_per_token: int


@dataclass(frozen=True)
class Layout:
    """Split of the model. `stage_layers` holds (first layer, number) of every stage in the model's order."""

    world_size: int
    tp: int
    cp: int
    pp: int
    dp: int
    distributed_optimizer: bool
    stage_layers: tuple[tuple[int, int], ...]

    @property
    def axes(self) -> str:
        """The sizes of the mesh's axes, as text."""
        return describe_sizes({"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp})


@dataclass(frozen=True)
class BatchStage:
    """Iterations of one global batch.

    Attributes:
        first_iteration: from 1, as in the log; `last_iteration` likewise, both included.
        first_sample: samples consumed before it.
        micro_batches: of one iteration, over all replicas.
        per_replica: fewest and most micro-batches of one replica.
        replicas_without: replicas without a micro-batch.
        idle: share of the replicas' time without work.
    """

    first_iteration: int
    last_iteration: int
    first_sample: int
    global_batch: int
    micro_batches: int
    per_replica: tuple[int, int]
    replicas_without: int
    idle: float


@dataclass(frozen=True)
class Length:
    """Length of the run, its learning-rate schedule in `lr_unit`, and the samples requested from each split."""

    iterations: int
    samples: int
    tokens: int
    total_flops: float
    train_samples_asked: int
    valid_samples_asked: int
    test_samples_asked: int
    warmup: float
    decay: int
    lr_unit: str


@dataclass(frozen=True)
class Saves:
    """Number of scheduled checkpoints, and the iterations of the first and the last."""

    count: int
    first: int | None
    last: int | None


@dataclass(frozen=True)
class Memory:
    """Memory of the ranks of one model replica.

    Attributes:
        moment_bytes: of the optimizer's moments for a trained parameter, on average.
        model_state: bytes of weights, gradients and optimizer state on the rank with the most of them.
        total: all bytes of the rank with the most of them.
        ranks: memory of each pipeline rank.
    """

    moment_bytes: float
    model_state: int
    total: int
    ranks: tuple[RankMemory, ...]


@dataclass(frozen=True)
class RunSummary:
    """Facts that follow from a config."""

    model: ModelSize
    layout: Layout
    memory: Memory
    length: Length
    stages: tuple[BatchStage, ...]
    saves: Saves


def summarize(config: RunConfig) -> RunSummary:
    """Return the summary of a run; model.vocab_size should be filled in (config/vocabulary.py)."""
    return RunSummary(
        model_size(config), _layout(config), _memory(config), _length(config), batch_stages(config), _saves(config)
    )


def batch_stages(config: RunConfig) -> tuple[BatchStage, ...]:
    """Return the stages of constant global batch, with the load of the replicas; the last one ends with the run."""
    micro, replicas, end = config.batch.micro_batch_size, config.parallel.dp, last_iteration(config)
    stages = []
    for stage in ramp_stages(config):
        if stage.first_iteration > end:
            break
        batch = stage.global_batch
        stages.append(
            BatchStage(
                first_iteration=stage.first_iteration,
                last_iteration=min(stage.last_iteration, end),
                first_sample=stage.consumed,
                global_batch=batch,
                micro_batches=batch // micro,
                per_replica=(
                    num_microbatches(batch, micro, replicas, replicas - 1),
                    num_microbatches(batch, micro, replicas, 0),
                ),
                replicas_without=max(0, replicas - batch // micro),
                idle=idle_share(batch, micro, replicas),
            )
        )
    return tuple(stages)


def model_size(config: RunConfig) -> ModelSize:
    """Return the size of a run's model."""
    model = config.model
    exact = parameter_count(model)
    return ModelSize(
        exact=exact,
        name=format_parameters(exact),
        without_embedding=parameter_count(model, 0),
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        flops_per_token=flops_per_token(model, config.batch.seq_length),
    )


def _layout(config: RunConfig) -> Layout:
    parallel = config.parallel
    layers = stage_layers(config.model, parallel, config.batch.seq_length)
    return Layout(
        world_size=parallel.world_size,
        tp=parallel.tp,
        cp=parallel.cp,
        pp=parallel.pp,
        dp=parallel.dp,
        distributed_optimizer=parallel.distributed_optimizer,
        stage_layers=tuple((part.start, len(part)) for part in layers),
    )


def _memory(config: RunConfig) -> Memory:
    ranks = rank_memory(config)
    # Of a rank that holds all of the model; both count padding.
    alone = state_bytes(replace(config, parallel=ParallelConfig()), dict.fromkeys(AXES, 0))
    return Memory(
        moment_bytes=alone["moments"] * GRADIENT_BYTES / max(alone["gradients"], 1),
        model_state=max(rank.model_state for rank in ranks),
        total=max(rank.total for rank in ranks),
        ranks=ranks,
    )


def _length(config: RunConfig) -> Length:
    iterations = last_iteration(config)
    steps, tokens = lr_steps(config), tokens_at(config, iterations)
    by_samples = bool(config.training.train_samples)
    unit = 1 if by_samples else max(1, final_batch_size(config.batch, config.parallel.dp))
    return Length(
        iterations=iterations,
        samples=consumed_at(config, iterations),
        tokens=tokens,
        total_flops=float(tokens) * flops_per_token(config.model, config.batch.seq_length),
        train_samples_asked=train_samples(config),
        valid_samples_asked=valid_samples(config),
        test_samples_asked=test_samples(config),
        warmup=steps.warmup / unit,
        decay=steps.decay // unit,
        lr_unit="samples" if by_samples else "iterations",
    )


def _saves(config: RunConfig) -> Saves:
    if not config.checkpoint.save:
        return Saves(0, None, None)
    phases = save_iterations(config.checkpoint, last_iteration(config))
    return Saves(sum(map(len, phases)), *((phases[0][0], phases[-1][-1]) if phases else (None, None)))
