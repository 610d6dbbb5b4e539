"""CodeCarbon sink: energy and emissions of one node, in a CSV file of CodeCarbon's format."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.report import RunFacts, SaveRecord
from megatron_lite.metrics.sink import Sink, missing_library

START_SECONDS = 30
"""Longest wait for the tracker's start, at the end of a short job."""


def import_codecarbon() -> Any:
    """Return the package codecarbon.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import codecarbon
    except ImportError as error:
        raise missing_library("--codecarbon-dir", "codecarbon", error) from error
    return codecarbon


class EmissionsSink(Sink):
    """Runs CodeCarbon's tracker, which measures the node in a thread of its own, without network.

    Args:
        codecarbon: the package, or an object with its OfflineEmissionsTracker.
        config: metrics options.
        rank: of this process, in the file's name as in BigScience's Megatron: emissions-000.csv.
    """

    def __init__(self, codecarbon: Any, config: MetricsConfig, rank: int) -> None:
        self._codecarbon = codecarbon
        self._config = config
        self._rank = rank
        self._tracker: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Begin to measure, in a thread: CodeCarbon examines the hardware for seconds."""
        self._thread = threading.Thread(target=self._begin, name="codecarbon", daemon=True)
        self._thread.start()

    def saved(self, record: SaveRecord) -> None:
        """Write the sums so far, which a kill would lose."""
        if self._thread is not None and not self._thread.is_alive():
            self._check(self._started().flush())

    def close(self) -> None:
        """Write the sums of the job."""
        if self._thread is not None:
            self._thread.join(START_SECONDS)
            self._thread = None
            self._check(self._started().stop())

    def _begin(self) -> None:
        try:
            folder = Path(self._config.codecarbon_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tracker = self._codecarbon.OfflineEmissionsTracker(
                output_dir=str(folder),
                output_file=f"emissions-{self._rank:03d}.csv",
                country_iso_code=self._config.codecarbon_country,
                logger_preamble=f"r{self._rank:03d}",
                log_level="error",
                # One row for each job, replaced at each flush.
                on_csv_write="update",
                # Jobs that share a node would end each other's trackers.
                allow_multiple_runs=True,
            )
            tracker.start()
            self._tracker = tracker
        except Exception as error:
            self._error = error

    def _started(self) -> Any:
        """Return the tracker.

        Raises:
            Exception: why it did not start.
        """
        if self._error is not None:
            raise self._error
        if self._tracker is None:
            raise TimeoutError(f"the tracker has not started within {START_SECONDS} s")
        return self._tracker

    @staticmethod
    def _check(emissions: float | None) -> None:
        # CodeCarbon catches its own errors, and returns None.
        if emissions is None:
            raise RuntimeError("the tracker does not measure; CodeCarbon has printed the reason")
