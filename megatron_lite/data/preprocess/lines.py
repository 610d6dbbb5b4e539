"""Reading a unit: its lines from plain, gzip or zstandard files, or its rows from parquet."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from megatron_lite.data.preprocess.options import MAX_LINE
from megatron_lite.data.preprocess.sources import Unit
from megatron_lite.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Buffer

BUFFER = 1 << 20
TEXT_COLUMNS = ("string", "large_string", "string_view", "null")
"""Parquet's types of text, and of a column that is empty in every row."""
SHOWN = 200
"""Bytes that are kept of a line that is too long."""


class Line(NamedTuple):
    """One line of a unit, as bytes without decoding."""

    number: int
    """Counted from 1 in the unit (for a packed file: in the file)."""
    content: bytes
    too_long: bool
    """Longer than allowed: `content` is only its beginning."""
    position: int
    """Bytes of the unit's file that have been read so far, from the unit's start."""


def read_lines(unit: Unit, json_keys: Sequence[str], max_line: int = MAX_LINE) -> Iterator[Line]:
    """The lines that begin in the unit, those of blanks only included; of one with more bytes than `max_line`, a part.

    Raises:
        DataError: the file cannot be read to its end: it is truncated, damaged, or the disk fails.
    """
    readers = {"text": _read_text, "gzip": _read_gzip, "zstd": _read_zstd}
    try:
        if unit.source.kind == "parquet":
            yield from _read_parquet(unit, json_keys, max_line)
        else:
            yield from readers[unit.source.kind](unit, max_line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(unit, error) from error
    except OSError as error:
        raise DataError(
            "Every input can be read to its end", found=f"{unit.source.path}: {error}", fix=COPY_AGAIN
        ) from error


COPY_AGAIN = "Copy the file again from where it is whole (or compress it again), or leave it out of --input"


def _damaged(unit: Unit, error: BaseException) -> DataError:
    return DataError(
        "A packed input must be whole",
        found=f"{unit.source.path} ({unit.source.num_bytes} bytes) breaks off or is damaged: {str(error).rstrip('.')}",
        fix=COPY_AGAIN,
    )


def _read_text(unit: Unit, max_line: int) -> Iterator[Line]:
    with Path(unit.source.path).open("rb", buffering=BUFFER) as file:
        if unit.start:  # a line that began before the unit is another's
            file.seek(unit.start - 1)
            while file.tell() < unit.end and not file.readline(min(BUFFER, unit.end - file.tell())).endswith(b"\n"):
                pass
        position, number = file.tell(), 0
        while position < unit.end:
            number += 1
            content, too_long, size = _read_line(file, max_line)
            if not size:
                return
            position += size
            yield Line(number, content, too_long, min(position, unit.end) - unit.start)


def _read_line(file: IO[bytes], max_line: int) -> tuple[bytes, bool, int]:
    """The next line, whether it was longer than `max_line` (then it is cut), and its bytes in the file."""
    content = file.readline(max_line + 1)
    size = len(content)
    too_long = size > max_line and not content.endswith(b"\n")
    if too_long:
        content = content[:SHOWN]
        while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
            size += len(rest)
        size += len(rest)
    return content, too_long, size


def _read_packed(file: IO[bytes], raw: IO[bytes], max_line: int) -> Iterator[Line]:
    number = 0
    while True:
        content, too_long, size = _read_line(file, max_line)
        if not size:
            return
        number += 1
        yield Line(number, content, too_long, raw.tell())


def _read_gzip(unit: Unit, max_line: int) -> Iterator[Line]:
    with Path(unit.source.path).open("rb") as raw, gzip.GzipFile(fileobj=raw) as packed:
        yield from _read_packed(io.BufferedReader(packed, BUFFER), raw, max_line)


def _read_zstd(unit: Unit, max_line: int) -> Iterator[Line]:
    import zstandard

    with Path(unit.source.path).open("rb") as raw:
        try:
            yield from _read_packed(io.BufferedReader(_Pieces(_zstd_pieces(raw)), BUFFER), raw, max_line)
        except zstandard.ZstdError as error:
            raise _damaged(unit, error) from error


def _zstd_pieces(raw: IO[bytes]) -> Iterator[bytes]:
    """Unpacked pieces. The library's own reader takes a file that was cut short for one that ends."""
    import zstandard

    frame, fed = zstandard.ZstdDecompressor().decompressobj(), False
    while piece := raw.read(1 << 14):
        while piece:
            yield frame.decompress(piece)
            piece, fed = frame.unused_data if frame.eof else b"", not frame.eof
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if fed:
        raise EOFError("the last frame has no end")


class _Pieces(io.RawIOBase):
    """A file whose content comes in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _read_parquet(unit: Unit, json_keys: Sequence[str], max_line: int) -> Iterator[Line]:
    """Rows as the JSON lines they would be, so that there is one way to judge a document."""
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(unit.source.path)) as file:
            for key in json_keys:
                _require_column(unit.source.path, file.schema_arrow, key)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=list(json_keys)):
                for row in batch.to_pylist():
                    number += 1
                    done = unit.num_bytes * number // max(1, file.metadata.num_rows)
                    content = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
                    too_long = len(content) > max_line
                    yield Line(number, content[:SHOWN] if too_long else content, too_long, done)
    except pyarrow.ArrowException as error:
        raise _damaged(unit, error) from error


def _require_column(path: str, schema: Any, key: str) -> None:
    """Refuse a file without one column of text for the key: bytes and dates have no one spelling as text."""
    import pyarrow

    kinds = [field.type for field in schema if field.name == key]
    kinds = [kind.value_type if pyarrow.types.is_dictionary(kind) else kind for kind in kinds]
    if len(kinds) != 1 or str(kinds[0]) not in TEXT_COLUMNS:
        raise DataError(
            "A parquet file has one column of strings for each of --json-keys",
            found=f"{path} has {', '.join(f'{field.name} ({field.type})' for field in schema)}; {key} is asked for",
            fix="Name its text columns with --json-keys, or write them as strings",
        )
