"""Stop flag of `generate`: Ctrl-C or a failed output on rank 0 ends the texts of all ranks at the same token."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from megatron_lite.backend.group import Group

TWICE = 0.2
"""Seconds within which a second Ctrl-C is the same one."""


class StopFlag:
    """Request to end all texts, which every rank reads before each forward pass.

    Args:
        world: all ranks.
        device: of the model.
    """

    def __init__(self, world: Group, device: torch.device) -> None:
        self._world = world
        self._device = device
        self._reading = False
        self._received = -math.inf
        self._failure: Exception | None = None
        self.requested = False

    def __call__(self) -> bool:
        """Return whether rank 0 requests the end; a collective call."""
        if self._world.size == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)], device=self._device)
        self._world.all_reduce_(flag, "max")
        return bool(flag)

    @contextmanager
    def on_ctrl_c(self) -> Iterator[None]:
        """Set the flag at Ctrl-C instead of raising KeyboardInterrupt; ranks other than 0 ignore Ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN if self._world.rank else self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at Ctrl-C while the user types; at the end the flag is reset."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = self.requested = False

    def guard(self, output: Callable[[], None]) -> None:
        """Run an output step on rank 0; its error requests the end, and is raised by `end`."""
        if self._world.rank or self._failure is not None:
            return
        try:
            output()
        except Exception as error:
            self._failure, self.requested = error, True

    def end(self) -> None:
        """Raise the error of the output, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A rank started by another process of this program receives each Ctrl-C twice (backend/task_ranks.py).
        before, self._received = self._received, time.monotonic()
        if self._received - before < TWICE:
            return
        self.requested = True
        if self._reading:
            self._reading = False
            raise KeyboardInterrupt
