"""Warning deduplication: a log record or Python warning that several ranks raise is printed by the lowest one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_lite.backend.base import Backend

LOGGERS = ("megatron_lite", "py.warnings")


@contextmanager
def warnings_once(backend: Backend) -> Iterator[None]:
    """Print warnings inside the context once per job, with host and rank of the first rank that has each."""
    if backend.world_size == 1:
        yield
        return
    handler = _OncePerJob(backend)
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
    def __init__(self, backend: Backend) -> None:
        super().__init__(logging.WARNING)
        self._backend = backend

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in one write, unless another rank has printed the same text."""
        text = self.format(record).rstrip()
        if self._backend.is_first_to_print(text):
            sys.stderr.write(f"[{self._backend.launch.host} rank {self._backend.rank}] {text}\n")
            sys.stderr.flush()
