"""Checkpoint storage reader: returns any slice of a named tensor, with verified checksums.

A record is read and checked as a whole, into a buffer that all records of a file share, and its elements go from there
to all pieces that contain some. Tiles (tiles.py) keep records small, and layouts' bounds from cutting through them. No
collective runs here: load.py coordinates the ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

from megatron_lite.checkpoint.sources import TensorDifference, TensorInfo, compare_sources
from megatron_lite.checkpoint.verify import checked_parts
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.manifest import Manifest, SavedPart, SavedPiece, read_manifest


class CheckpointReader:
    """Reader of one checkpoint, a TensorSource; opening it reads the manifest alone.

    Args:
        path: the checkpoint's folder.

    Attributes:
        path: as given.
        manifest: of the checkpoint.
        tensors: every saved tensor, the optimizer's included.

    Raises:
        CheckpointError: there is no manifest, or one of another format.
        CorruptCheckpointError: the manifest is damaged. So do the methods where a file is damaged or missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(saved.shape, saved.dtype) for name, saved in self.manifest.tensors.items()
        }

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a tensor, on the CPU, in its saved dtype."""
        info = self.tensors[name]
        tensor = torch.empty(rectangle.shape, dtype=getattr(torch, info.dtype))
        target = GlobalTensor(name, info.shape, tensor.dtype, [Piece(rectangle.offset, tensor)])
        self.plan([(target, name)]).read()
        return tensor

    def plan(self, reads: Sequence[tuple[GlobalTensor, str]]) -> ReadPlan:
        """Return the plan to fill tensors in place, each from the saved tensor of the given name.

        Raises:
            CheckpointError: a saved tensor does not cover a piece.
        """
        return ReadPlan(self.path, self.manifest, reads)


def compare_checkpoints(first: Path, second: Path) -> Iterator[TensorDifference]:
    """Yield the differences of the tensors that two checkpoints have in common by name and shape, by name."""
    return compare_sources(CheckpointReader(first), CheckpointReader(second))


@dataclass(frozen=True)
class _Record:
    """A saved piece, and the pieces of this rank that share elements with it."""

    saved: SavedPiece
    dtype: torch.dtype
    wanted: list[Piece]


class ReadPlan:
    """Parts of files that fill a rank's pieces.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        reads: tensors to fill, each with the name of the saved tensor that fills it.

    Raises:
        CheckpointError: a saved tensor does not cover a piece.
    """

    def __init__(self, folder: Path, manifest: Manifest, reads: Sequence[tuple[GlobalTensor, str]]) -> None:
        self._folder = folder
        self._manifest = manifest
        records: dict[tuple[str, int], _Record] = {}
        for target, source in reads:
            saved = manifest.tensors[source]
            dtype = getattr(torch, saved.dtype)
            for piece in target.pieces:
                wanted, found = piece.rectangle, 0
                for other in saved.pieces:
                    common = wanted.intersection(other.rectangle)
                    if common is not None:
                        found += common.numel
                        key = (other.file, other.part)
                        records.setdefault(key, _Record(other, dtype, [])).wanted.append(piece)
                if found != wanted.numel:
                    raise CheckpointError(
                        f"The checkpoint {folder} is incomplete: it contains {found:,} of the {wanted.numel:,} "
                        "elements of the "
                        f"tensor {source} that this rank needs",
                        fix="Load another iteration with --load-iteration",
                    )
        # In the order in which they lie on the disk.
        self._records = {key: records[key] for key in sorted(records)}

    @property
    def parts(self) -> set[tuple[str, int]]:
        """Parts that will be read: names of files, and numbers of their parts."""
        return set(self._records)

    @property
    def size(self) -> int:
        """Bytes that will be read."""
        return sum(self._part(record).length for record in self._records.values())

    def read(self) -> None:
        """Fill the pieces, converting to their dtype and device.

        Raises:
            CorruptCheckpointError: a part is damaged or missing; pieces may be filled in part.
        """
        files: dict[str, list[_Record]] = {}
        for (name, _), record in self._records.items():
            files.setdefault(name, []).append(record)
        for name, records in files.items():
            contents = checked_parts(self._folder / name, [self._part(record) for record in records])
            for record, content in zip(records, contents, strict=True):
                _hand_out(record, content)

    def _part(self, record: _Record) -> SavedPart:
        return self._manifest.files[record.saved.file].parts[record.saved.part]


def _hand_out(record: _Record, content: memoryview) -> None:
    """Copy the elements of a record to the pieces that contain some."""
    saved = record.saved.rectangle
    start = _payload(content)
    tensor = torch.frombuffer(content, dtype=record.dtype, count=saved.numel, offset=start).view(saved.shape)
    for piece in record.wanted:
        common = saved.intersection(piece.rectangle)
        assert common is not None
        target = narrow(piece.tensor.detach(), common.relative_to(piece.offset))
        target.copy_(narrow(tensor, common.relative_to(saved.offset)))


def _payload(record: memoryview) -> int:
    """Return where the elements begin in a record of torch.save: a zip file with the member `data/0`.

    The member is not compressed. torch.load would copy the elements twice, and unpickle, which a load avoids.
    """
    with ZipFile(BytesView(record)) as archive:
        (member,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    # A member begins with its local header: 30 bytes, of which the last four are the lengths of name and padding.
    header = member.header_offset
    name, padding = (int.from_bytes(record[header + at : header + at + 2], "little") for at in (26, 28))
    return header + 30 + name + padding


class BytesView(io.RawIOBase):
    """File of bytes in memory, without a copy."""

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
