"""Read planner: reads the saved rectangles that overlap a rank's shards.

A record is read and checked as a whole, into one buffer that all records share, and its elements go from there to all
pieces that want some. Tiles (tiles.py) keep records small, and layouts' bounds from cutting through them. No collective
runs here: load.py brings the ranks together.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

from megatron_lite.checkpoint.verify import open_file, read_part
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.runs.manifest import Manifest, SavedPart, SavedPiece


@dataclass(frozen=True)
class Read:
    """A tensor to fill and the saved tensor to fill it from; their names differ where one stands in for another."""

    target: GlobalTensor
    source: str


@dataclass(frozen=True)
class _Record:
    """A saved piece, and the pieces of this rank that want a part of it."""

    saved: SavedPiece
    dtype: torch.dtype
    wanted: list[Piece]


class ReadPlan:
    """Which parts of which files fill a rank's pieces.

    Raises:
        CheckpointError: a saved tensor does not cover a piece.
    """

    def __init__(self, manifest: Manifest, reads: Sequence[Read]) -> None:
        self._manifest = manifest
        records: dict[tuple[str, int], _Record] = {}
        for read in reads:
            saved = manifest.tensors[read.source]
            dtype = getattr(torch, saved.dtype)
            for piece in read.target.pieces:
                wanted, found = piece.rectangle, 0
                for other in saved.pieces:
                    common = wanted.intersection(other.rectangle)
                    if common is not None:
                        found += common.numel
                        key = (other.file, other.part)
                        records.setdefault(key, _Record(other, dtype, [])).wanted.append(piece)
                if found != piece.tensor.numel():
                    raise CheckpointError(
                        "A checkpoint must hold every element of a tensor",
                        found=f"{read.source} has {found} of {piece.tensor.numel()} elements that this rank needs",
                        fix="Load another iteration; this one was put together wrongly",
                    )
        # In the order in which they lie on the disk.
        self._records = {key: records[key] for key in sorted(records)}

    @property
    def parts(self) -> set[tuple[str, int]]:
        """Names of files and numbers of their parts, all that will be read."""
        return set(self._records)

    @property
    def size(self) -> int:
        """Bytes that will be read."""
        return sum(self._part(record).length for record in self._records.values())

    def read(self, folder: Path) -> None:
        """Fills the pieces, converting to their dtype and device.

        Raises:
            CorruptCheckpointError: a part that is needed is damaged or missing; pieces may be filled in part.
        """
        buffer = torch.empty(max((self._part(r).length for r in self._records.values()), default=0), dtype=torch.uint8)
        view = buffer.numpy().data
        files: dict[str, list[_Record]] = {}
        for (name, _), record in self._records.items():
            files.setdefault(name, []).append(record)
        for name, records in files.items():
            with open_file(folder / name) as file:
                for record in records:
                    _hand_out(record, buffer, read_part(file, folder / name, self._part(record), view))

    def _part(self, record: _Record) -> SavedPart:
        return self._manifest.files[record.saved.file].parts[record.saved.part]


def _hand_out(record: _Record, buffer: Tensor, view: memoryview) -> None:
    saved = record.saved.rectangle
    start = _payload(view)
    tensor = buffer[start : start + saved.numel * record.dtype.itemsize].view(record.dtype).view(saved.shape)
    for piece in record.wanted:
        common = saved.intersection(piece.rectangle)
        assert common is not None
        target = narrow(piece.tensor.detach(), common.relative_to(piece.offset))
        target.copy_(narrow(tensor, common.relative_to(saved.offset)))


def _payload(record: memoryview) -> int:
    """Where the elements begin in a record of torch.save: a zip file that holds them, not compressed, as `data/0`.

    torch.load would copy them twice, and unpickle, of which a load should have no need.
    """
    with ZipFile(BytesView(record)) as archive:
        (member,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    # A member begins with its local header: 30 bytes, of which the last four are the lengths of name and padding.
    header = member.header_offset
    name, padding = (int.from_bytes(record[header + at : header + at + 2], "little") for at in (26, 28))
    return header + 30 + name + padding


class BytesView(io.RawIOBase):
    """Bytes in memory as a file, without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset and return it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        return self._at

    def tell(self) -> int:
        """Return the offset."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, and return how many bytes there were."""
        data = self._data[self._at : self._at + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
