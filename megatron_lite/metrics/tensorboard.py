"""TensorBoard sink with Megatron-LM's tags.

Each scalar is written by iteration, and as `<tag> vs samples` by consumed samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.metrics.rewind import VS_SAMPLES, cut_events
from megatron_lite.metrics.scalars import (
    is_logged,
    machine_scalars,
    settings_of,
    training_scalars,
    validation_scalars,
)
from megatron_lite.metrics.sink import Sink, missing_library
from megatron_lite.system_errors import reason, remedy


def open_writer(folder: str, queue_size: int) -> Any:
    """Return a torch SummaryWriter for `folder`.

    Raises:
        ConfigError: the package tensorboard is missing, or the folder is not writable.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_library(f"--tensorboard-dir {folder}", "tensorboard", error) from error
    try:
        return SummaryWriter(log_dir=folder, max_queue=queue_size)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to --tensorboard-dir {folder}: {reason(error)}",
            fix=remedy(error, folder, instead="give another --tensorboard-dir", writing=True),
        ) from error


class TensorboardSink(Sink):
    """Writes scalars to TensorBoard.

    Args:
        config: metrics options.
        writer: a SummaryWriter, or an object with its add_scalar, add_text, flush and close.
        world_size: value of the world-size tag until start().
    """

    def __init__(self, config: MetricsConfig, writer: Any, world_size: int = 1) -> None:
        self._config = config
        self._writer = writer
        self._world_size = world_size

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Remove the points after the checkpoint; write every setting as text, as Megatron does."""
        # A run that starts from the checkpoint of another run keeps the points of that run.
        if facts.start_iteration and config.checkpoint.in_one_folder:
            last, due = facts.start_iteration, facts.validation_due
            cut_events(Path(self._config.tensorboard_dir), last, validation_due=due)
        self._world_size = facts.world_size
        for name, value in settings_of(config):
            self._writer.add_text(name, str(value), global_step=facts.start_iteration)

    def iteration(self, report: IterationReport) -> None:
        """Write the iteration's scalars if --tensorboard-log-interval divides it."""
        if not is_logged(self._config, report):
            return
        for tag, value in training_scalars(self._config, report, self._world_size):
            self._writer.add_scalar(tag, value, report.iteration)
            self._writer.add_scalar(f"{tag}{VS_SAMPLES}", value, report.consumed_train_samples)
        for tag, value in machine_scalars(self._config, report):
            self._writer.add_scalar(tag, value, report.iteration)

    def validation(self, report: ValidationReport) -> None:
        """Write each loss, and its perplexity with --log-validation-ppl-to-tensorboard."""
        for tag, value in validation_scalars(self._config, report):
            self._writer.add_scalar(tag, value, report.iteration)
            self._writer.add_scalar(f"{tag}{VS_SAMPLES}", value, report.consumed_train_samples)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the writer."""
        self._writer.close()
