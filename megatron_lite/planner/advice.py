"""Warnings of a plan: what makes a run slow, expensive or fragile, each with the flag to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_lite.config.run import RunConfig
from megatron_lite.formatting import format_count, format_size, format_time
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.job import JobPlan

BUBBLE, IDLE, IMBALANCE = 0.15, 0.05, 0.1
"""Shares of the time from which they are worth a warning."""
TILE = 64
"""Elements: products whose sizes are multiples of it use the matrix units best (NVIDIA's guide)."""
MANY_CHECKPOINTS = 100
USEFUL = 0.2
"""Goodput from which another save interval is worth naming."""
SAVING, STARTS = 0.05, 0.2
"""Share of the time between two saves in which a save may block training; and of the total in which jobs start."""


@dataclass(frozen=True)
class Advice:
    """A warning: what is wrong, with values, and what to change."""

    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}"


@dataclass(frozen=True)
class Situation:
    """What the warnings are about."""

    config: RunConfig
    machine: Hardware
    job: JobPlan


def device_advice(config: RunConfig, machine: Hardware, *, is_calibrated: bool) -> list[Advice]:
    """Return what a reader must know of the device that is planned: not that of the command, or without a data sheet.

    Args:
        config: the run, whose --device is compared.
        machine: that is planned.
        is_calibrated: the machine is fitted to a measured run.
    """
    wanted, name = config.runtime.device, machine.device.name
    planned = "xla" if name.startswith("tpu-") else "cpu" if name == "cpu" else "cuda"
    found = []
    if wanted not in ("auto", planned) and not (is_calibrated and name == "cpu"):
        found.append(
            Advice(
                f"The command trains on --device {wanted}, and the plan is for {name}",
                f"Remove --device {wanted}, or give --calibrate with the metrics.jsonl of a short run on that device, "
                "without --gpu",
            )
        )
    if planned == "cpu" and not is_calibrated:
        found.append(
            Advice(
                "The speeds of a CPU are placeholders, and times are not predicted",
                "Give --calibrate with the metrics.jsonl of a short run, or --gpu NAME to plan a GPU",
            )
        )
    return found


def advise(config: RunConfig, machine: Hardware, job: JobPlan) -> list[Advice]:
    """Return the warnings of a plan, the expensive ones first."""
    situation = Situation(config, machine, job)
    return [advice for rule in RULES for advice in rule(situation)]


def _precision(of: Situation) -> Iterator[Advice]:
    device, dtype = of.machine.device, of.config.precision.dtype
    if dtype == "bf16" and not device.bf16:
        yield Advice(
            f"{device.name} has no bf16 matrix units: products run in fp32, at {device.fp32_tflops:g} instead of "
            f"{device.tflops:g} TFLOP/s (--bf16)",
            "Use --fp16",
        )
    if of.config.fp8.format != "off" and not device.fp8_tflops:
        yield Advice(
            f"{device.name} has no fp8 matrix units (--fp8-format {of.config.fp8.format})", "Remove --fp8-format"
        )
    if dtype == "fp32" and device.tflops > 2 * device.fp32_tflops and not of.config.runtime.tf32:
        yield Advice(
            f"Products run in fp32, at {device.fp32_tflops:g} instead of {device.tflops:g} TFLOP/s of {device.name}",
            f"Use {'--bf16' if device.bf16 else '--fp16'}{', or --allow-tf32' if device.tf32_tflops else ''}",
        )


def _tensor_parallel_nodes(of: Situation) -> Iterator[Advice]:
    parallel, per_node = of.config.parallel, of.machine.per_node
    size = parallel.tp * of.config.parallel.cp
    if parallel.tp > per_node or per_node % parallel.tp:
        share = of.job.final.tensor_parallel / of.job.final.total
        yield Advice(
            f"The {parallel.tp} tensor-parallel ranks do not fit into nodes of {per_node} devices "
            f"(--tensor-model-parallel-size {parallel.tp}, --gpus-per-node {per_node}): their collectives cross the "
            f"network in every layer, and take {share:.0%} of a step",
            f"Use --tensor-model-parallel-size {_divisor_below(per_node, parallel.tp)} or less, and more stages",
        )
    elif size > per_node and of.config.parallel.cp > 1:
        yield Advice(
            f"Context parallelism crosses nodes: {parallel.tp} x {of.config.parallel.cp} ranks share a "
            f"sequence, and a node has {per_node}",
            "Use a smaller --context-parallel-size, unless the sequences need it",
        )


