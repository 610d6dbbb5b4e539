"""Reporter: distributes the training loop's reports to all metric sinks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.console import ConsoleSink, line_writer
from megatron_lite.metrics.jsonl import JsonlSink
from megatron_lite.metrics.progress_bar import ProgressSink, is_terminal
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.metrics.tensorboard import TensorboardSink, open_writer


class Sink(Protocol):
    """A place where events go."""

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """The run is assembled and its first iteration follows."""

    def iteration(self, report: IterationReport) -> None:
        """An iteration is finished."""

    def validation(self, report: ValidationReport) -> None:
        """A dataset was evaluated."""

    def message(self, text: str) -> None:
        """Something to tell people."""

    def stopping(self) -> None:
        """No iteration follows; the last save, evaluations and words do."""

    def close(self) -> None:
        """The run is over, or has failed."""


class Reporter:
    """Passes events to the sinks, in their order; without sinks (on the ranks that stay silent) it does nothing.

    A context manager: leaving it closes every sink, so that a failed run gives the terminal back.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """The run is assembled and its first iteration follows."""
        for sink in self._sinks:
            sink.start(config, facts)

    def iteration(self, report: IterationReport) -> None:
        """An iteration is finished."""
        for sink in self._sinks:
            sink.iteration(report)

    def validation(self, report: ValidationReport) -> None:
        """A dataset was evaluated."""
        for sink in self._sinks:
            sink.validation(report)

    def message(self, text: str) -> None:
        """Something to tell people: printed, and kept in metrics.jsonl."""
        for sink in self._sinks:
            sink.message(text)

    def stopping(self) -> None:
        """No iteration follows: what was held back for a fuller line is told before the last save."""
        for sink in self._sinks:
            sink.stopping()

    def close(self) -> None:
        """Close every sink, in their order, also when one of them fails; the failure is raised after that."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics_path(config: RunConfig) -> Path | None:
    """Where the run's metrics.jsonl lies, or None if neither --metrics-file nor --save says."""
    if config.metrics.metrics_file:
        return Path(config.metrics.metrics_file)
    return Path(config.checkpoint.save) / "metrics.jsonl" if config.checkpoint.save else None


def build_reporter(config: RunConfig, stream: TextIO, *, active: bool = True) -> Reporter:
    """The sinks that the configuration asks for, writing lines to `stream`.

    Args:
        config: its metrics and checkpoint parts are read.
        stream: where lines and the bar go, normally sys.stdout.
        active: whether this rank reports; exactly one rank does (the last, which has the loss, as in Megatron).

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    if not active:
        return Reporter(())
    metrics = config.metrics
    bar = ProgressSink(stream) if metrics.progress_bar and is_terminal(stream) else None
    write = bar.write if bar is not None else line_writer(stream)
    sinks: list[Sink] = []
    if (path := metrics_path(config)) is not None:
        sinks.append(JsonlSink(path, tell=write))
    if metrics.tensorboard_dir:
        writer = open_writer(metrics.tensorboard_dir, metrics.tensorboard_queue_size)
        sinks.append(TensorboardSink(metrics, writer))
    sinks.append(ConsoleSink(write, metrics.log_interval))
    if bar is not None:
        sinks.append(bar)
    return Reporter(sinks)
