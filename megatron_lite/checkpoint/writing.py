"""Checkpoint file writer: slices of named tensors in torch.distributed.checkpoint (DCP) format, with checksums.

The format is a sequence of torch.save records, one per rectangle, and `.metadata`, which states where each lies; any
torch reads such a folder without this package. Each record is a part of its file with a checksum of its own.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.serialization import config

from megatron_lite import __version__
from megatron_lite.backend.agreement import broadcast_from_rank0
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.shares import Share, dcp_metadata, merge_shares
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_size
from megatron_lite.parallel.tensors import GlobalTensor, narrow
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.atomic import replace_file, sync_folder, write_synced
from megatron_lite.runs.catalog import folder_name, set_best, set_latest
from megatron_lite.runs.manifest import (
    MANIFEST_NAME,
    Manifest,
    Provenance,
    SavedFile,
    SavedPart,
    SavedPiece,
    SavedTensor,
    encode_manifest,
)
from megatron_lite.runs.retention import KEEP_ALL, Retention, delete_expired
from megatron_lite.runs.turnover import make_visible, remove_stale
from megatron_lite.system_errors import reason, remedy

_DCP_METADATA = ".metadata"
_BUFFER = 1 << 20
_HEADERS = 1 << 12
"""Upper bound of a record's bytes beyond its elements."""
_MAKE_ROOM = (
    "Free space there, keep fewer checkpoints (--keep-last N deletes all but the N newest), or give another --save. "
    "Earlier checkpoints are untouched"
)


def no_check() -> None:
    """Check nothing before the folder is changed."""


@dataclass(frozen=True)
class SaveRequest:
    """Destination of a checkpoint, and its content besides tensors.

    Attributes:
        root: folder of --save.
        iteration: last completed iteration.
        scalars: JSON values (progress, loss scaler, step counts); rank 0's are saved.
        provenance: config and fingerprints of the run; rank 0's are saved.
        retention: which earlier checkpoints are kept.
        best: record it as the one with the lowest validation loss.
        check: called on rank 0 before the folder is changed; raises CheckpointError to prevent the change.
    """

    root: Path
    iteration: int
    scalars: Mapping[str, Any]
    provenance: Provenance
    retention: Retention = KEEP_ALL
    check: Callable[[], None] = no_check
    best: bool = False

    @property
    def path(self) -> Path:
        """Folder of the finished checkpoint."""
        return self.root / folder_name(self.iteration)


@dataclass(frozen=True)
class SaveReport:
    """Result of a save, for the log.

    Attributes:
        path: the checkpoint's folder.
        size: bytes on disk, over all ranks.
        seconds: from the call until the checkpoint is the latest.
        blocking_seconds: part of that time in which training was blocked.
        removed: names of deleted folders and files: expired checkpoints and leftovers of killed saves.
        problem: why an expired checkpoint could not be deleted; empty: all were.
    """

    path: Path
    size: int
    seconds: float
    blocking_seconds: float
    removed: tuple[str, ...]
    problem: str = ""


