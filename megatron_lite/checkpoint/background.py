"""Asynchronous checkpoint saving: copy to reused host buffers, then write from a thread.

The threads use no collectives, so that a save never mixes with training's communication: each rank leaves its write
record in the folder, and rank 0's thread finishes the save once all records are there.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from megatron_lite.backend.agreement import run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.save import deduplicate, size_to_write
from megatron_lite.checkpoint.writing import CheckpointWriter, SaveReport, SaveRequest
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_ranges
from megatron_lite.parallel.tensors import GlobalTensor, Piece

_POLL_SECONDS = 0.02
_CHUNK, _ALIGNMENT = 1 << 30, 64
"""Bytes of a chunk of host memory, and the multiple of bytes at which a tensor begins."""


class _MissingShareError(CheckpointError):
    """Another rank's write record is missing, or reports a failure."""


class BackgroundSaver:
    """Asynchronous saver: at most one save at a time.

    A context manager: leaving it waits for the save in progress. If an exception leaves it, the save is abandoned
    without collectives, and the next run's first save removes the partial folder.

    Args:
        world: all ranks.
        patience: seconds for which rank 0 waits for the other ranks' write records once its own is written.
    """

    def __init__(self, world: Group, *, patience: float = 1800.0) -> None:
        self._world = world
        self._patience = patience
        self._buffers: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._report: SaveReport | None = None
        self._writer: CheckpointWriter | None = None
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
    def in_progress(self) -> bool:
        """Whether a save has begun that wait() has not returned yet."""
        return self._thread is not None

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed on this rank; wait() then raises the error on every rank."""
        return self._error is not None

    def save(self, request: SaveRequest, tensors: Sequence[GlobalTensor]) -> float:
        """Copy the state and start writing it; a collective call. Arguments as in save_checkpoint.

        Waits for the previous save, if that is still in progress. Tensors and scalars may be changed once it returns.

        Returns:
            Seconds for which training was blocked.

        Raises:
            CheckpointError: the previous save failed, or this one cannot begin.
        """
        begun = time.monotonic()
        self.wait()
        request = replace(request, scalars=copy.deepcopy(dict(request.scalars)))
        tensors = deduplicate(tensors)
        self._writer = writer = CheckpointWriter(request, self._world, size_to_write(tensors))
        staged = self._stage(tensors)
        blocked = time.monotonic() - begun
        self._thread = threading.Thread(
            target=self._run, args=(writer, staged, begun, blocked), name="checkpoint", daemon=True
        )
        self._thread.start()
        return blocked

    def wait(self) -> SaveReport | None:
        """Wait for the save in progress; a collective call.

        Returns:
            The report of the save, on every rank; None: there was none since the last call.

        Raises:
            CheckpointError: the save failed on some rank.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        others_failed = self._join(thread)
        error, self._error = self._error, None
        report, self._report = self._report, None
        if others_failed and isinstance(error, _MissingShareError):
            error = None  # the error of the rank that failed says more

        def outcome() -> None:
            if error is not None:
                raise error

        try:
            run_on_all_ranks(self._world, outcome)
        except Exception:
            # All threads have ended: no rank writes there any more.
            assert self._writer is not None
            self._writer.discard()
            raise
        reports: list[SaveReport | None] = self._world.all_gather_object(report)
        return reports[0]

    def _join(self, thread: threading.Thread) -> bool:
        """Wait for all ranks' threads, and return whether a rank other than 0 has failed.

        Rank 0's thread waits for the others' records, and a full disk may have no room even for a record of failure:
        the collective here makes failures reach rank 0 in any case.
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

    def _stage(self, tensors: Sequence[GlobalTensor]) -> list[GlobalTensor]:
        """Copy all pieces to host memory, which the next save uses again; wait for the copies once."""
        pieces = [piece.tensor.detach() for tensor in tensors for piece in tensor.pieces]
        if [(x.shape, x.dtype) for x in pieces] != [(x.shape, x.dtype) for x in self._buffers]:
            self._buffers = host_buffers(pieces)
        for piece, buffer in zip(pieces, self._buffers, strict=True):
            buffer.copy_(piece, non_blocking=True)
        if any(piece.device.type != "cpu" for piece in pieces):
            torch.accelerator.synchronize()
        copies = iter(self._buffers)
        return [
            replace(tensor, pieces=[Piece(piece.offset, next(copies)) for piece in tensor.pieces]) for tensor in tensors
        ]

    def _run(self, writer: CheckpointWriter, staged: Sequence[GlobalTensor], begun: float, blocked: float) -> None:
        try:
            writer.add_tensors(staged)
            writer.close()
            if self._world.rank == 0:
                self._await_shares(writer)
                report = writer.finish()
                self._report = replace(report, seconds=time.monotonic() - begun, blocking_seconds=blocked)
        except Exception as error:
            self._error = error
            if self._world.rank == 0:
                writer.discard()
            else:
                # Without room for the record, rank 0 learns of the failure in wait(), or runs out of patience.
                with suppress(OSError):
                    writer.report_failure(error)

    def _await_shares(self, writer: CheckpointWriter) -> None:
        deadline = time.monotonic() + self._patience
        missing = set(range(self._world.size))
        while missing:
            for rank in sorted(missing):
                share = writer.share(rank)
                if share is not None and share.error:
                    raise _MissingShareError(
                        f"Rank {rank} could not write its part of the checkpoint {writer.folder}: "
                        f"{share.error.rstrip('.')}",
                        fix="Earlier checkpoints are untouched",
                    )
                if share is not None:
                    missing.discard(rank)
            if missing and (self._abandoned.is_set() or time.monotonic() > deadline):
                ranks = f"{'rank' if len(missing) == 1 else 'ranks'} {format_ranges(sorted(missing))}"
                raise _MissingShareError(
                    f"The parts of {ranks} of the checkpoint in {writer.folder} are missing after "
                    f"{self._patience:.0f} s",
                    fix="Make sure that --save is the same shared folder on every host, and look for an earlier error "
                    f"of {ranks} in the job's output",
                )
            if missing:
                time.sleep(_POLL_SECONDS)


def host_buffers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return an uninitialized tensor in host memory like each of `tensors`; pinned if these are on a GPU.

    Pinning takes milliseconds per allocation, and torch rounds the sizes up to powers of two, so that tensors share
    chunks of 1 GiB; larger tensors have a chunk of their own.
    """
    pinned = any(tensor.device.type in ("cuda", "xpu") for tensor in tensors)
    sizes, places = list[int](), list[tuple[int, int]]()
    for tensor in tensors:
        if not sizes or (tensor.nbytes and sizes[-1] + tensor.nbytes > _CHUNK):
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    return [
        chunks[chunk][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, (chunk, start) in zip(tensors, places, strict=True)
    ]
