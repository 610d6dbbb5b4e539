"""Current-phase marker: records what a rank is doing (loading, forward, saving) for failure and stall messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

START_UP = "start-up"
_ATTRIBUTE = "_megatron_lite_phase"


class Phases:
    """Nested phases of this rank's main thread: `iteration 7, forward of micro-batch 2 on stage 0`.

    The main thread enters phases; the heartbeat thread reads the current ones. An exception is marked with the phases
    in which it was raised, because they have been left by the time it is reported.
    """

    def __init__(self) -> None:
        self._open: tuple[object, ...] = ()

    @contextmanager
    def enter(self, phase: object) -> Iterator[None]:
        """Enter a phase for as long as the context lasts.

        Args:
            phase: a text, or an object whose str() changes while it works (the executor's current action).
        """
        outer = self._open
        self._open = (*outer, phase)
        try:
            yield
        except BaseException as error:
            vars(error).setdefault(_ATTRIBUTE, str(self))
            raise
        finally:
            self._open = outer

    def __str__(self) -> str:
        return ", ".join(text for phase in self._open if (text := str(phase))) or START_UP


def phase_of(error: BaseException) -> str:
    """Return the phases in which an exception was raised."""
    phase: str = vars(error).get(_ATTRIBUTE, START_UP)
    return phase
