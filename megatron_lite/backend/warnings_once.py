"""Warnings of a job: log records and Python warnings of all ranks, each text printed by the first rank that has it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_lite.backend.base import Backend

LOGGERS = ("megatron_lite", "py.warnings")


@contextmanager
def warnings_once(backend: Backend) -> Iterator[None]:
    """Print what all ranks warn of once; what only some warn of is printed with host and rank of the first."""
    if backend.world_size == 1:
        yield
        return
    handler = _OncePerJob(f"[{backend.launch.host} rank {backend.rank}]", backend.is_first_to_print)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)


class _OncePerJob(logging.Handler):
    def __init__(self, name: str, is_first: Callable[[str], bool]) -> None:
        super().__init__(logging.WARNING)
        self._name = name
        self._is_first = is_first

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, in one write, unless another rank has printed the same text."""
        text = self.format(record).rstrip()
        if self._is_first(text):
            sys.stderr.write(f"{self._name} {text}\n")
            sys.stderr.flush()