def _few_microbatches(of: Situation) -> Iterator[Advice]:
    parallel, step = of.config.parallel, of.job.final
    share = (step.bubble + step.pipeline) / step.total
    if parallel.pp > 1 and share > BUBBLE:
        less = "fewer" if step.microbatches < parallel.pp else "few"
        yield Advice(
            f"The pipeline is idle or waits for messages in {share:.0%} of a step: {step.microbatches:,} micro-batches "
            f"a replica are {less} for {parallel.pp} stages ({parallel.pipeline_schedule})",
            "Use a larger --global-batch-size, a smaller --micro-batch-size or --pipeline-model-parallel-size, fewer "
            "replicas, or --pipeline-schedule zb-h1",
        )


def _imbalance(of: Situation) -> Iterator[Advice]:
    config = of.config
    if config.parallel.pp > 1 and config.parallel.partition_method == "uniform":
        yield Advice(
            "The last stage computes the loss beside as many layers as the others (--pp-partition-method uniform)",
            "Remove --pp-partition-method: balanced stages have equal work",
        )


def _idle_replicas(of: Situation) -> Iterator[Advice]:
    job = of.job
    training = job.seconds["training"]
    lost = sum(stage.idle * stage.seconds for stage in job.stages) / training if training else 0.0
    if lost > IDLE:
        yield Advice(
            f"Replicas have no micro-batch, or fewer than others, in {lost:.0%} of the device time: the smallest batch "
            f"is {job.stages[0].global_batch:,} samples for {of.config.parallel.dp:,} replicas",
            "Start the ramp-up on fewer nodes, use a --micro-batch-size and batches that the replicas divide, or a "
            "shorter --rampup-batch-size"
            if of.config.batch.rampup
            else "Use a smaller --micro-batch-size, a --global-batch-size that the replicas divide, or fewer nodes",
        )


def _shapes(of: Situation) -> Iterator[Advice]:
    model, tp = of.config.model, of.config.parallel.tp
    if of.machine.device.processors == 1 or of.config.precision.dtype == "fp32":
        return
    sizes = {
        f"--hidden-size {model.hidden_size}": model.hidden_size,
        f"--ffn-hidden-size {model.ffn_hidden_size} / {tp}": model.ffn_hidden_size // tp,
    }
    odd = [text for text, size in sizes.items() if size % TILE]
    if odd:
        yield Advice(
            f"{' and '.join(odd)} on a rank {'are' if len(odd) > 1 else 'is'} no multiple of {TILE}: matrix products "
            "fill their tiles badly",
            f"Use multiples of {TILE} x --tensor-model-parallel-size",
        )
    if model.head_dim % 8:
        yield Advice(
            f"Attention heads have {model.head_dim} channels, and fused kernels take multiples of 8",
            "Use --num-attention-heads so that hidden size / heads is 64 or 128",
        )


