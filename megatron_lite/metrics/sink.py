"""Base class of the metric sinks, and the guard by which a failing sink does not stop training."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, MegatronLiteError, install_extra
from megatron_lite.metrics.report import IterationReport, RunFacts, SaveRecord, ValidationReport
from megatron_lite.system_errors import reason


class Sink:
    """Destination of reports. A subclass overrides the methods of the events that it handles."""

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


def missing_library(flag: str, name: str, error: ImportError) -> ConfigError:
    """Return the error that a flag needs a library, which is installed by an extra of the same name."""
    return ConfigError(
        f"{flag} needs the library {name}, which cannot be imported ({error})",
        fix=f"{install_extra(name)}, or remove {flag.split()[0]}",
    )


class GuardedSink(Sink):
    """Passes events to a sink until it fails; then warns once, and passes nothing more.

    For tools beside the training, such as trackers in the network: without them the run loses nothing that it needs to
    resume, and metrics.jsonl holds the same numbers.

    Args:
        sink: the sink.
        name: of the tool, for the warning.
        warn: receives the warning.
    """

    def __init__(self, sink: Sink, name: str, warn: Callable[[str], None]) -> None:
        self._sink: Sink | None = sink
        self._name = name
        self._warn = warn

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Pass it on."""
        self._pass_on(lambda sink: sink.start(config, facts))

    def iteration(self, report: IterationReport) -> None:
        """Pass it on."""
        self._pass_on(lambda sink: sink.iteration(report))

    def validation(self, report: ValidationReport) -> None:
        """Pass it on."""
        self._pass_on(lambda sink: sink.validation(report))

    def saved(self, record: SaveRecord) -> None:
        """Pass it on."""
        self._pass_on(lambda sink: sink.saved(record))

    def message(self, text: str) -> None:
        """Pass it on."""
        self._pass_on(lambda sink: sink.message(text))

    def stopping(self) -> None:
        """Pass it on."""
        self._pass_on(lambda sink: sink.stopping())

    def close(self) -> None:
        """Close the sink, unless it has failed: a tool without connection may wait long for its last upload."""
        self._pass_on(lambda sink: sink.close())

    def _pass_on(self, event: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            event(self._sink)
        except Exception as error:
            self._sink = None
            self._warn(
                f"{self._name} failed and receives nothing more from this job, and training continues: {_text(error)}"
            )


def _text(error: Exception) -> str:
    """Return the first line of an error: of the operating system's with the file's name, of others with its class."""
    if isinstance(error, OSError) and error.strerror:
        return f"{reason(error)} ({error.filename})" if error.filename else reason(error)
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, MegatronLiteError) else f"{type(error).__name__}: {first}"
