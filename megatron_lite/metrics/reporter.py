"""Reporter: distributes the training loop's reports to all metric sinks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.metrics.console import ConsoleSink, line_writer
from megatron_lite.metrics.csv_files import CsvSink
from megatron_lite.metrics.emissions import EmissionsSink, import_codecarbon
from megatron_lite.metrics.jsonl import JsonlSink
from megatron_lite.metrics.progress_bar import ProgressSink, is_terminal
from megatron_lite.metrics.report import IterationReport, RunFacts, SaveRecord, ValidationReport
from megatron_lite.metrics.sink import GuardedSink, Sink
from megatron_lite.metrics.tensorboard import TensorboardSink, open_writer
from megatron_lite.metrics.weights_and_biases import WandbSink, import_wandb
from megatron_lite.runs.metrics_file import metrics_path
from megatron_lite.system_errors import reason, remedy


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


def build_reporter(
    config: RunConfig, stream: TextIO, *, active: bool = True, emissions_rank: int | None = None
) -> Reporter:
    """Return a reporter with the configured sinks.

    Args:
        config: configuration of the run.
        stream: destination of log lines and the bar, normally sys.stdout.
        active: True on the reporting rank: the last one, which has the loss, as in Megatron.
        emissions_rank: this rank, if it measures the energy of its node (--codecarbon-dir); None: another one does.

    Raises:
        ConfigError: the package of TensorBoard, Weights & Biases or CodeCarbon is not installed, or the folder of the
            CSV files cannot be created.
    """
    metrics, save = config.metrics, config.checkpoint.save
    bar = ProgressSink(stream) if active and metrics.progress_bar and is_terminal(stream) else None
    write = bar.write if bar is not None else line_writer(stream)
    console = ConsoleSink(write, metrics.log_interval)
    path = metrics_path(config) if active else None
    record = JsonlSink(path, notify=write) if path is not None else None

    def guarded(sink: Sink, name: str) -> Sink:
        return GuardedSink(sink, name, warn)

    def warn(text: str) -> None:
        for sink in (record, console):
            if sink is not None:
                sink.message(f"WARNING: {text}")

    tools: list[Sink] = []
    if emissions_rank is not None and metrics.codecarbon_dir:
        tools.append(guarded(EmissionsSink(import_codecarbon(), metrics, emissions_rank), "CodeCarbon"))
    if not active:
        return Reporter(tools)
    if metrics.tensorboard_dir:
        writer = open_writer(metrics.tensorboard_dir, metrics.tensorboard_queue_size)
        tools.append(guarded(TensorboardSink(metrics, writer), "TensorBoard"))
    if metrics.wandb_project:
        tools.append(guarded(WandbSink(import_wandb(), metrics, save), "Weights & Biases"))
    if metrics.csv_dir:
        tools.append(guarded(CsvSink(_make_folder(Path(metrics.csv_dir), "--csv-dir")), "CSV"))
    own: list[Sink | None] = [record, *tools, console, bar]
    return Reporter([sink for sink in own if sink is not None])


def _make_folder(folder: Path, flag: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot create the folder {flag} {folder}: {reason(error)}",
            fix=remedy(error, folder, instead=f"give another folder with {flag}", writing=True),
        ) from error
    return folder