def _vocabulary(of: Situation) -> Iterator[Advice]:
    model, tp = of.config.model, of.config.parallel.tp
    padded, size = model.padded_vocab_size, model.vocab_size
    if of.config.precision.dtype != "fp32" and padded % (tp * TILE):
        better = -(-padded // (tp * 128)) * tp * 128
        yield Advice(
            f"The vocabulary of {padded:,} rows gives a rank {padded / tp:,.0f}, no multiple of {TILE}: the largest "
            "product of the model is slow",
            f"Use --pad-vocab-size-to {better}, or leave the padding to --make-vocab-size-divisible-by 128",
        )
    if size and padded > 1.1 * size:
        yield Advice(
            f"The vocabulary of {size:,} is padded to {padded:,}: {1 - size / padded:.0%} of the output layer's work "
            "is for nothing",
            f"Use --pad-vocab-size-to {-(-size // (tp * TILE)) * tp * TILE}",
        )


def _finishes(of: Situation) -> Iterator[Advice]:
    job, step = of.job, of.job.final.total
    useful = job.seconds["training"] + job.seconds["evaluation"]
    if job.repeats_first_job:
        yield Advice(
            f"The run cannot finish: a job ends after {format_time(job.job_seconds)} of the "
            f"{format_time(useful)}, nothing is saved, and each job starts at iteration 0",
            f"Add --save FOLDER --load FOLDER --save-interval {max(1, int(job.job_seconds / step / 4))}, or use longer "
            "jobs (--job-hours)",
        )
    if not job.goodput.can_finish:
        every, best = format_time(job.goodput.failure_seconds), job.goodput
        apart = (
            f"saves are {format_time(job.between_saves)} of training apart"
            if job.between_saves < useful
            else "nothing is saved before the end"
        )
        yield Advice(
            f"The run cannot finish: with {format_count(job.nodes, 'node')} it fails every {every}, and {apart}",
            f"Use --save-interval {max(1, round(best.best_seconds / step))}"
            if best.best_share > USEFUL
            else "Use fewer nodes, or nodes that fail less often (--node-mttf-hours)",
        )


def _job_starts(of: Situation) -> Iterator[Advice]:
    job = of.job
    share = job.seconds["job starts"] / job.total_seconds
    if job.jobs > 1 and share > STARTS:
        yield Advice(
            f"Jobs of {format_time(job.job_seconds)} start {job.jobs:,} times, which takes {share:.0%} of the time",
            "Use longer jobs (--job-hours, or --exit-duration-in-mins), or a smaller --restart-minutes if they start "
            "faster",
        )


def _saving(of: Situation) -> Iterator[Advice]:
    config, job = of.config, of.job
    if job.repeats_first_job:
        return
    if not config.checkpoint.save:
        yield Advice("The run writes no checkpoint: a failure loses everything", "Add --save FOLDER --save-interval N")
        return
    step, limit = job.final.total, job.job_seconds
    if limit and job.between_saves > limit and not config.checkpoint.save_on_exit:
        yield Advice(
            f"A job ends before its first save: {format_time(job.between_saves)} of training lie between two "
            f"saves, and a job has {format_time(limit)} (--no-save-on-exit)",
            f"Use --save-interval {max(1, int(limit / step / 2))} or less, or remove --no-save-on-exit",
        )
    best = job.goodput.best_seconds
    if job.goodput.can_finish and (job.between_saves > 3 * best or job.between_saves < best / 3):
        gain = job.goodput.best_share - job.goodput.share
        if gain > 0.005:
            yield Advice(
                f"Saves are {format_time(job.between_saves)} of training apart; with a failure every "
                f"{format_time(job.goodput.failure_seconds)}, {format_time(best)} would be best, and give "
                f"{gain:.1%} more goodput",
                f"Use --save-interval {min(job.iterations, max(1, round(best / step)))}",
            )
    share = job.blocking_seconds / job.between_saves
    if share > SAVING and not config.checkpoint.asynchronous:
        yield Advice(
            f"A save of {format_size(job.storage.checkpoint)} blocks training for {format_time(job.save_seconds)}, "
            f"{f'{share:,.0f} times' if share >= 2 else f'{share:.0%} of'} the time between two saves",
            "Add --async-save, or use a larger --save-interval",
        )
    if job.save_seconds > job.between_saves:
        yield Advice(
            f"Writing a checkpoint takes {format_time(job.save_seconds)}, longer than the "
            f"{format_time(job.between_saves)} between two saves",
            "Use a larger --save-interval, a faster file system (--write-gbytes), or --no-save-optim",
        )
    if not config.checkpoint.keep_last and job.storage.saves > MANY_CHECKPOINTS:
        yield Advice(
            f"All {job.storage.saves:,} checkpoints are kept: {format_size(job.storage.total)}",
            "Add --keep-last N, and --keep-every N for those to keep",
        )


def _optimizer(of: Situation) -> Iterator[Advice]:
    parallel = of.config.parallel
    if parallel.dp > 1 and not parallel.distributed_optimizer:
        yield Advice(
            f"Each of the {parallel.dp:,} replicas holds and updates the whole optimizer state",
            "Add --use-distributed-optimizer (ZeRO-1)",
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield Advice(
            f"Norms, dropout and their activations are repeated on the {parallel.tp} tensor-parallel ranks",
            "Add --sequence-parallel",
        )


def _engine(of: Situation) -> Iterator[Advice]:
    engine = of.config.runtime.engine
    if engine != "native":
        yield Advice(
            f"The run uses --engine {engine}, and its time is that of the native engine",
            "Calibrate with --calibrate and the metrics.jsonl of a short run of that engine",
        )


def _divisor_below(number: int, limit: int) -> int:
    return max(size for size in range(1, number + 1) if number % size == 0 and size <= limit)


RULES: tuple[Callable[[Situation], Iterator[Advice]], ...] = (
    _finishes,
    _precision,
    _tensor_parallel_nodes,
    _few_microbatches,
    _idle_replicas,
    _job_starts,
    _saving,
    _optimizer,
    _imbalance,
    _shapes,
    _vocabulary,
    _engine,
)