class CheckpointWriter:
    """Writer of one checkpoint, opened by every rank of a group.

    Each rank adds rectangles and closes its files; then rank 0 calls finish, which merges the ranks' records into the
    manifest and renames the folder. Until then all files lie in `iter_….partial-…`. A context manager: leaving it
    discards what is not finished.

        with CheckpointWriter(request, world, size) as writer:
            writer.add(name, global_shape, rectangle, tensor)
            writer.close()
            report = writer.finish()  # on rank 0, once all ranks have closed

    Opening is a collective call; the other methods use no collectives, so a thread may call them.

    Args:
        request: destination and content besides tensors.
        world: all ranks.
        size: bytes that this rank will add.
        file_size: maximum bytes of a file, unless a single record is larger; None: one file per rank.

    Attributes:
        folder: partial folder.

    Raises:
        CheckpointError: there is no room for all ranks' bytes, or no permission. So do add, close and finish.
    """

    def __init__(self, request: SaveRequest, world: Group, size: int, file_size: int | None = None) -> None:
        self._begun = time.monotonic()
        self._request = request
        self._world = world
        self._size = size
        self._file_size = file_size
        self._file: _ChecksummedFile | None = None
        self._files: dict[str, SavedFile] = {}
        self._tensors: dict[str, SavedTensor] = {}
        self._held: dict[str, None] = {}
        needed = sum(world.all_gather_object(size))
        self.folder, self._stale = broadcast_from_rank0(world, lambda: self._make_folder(needed))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.discard()

    def add(self, name: str, global_shape: Sequence[int], rectangle: Rectangle, tensor: Tensor) -> None:
        """Write one record.

        Args:
            name: of the global tensor.
            global_shape: shape of the global tensor.
            rectangle: the part of the global tensor that is written.
            tensor: values of the rectangle, on any device.
        """
        assert tuple(tensor.shape) == rectangle.shape, (tensor.shape, rectangle)
        with self._explaining(self._size):
            file = self._open(tensor.nbytes)
            file.save(_own_storage(tensor.detach().cpu()))
        piece = SavedPiece(rectangle, file.path.name, len(file.parts) - 1)
        known = self._tensors.get(name)
        pieces = (*known.pieces, piece) if known else (piece,)
        self._tensors[name] = SavedTensor(tuple(global_shape), str(tensor.dtype).removeprefix("torch."), pieces)
        self._held[name] = None

    def add_tensors(self, tensors: Sequence[GlobalTensor]) -> None:
        """Write the pieces that this rank saves, cut into tiles (tiles.py)."""
        for tensor in tensors:
            self._held[tensor.name] = None
            for piece in tensor.pieces if tensor.write else ():
                data = piece.tensor.detach()
                for tile in tiles(tensor.global_shape, data.element_size(), piece.rectangle):
                    self.add(tensor.name, tensor.global_shape, tile, narrow(data, tile.relative_to(piece.offset)))

    def close(self) -> None:
        """Make this rank's files durable, and leave a record of them for rank 0."""
        with self._explaining(self._size):
            self._close_file()
            self._leave(Share(self._tensors, self._files, tuple(self._held)))

    def report_failure(self, error: Exception) -> None:
        """Leave a record of this rank's failure for rank 0.

        Raises:
            OSError: there is no room even for that.
        """
        self._leave(Share(error=str(error)))

    def share(self, rank: int) -> Share | None:
        """Return the record that a rank has left; None: it has left none so far."""
        try:
            return Share.decode(self._share_path(rank).read_bytes())
        except FileNotFoundError:
            return None

    def finish(self) -> SaveReport:
        """Write the manifest, rename the folder, make it the latest, delete expired checkpoints; on rank 0.

        All ranks must have closed. Also raises CheckpointError where an element was written by no rank or twice.
        """
        request = self._request
        with self._explaining(0):
            shares = [Share.decode(self._share_path(rank).read_bytes()) for rank in range(self._world.size)]
            manifest = self._write_manifest(shares)
            for rank in range(self._world.size):
                self._share_path(rank).unlink()
            sync_folder(self.folder)
            request.check()
            make_visible(self.folder, request.path)
            try:
                # First: a kill in between leaves a checkpoint that the next start makes the latest.
                if request.best:
                    set_best(request.root, request.iteration)
                set_latest(request.root, request.iteration)
            except OSError:
                # A checkpoint that is not announced does not count: discard removes it.
                request.path.rename(self.folder)
                raise
        removed, problem = list[str](), ""
        try:
            removed = delete_expired(request.root, request.iteration, request.retention)
        except OSError as error:
            problem = f"cannot delete what --keep-last expires: {error.filename or ''} {error.strerror or error}"
        seconds = time.monotonic() - self._begun
        return SaveReport(request.path, manifest.size, seconds, seconds, (*self._stale, *removed), problem)

    def discard(self) -> None:
        """Close this rank's file and, on rank 0, remove the partial folder; after finish there is none."""
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses what is still in the buffer
                self._file.close()
            self._file = None
        if self._world.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _make_folder(self, needed: int) -> tuple[Path, list[str]]:
        """Make the partial folder; return it with the names of removed leftovers of killed saves."""
        request = self._request
        request.check()
        with self._explaining(needed):
            request.root.mkdir(parents=True, exist_ok=True)
            stale = remove_stale(request.root)
            free = shutil.disk_usage(request.root).free
            if free < needed:
                raise CheckpointError(
                    f"The disk has no room for the checkpoint of iteration {request.iteration}: it needs "
                    f"{format_size(needed)}, and "
                    f'{format_size(free)} are free in "{request.root}"',
                    fix=_MAKE_ROOM,
                )
            folder = request.path.with_name(f"{request.path.name}.partial-{secrets.token_hex(4)}")
            folder.mkdir()
        return folder, stale

    def _open(self, length: int) -> _ChecksummedFile:
        """Return the file for a record with so many bytes of elements."""
        limit = self._file_size
        if self._file is not None and limit is not None and self._file.size + length + _HEADERS > limit:
            self._close_file()
        if self._file is None:
            # DCP's own names: rank, and number of the rank's file.
            self._file = _ChecksummedFile(self.folder / f"__{self._world.rank}_{len(self._files)}.distcp")
        return self._file

    def _close_file(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._files[file.path.name] = SavedFile(tuple(file.parts))
        self._file = None

    def _leave(self, share: Share) -> None:
        replace_file(self._share_path(self._world.rank), share.encode())

    def _share_path(self, rank: int) -> Path:
        return self.folder / f"share-{rank:05d}.json"

    def _write_manifest(self, shares: Sequence[Share]) -> Manifest:
        request, tensors = self._request, merge_shares(shares)
        files = {name: file for share in shares for name, file in share.files.items()}
        metadata = pickle.dumps(dcp_metadata(tensors, files))
        write_synced(self.folder / _DCP_METADATA, metadata)
        files[_DCP_METADATA] = SavedFile((SavedPart(0, len(metadata), zlib.crc32(metadata)),))
        writer = {
            "megatron_lite": __version__,
            "torch": torch.__version__,
            "world_size": self._world.size,
            "time": round(time.time(), 3),
        }
        manifest = Manifest(request.iteration, tensors, files, request.scalars, request.provenance, writer)
        write_synced(self.folder / MANIFEST_NAME, encode_manifest(manifest))
        return manifest

    @contextmanager
    def _explaining(self, needed: int) -> Iterator[None]:
        """Raise an OSError as a CheckpointError that states the free room and, unless 0, the needed bytes."""
        try:
            yield
        except OSError as error:
            raise self._failure(error, needed) from error

    def _failure(self, error: OSError, needed: int) -> CheckpointError:
        request = self._request
        problem = f"Cannot write the checkpoint of iteration {request.iteration} in {request.root}: {reason(error)}"
        if error.filename:
            problem += f" ({error.filename})"
        if isinstance(error, FileNotFoundError) and ".partial-" in str(error.filename):
            return CheckpointError(
                f"{problem}: another process deleted the unfinished checkpoint, or this host does not see it",
                rule="Only one job at a time may save in a folder, which all hosts share",
                fix="End other jobs with the same --save, and make sure that --save is the same shared folder on "
                "every host",
            )
        try:
            free = shutil.disk_usage(request.root).free
        except OSError:
            return CheckpointError(f"{problem}; the folder itself cannot be read", fix=self._remedy(error))
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem += f"{', although' if is_full and free > needed else ';'} {format_size(free)} are free on its disk"
        if needed:
            problem += f" and this rank needs {format_size(needed)}"
        if is_full and free > needed:
            problem += ": the quota or the number of files is used up"
            see = f"quota -s; lfs quota {request.root}; df -i {request.root}"
            return CheckpointError(problem, fix=f"See {see}. {_MAKE_ROOM}")
        return CheckpointError(problem, fix=_MAKE_ROOM if is_full else self._remedy(error))

    def _remedy(self, error: OSError) -> str:
        fix = remedy(error, self._request.root, instead="give another --save", writing=True)
        return f"{fix}. Earlier checkpoints are untouched"


class _ChecksummedFile(io.BufferedWriter):
    """File that computes length and CRC-32 of each record while it is written, so that nothing is read back."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "wb"), _BUFFER)
        self.path = path
        self.parts: list[SavedPart] = []
        self.size = 0
        self._crc32 = 0

    def save(self, tensor: Tensor) -> None:
        """Append a tensor's record.

        Raises:
            OSError: no room.
        """
        start, self._crc32 = self.size, 0
        try:
            # Our own checksum covers the record, so torch need not compute its slower one as well.
            with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                torch.save(tensor, self)
        except RuntimeError as error:
            # Where a write fails or Ctrl-C comes, torch.save complains about its unfinished file instead.
            if error.__context__ is None:
                raise
            raise error.__context__ from None
        self.parts.append(SavedPart(start, self.size - start, self._crc32))

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        super().write(view)
        self.size += len(view)
        self._crc32 = zlib.crc32(view, self._crc32)
        return len(view)


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor in a storage of its own size, all of which torch.save writes; a copy if it has gaps."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).reshape(tensor.shape)
