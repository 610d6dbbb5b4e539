"""Reporter: distributes the training loop's reports to all metric sinks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, TextIO

from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.console import ConsoleSink, line_writer
from megatron_lite.metrics.jsonl import JsonlSink
from megatron_lite.metrics.progress_bar import ProgressSink, is_terminal
from megatron_lite.metrics.report import IterationReport, RunFacts, SaveRecord, ValidationReport
from megatron_lite.metrics.tensorboard import TensorboardSink, open_writer
from megatron_lite.runs.metrics_file import metrics_path


class Sink(Protocol):
    """Destination of reports."""

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Handle the start of training, before the first iteration."""

    def iteration(self, report: IterationReport) -> None:
        """Handle a finished iteration."""

    def validation(self, report: ValidationReport) -> None:
        """Handle the evaluation of a dataset."""

    def saved(self, record: SaveRecord) -> None:
        """Handle a complete save."""

    def message(self, text: str) -> None:
        """Handle a message to the user."""

    def stopping(self) -> None:
        """Handle the end of iterations, before the last save and the last evaluations."""

    def close(self) -> None:
        """Handle the end or failure of the run."""


class Reporter:
    """Passes events to the sinks in order; on ranks that do not report it has no sinks.

    A context manager that closes every sink, so that a failed run restores the terminal.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Handle the start of training, before the first iteration."""
        for sink in self._sinks:
            sink.start(config, facts)

    def iteration(self, report: IterationReport) -> None:
        """Handle a finished iteration."""
        for sink in self._sinks:
            sink.iteration(report)

    def validation(self, report: ValidationReport) -> None:
        """Handle the evaluation of a dataset."""
        for sink in self._sinks:
            sink.validation(report)

    def saved(self, record: SaveRecord) -> None:
        """Store a complete save in metrics.jsonl; its log line is a message."""
        for sink in self._sinks:
            sink.saved(record)

    def message(self, text: str) -> None:
        """Print a message and store it in metrics.jsonl."""
        for sink in self._sinks:
            sink.message(text)

    def stopping(self) -> None:
        """Print incomplete log intervals, before the last save."""
        for sink in self._sinks:
            sink.stopping()

    def close(self) -> None:
        """Close every sink in order, even if one fails; then raise the failure."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_reporter(config: RunConfig, stream: TextIO, *, active: bool = True) -> Reporter:
    """Return a reporter with the configured sinks.

    Args:
        config: configuration of the run.
        stream: destination of log lines and the bar, normally sys.stdout.
        active: True on the reporting rank: the last one, which has the loss, as in Megatron.

    Raises:
        ConfigError: --tensorboard-dir is given and tensorboard is not installed.
    """
    if not active:
        return Reporter(())
    metrics = config.metrics
    bar = ProgressSink(stream) if metrics.progress_bar and is_terminal(stream) else None
    write = bar.write if bar is not None else line_writer(stream)
    sinks: list[Sink] = []
    if (path := metrics_path(config)) is not None:
        sinks.append(JsonlSink(path, notify=write))
    if metrics.tensorboard_dir:
        writer = open_writer(metrics.tensorboard_dir, metrics.tensorboard_queue_size)
        sinks.append(TensorboardSink(metrics, writer))
    sinks.append(ConsoleSink(write, metrics.log_interval))
    if bar is not None:
        sinks.append(bar)
    return Reporter(sinks)
