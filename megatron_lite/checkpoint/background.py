"""Asynchronous checkpoint saving: copy to reused host buffers, then write from a thread.

Only the foreground uses collectives. The threads meet through the folder itself: each rank leaves a note of its share
there, and rank 0's thread finishes the save when all are in. So a save never mixes with training's communication.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.backend.agreement import run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.pieces import Share
from megatron_lite.checkpoint.save import (
    SaveReport,
    SaveRequest,
    finish,
    no_check,
    open_partial,
    share_path,
    size_to_write,
    write_share,
)
from megatron_lite.checkpoint.sharing import share_out
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.manifest import Provenance
from megatron_lite.runs.retention import KEEP_ALL, Retention

_POLL_SECONDS = 0.02


class _MissingShareError(CheckpointError):
    """Rank 0 waited in vain for the share of another rank."""


class BackgroundSaver:
    """Saves one checkpoint at a time in the background.

    A context manager: leaving it waits for the save under way. If an error is what leaves it, the save is abandoned,
    without collectives, and what it wrote is removed by the next run's first save.

    Args:
        world: all ranks.
        patience: seconds that rank 0 waits for the other ranks' shares once its own is written.
    """

    def __init__(self, world: Group, *, patience: float = 1800.0) -> None:
        self._world = world
        self._patience = patience
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._report: SaveReport | None = None
        self._partial = Path()
        self._abandoned = threading.Event()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
            return
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save under way has failed; wait() then raises it, on every rank."""
        return self._error is not None

    def save(
        self,
        root: Path,
        iteration: int,
        tensors: Sequence[GlobalTensor],
        scalars: Mapping[str, Any],
        provenance: Provenance,
        *,
        retention: Retention = KEEP_ALL,
        check: Callable[[], None] = no_check,
    ) -> float:
        """Copies the state and starts writing it; a collective call. Arguments as of save.save_checkpoint.

        Waits for the save before, if that is still under way. The tensors may be changed as soon as it returns.

        Returns:
            Seconds that training stood still.

        Raises:
            CheckpointError: the save before failed, or this one cannot begin.
        """
        begun = time.monotonic()
        self.wait()
        # A copy: the trainer goes on counting while this is written.
        request = SaveRequest(root, iteration, copy.deepcopy(dict(scalars)), provenance, retention, check)
        tensors = share_out(tensors)
        partial, stale = open_partial(request, size_to_write(tensors), self._world)
        self._partial = partial
        staged = [self._stage(tensor) for tensor in tensors]
        blocked = time.monotonic() - begun
        self._thread = threading.Thread(
            target=self._run, args=(partial, request, staged, begun, blocked, stale), name="checkpoint", daemon=True
        )
        self._thread.start()
        return blocked

    def wait(self) -> SaveReport | None:
        """Waits for the save under way; a collective call.

        Returns:
            The report of the save, on every rank; None if there was none since the last call.

        Raises:
            CheckpointError: it failed on some rank.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        others_failed = self._join(thread)
        error, self._error = self._error, None
        report, self._report = self._report, None
        if others_failed and isinstance(error, _MissingShareError):
            error = None  # the words of the rank that failed say more

        def outcome() -> None:
            if error is not None:
                raise error

        try:
            run_on_all_ranks(self._world, outcome)
        except Exception:
            # By now no rank writes there any more.
            if self._world.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        told: SaveReport | None = self._world.all_gather_object(report)[0]
        return told

    def _join(self, thread: threading.Thread) -> bool:
        """Waits for all ranks' threads; returns whether another rank than 0 has failed.

        Rank 0's thread waits for the others' notes, and a full disk may have no room even for one that says so:
        therefore the others tell it here.
        """
        if self._world.rank != 0:
            thread.join()
        failed = self._world.all_gather_object(self._world.rank != 0 and self._error is not None)
        if self._world.rank == 0:
            if any(failed):
                self._abandoned.set()
            thread.join()
            self._abandoned.clear()
        return any(failed)

    def _stage(self, tensor: GlobalTensor) -> GlobalTensor:
        pieces = [
            Piece(piece.offset, self._copy((tensor.name, number), piece.tensor))
            for number, piece in enumerate(tensor.pieces)
        ]
        return replace(tensor, pieces=pieces)

    def _copy(self, key: tuple[str, int], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach())

    def _run(
        self,
        partial: Path,
        request: SaveRequest,
        staged: Sequence[GlobalTensor],
        begun: float,
        blocked: float,
        stale: Sequence[str],
    ) -> None:
        try:
            write_share(partial, request, staged, self._world)
            if self._world.rank == 0:
                self._await_shares(partial)
                report = finish(partial, request, self._world, begun, stale)
                self._report = replace(report, blocking_seconds=blocked)
        except Exception as error:
            self._error = error
            self._clean_up(partial, error)

    def _clean_up(self, partial: Path, error: Exception) -> None:
        try:
            if self._world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                replace_file(share_path(partial, self._world.rank), Share(error=str(error)).encode())
        except OSError:
            # Not even the note could be written: rank 0 learns of it in wait(), or runs out of patience.
            return

    def _await_shares(self, partial: Path) -> None:
        deadline = time.monotonic() + self._patience
        missing = set(range(self._world.size))
        while missing:
            for rank in sorted(missing):
                path = share_path(partial, rank)
                if path.exists():
                    share = Share.decode(path.read_bytes())
                    if share.error:
                        raise _MissingShareError(
                            "Every rank must write its share of a checkpoint",
                            found=f"rank {rank} could not: {share.error}",
                            fix="Earlier checkpoints are untouched",
                        )
                    missing.discard(rank)
            if missing and (self._abandoned.is_set() or time.monotonic() > deadline):
                raise _MissingShareError(
                    "Every rank must write its share of a checkpoint",
                    found=f"ranks {sorted(missing)} left no note in {partial} for {self._patience:.0f} s",
                    fix="See whether all hosts see the same --save folder and whether those ranks still run",
                )
            if missing:
                time.sleep(_POLL_SECONDS)
