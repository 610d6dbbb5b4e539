"""Scalars of iterations and evaluations with Megatron-LM's tags, for TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.console import perplexity
from megatron_lite.metrics.report import IterationReport, ValidationReport

MEMORY_TAGS = {
    "reserved": "mem-reserved-bytes",
    "allocated": "mem-allocated-bytes",
    "max_allocated": "mem-max-allocated-bytes",
    "max_reserved": "mem-max-reserved-bytes",
}


def is_logged(config: MetricsConfig, report: IterationReport) -> bool:
    """Return whether --tensorboard-log-interval divides the iteration."""
    return report.iteration % max(1, config.tensorboard_log_interval) == 0


def training_scalars(config: MetricsConfig, report: IterationReport, world_size: int) -> Iterator[tuple[str, float]]:
    """Yield what depends on the training: losses, learning rate, batch size, norms."""
    if config.log_learning_rate:
        yield "learning-rate", report.learning_rate
    yield "batch-size", report.global_batch_size
    yield from report.losses.items()
    if config.log_loss_scale:
        yield "loss-scale", report.loss_scale
    if config.log_world_size:
        yield "world-size", world_size
    for tag, value in (
        ("grad-norm", report.grad_norm),
        ("num-zeros", report.num_zeros),
        ("params-norm", report.params_norm),
    ):
        if value is not None:
            yield tag, value


def machine_scalars(config: MetricsConfig, report: IterationReport) -> Iterator[tuple[str, float]]:
    """Yield what depends on the machine: speed, times, memory."""
    yield "tokens-per-second", report.tokens_per_second
    if report.mfu is not None:
        yield "mfu", report.mfu
    if report.skipped_train_samples:
        yield "skipped-train-samples", report.skipped_train_samples
    if config.log_timers:
        yield "iteration-time", report.seconds
        if report.tflops_per_device is not None:
            yield "throughput", report.tflops_per_device
        for name, seconds in report.timers.items():
            yield f"{name}-time", seconds
    if config.log_memory:
        for name, count in report.memory.items():
            if name in MEMORY_TAGS:
                yield MEMORY_TAGS[name], count


def validation_scalars(config: MetricsConfig, report: ValidationReport) -> Iterator[tuple[str, float]]:
    """Yield each loss, and its perplexity with --log-validation-ppl-to-tensorboard."""
    suffix = f"-{report.name}" if report.name else ""
    for name, loss in report.losses.items():
        yield f"{name} {report.split}{suffix}", loss
        if config.log_validation_ppl:
            yield f"{name} {report.split}{suffix} ppl", perplexity(loss) if math.isfinite(loss) else loss


def settings_of(config: RunConfig) -> Iterator[tuple[str, object]]:
    """Yield every configuration field as (section.field, value)."""
    for part in dataclasses.fields(config):
        values = getattr(config, part.name)
        for entry in dataclasses.fields(values):
            yield f"{part.name}.{entry.name}", getattr(values, entry.name)
