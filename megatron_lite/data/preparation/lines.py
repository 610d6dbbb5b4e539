"""Document reader: lines of plain and compressed files, rows of Parquet files, files of folders and archives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_lite.config.text_format import BUFFER, damage_errors, unpacked
from megatron_lite.data.preparation.options import MAX_LINE
from megatron_lite.data.preparation.sources import Unit, packing_in
from megatron_lite.data.preparation.text_files import COPY_AGAIN, SHOWN, TextFile, read_text_files
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

TEXT_COLUMNS = ("string", "large_string", "string_view", "null")
"""Parquet types of text, and the type of a column without any value."""

BATCH_BYTES = 1 << 19
"""Bytes of the lines of a batch, of which the last one may be longer; all arrays of a batch fit in a core's cache."""


class Line(NamedTuple):
    """One line of a unit, as undecoded bytes."""

    number: int
    """Line number from 1 within the unit (compressed files: within the file)."""
    content: bytes
    too_long: bool
    """The line exceeds the maximum; `content` is its beginning."""


class LineBatch(NamedTuple):
    """Consecutive lines of a unit."""

    first: int
    """Number of the first line, from 1 within the unit (compressed files: within the file)."""
    block: bytes
    """The lines with their line breaks; the beginning only of a line that is too long."""
    contents: list[bytes]
    """The lines without line breaks."""
    too_long: frozenset[int]
    """Indices in `contents` of the lines that exceed the maximum, of which it has the beginning."""
    position: int
    """Bytes of the file that have been read so far, from the start of the unit."""
    names: list[str] | None = None
    """Paths of the files, if `contents` are those of files instead of lines; `block` is empty then."""
    ignored: int = 0
    """Number of other files, which are no .txt files."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the lines that were read, with their line breaks; of a line that is too long, its beginning."""
        if self.names is not None:
            return sum(map(len, self.contents))
        if not self.too_long:
            return len(self.block)
        return sum(len(self.line(index).content) for index in range(len(self.contents)))

    def line(self, index: int) -> Line:
        """Return line `index` of the batch, with its line break."""
        content = self.contents[index]
        is_last = index == len(self.contents) - 1
        ending = b"" if index in self.too_long or (is_last and not self.block.endswith(b"\n")) else b"\n"
        return Line(self.first + index, content + ending, index in self.too_long)


def read_lines(unit: Unit, json_keys: Sequence[str], max_line: int = MAX_LINE) -> Iterator[Line]:
    """Yield the lines of `read_batches` one by one."""
    for batch in read_batches(unit, json_keys, max_line):
        yield from map(batch.line, range(len(batch.contents)))


def read_batches(unit: Unit, json_keys: Sequence[str], max_line: int = MAX_LINE) -> Iterator[LineBatch]:
    """Yield the lines that begin in a unit, including blank ones, or its files, in batches of about BATCH_BYTES.

    Args:
        unit: the unit.
        json_keys: columns to read of a Parquet file.
        max_line: maximum number of bytes of a line or file; only the beginning of a longer one is returned.

    Raises:
        DataError: the file cannot be read to its end: it is truncated, damaged, or the disk fails.
    """
    try:
        if unit.source.document == "file":
            yield from _read_files(unit, max_line)
        elif unit.source.kind == "parquet":
            yield from _read_parquet(unit, json_keys, max_line)
        elif unit.source.kind == "text":
            yield from _read_text(unit, max_line)
        else:
            yield from _read_compressed(unit, max_line)
    except OSError as error:
        path = error.filename or unit.source.path
        raise DataError(
            f"Cannot read {path} to its end: {reason(error)}",
            fix=remedy(error, path, instead="leave the file out of --input"),
        ) from error


def _damaged(unit: Unit, error: BaseException) -> DataError:
    return DataError(
        f"{unit.source.path} ({unit.source.num_bytes:,} bytes) is truncated or damaged: {str(error).rstrip('.')}",
        fix=COPY_AGAIN,
    )


def _read_files(unit: Unit, max_bytes: int) -> Iterator[LineBatch]:
    """Yield the .txt files of a folder or an archive, or a file that is one document."""
    # A file that was given itself is a document whatever its suffix.
    inner = {"folder": "", "archive": "", "text": ".txt"}.get(unit.source.kind, ".txt.gz")
    batch, done = _FileBatch(), 0
    for path in unit.paths:
        with Path(path).open("rb") as raw:
            for file in read_text_files(path, raw, max_bytes, inner):
                batch.add(file)
                if batch.num_bytes >= BATCH_BYTES:
                    yield batch.take(done + raw.tell())
            done += raw.tell()
    yield batch.take(done)


class _FileBatch:
    """Files of the next batch."""

    def __init__(self) -> None:
        self._first = 1
        self._start()

    def _start(self) -> None:
        self.num_bytes = self._ignored = 0
        self._contents, self._names, self._too_long = list[bytes](), list[str](), set[int]()

    def add(self, file: TextFile) -> None:
        """Add a file."""
        if file.content is None:
            self._ignored += 1
            return
        if file.too_long:
            self._too_long.add(len(self._contents))
        self._contents.append(file.content)
        self._names.append(file.name)
        self.num_bytes += len(file.content)

    def take(self, position: int) -> LineBatch:
        """Return the batch at this position of the unit, and begin the next one."""
        batch = LineBatch(
            self._first, b"", self._contents, frozenset(self._too_long), position, self._names, self._ignored
        )
        self._first += len(self._contents)
        self._start()
        return batch


def _read_text(unit: Unit, max_line: int) -> Iterator[LineBatch]:
    # Blocks are larger than the buffer, and are then read into their own memory.
    with Path(unit.source.path).open("rb", buffering=BUFFER >> 4) as file:
        if unit.start:  # a line that begins before the unit belongs to the previous one
            file.seek(unit.start - 1)
            while file.tell() < unit.end and not file.readline(min(BUFFER, unit.end - file.tell())).endswith(b"\n"):
                pass
        position, first = file.tell(), 1
        while position < unit.end:
            block, cut, size = _read_block(file, min(BATCH_BYTES, unit.end - position), max_line)
            if not size:
                return
            position += size
            batch = _split(block, cut, first, max_line, min(position, unit.end) - unit.start)
            first += len(batch.contents)
            yield batch


def _read_compressed(unit: Unit, max_line: int) -> Iterator[LineBatch]:
    first, compression = 1, packing_in(unit.source.kind)
    assert compression is not None
    try:
        with Path(unit.source.path).open("rb") as raw, unpacked(raw, compression) as file:
            while True:
                block, cut, size = _read_block(file, BATCH_BYTES, max_line)
                if not size:
                    return
                batch = _split(block, cut, first, max_line, raw.tell())
                first += len(batch.contents)
                yield batch
    except damage_errors(compression) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk
        raise _damaged(unit, error) from error


def _read_block(file: IO[bytes], count: int, max_line: int) -> tuple[bytes, bool, int]:
    """Read `count` bytes, and the rest of the line in which they end.

    Returns:
        The lines, whether the last one is the beginning of a line that is too long, and their bytes in the file.
    """
    block = file.read(count)
    size = len(block)
    if not block or block.endswith(b"\n"):
        return block, False, size
    start = block.rfind(b"\n") + 1
    rest = file.readline(max(0, max_line - (size - start)) + 1)
    size += len(rest)
    if rest.endswith(b"\n") or size - start <= max_line:
        return block + rest, False, size
    block = block[:start] + (block[start:] + rest)[:SHOWN]
    while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
        size += len(rest)
    return block, True, size + len(rest)


def _split(block: bytes, cut: bool, first: int, max_line: int, position: int) -> LineBatch:
    """Return the lines of a block; `cut`: the last one is the beginning of a line that is too long."""
    contents = block.split(b"\n")
    if not contents[-1]:
        contents.pop()
    too_long = {len(contents) - 1} if cut else set()
    if max(map(len, contents), default=0) > max_line:
        for index, content in enumerate(contents):
            if len(content) > max_line:
                contents[index] = content[:SHOWN]
                too_long.add(index)
    return LineBatch(first, block, contents, frozenset(too_long), position)


def _read_parquet(unit: Unit, json_keys: Sequence[str], max_line: int) -> Iterator[LineBatch]:
    """Yield the rows as JSON lines, which are then parsed like those of other files."""
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(unit.source.path)) as file:
            for key in json_keys:
                _require_column(unit.source.path, file.schema_arrow, key)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=list(json_keys)):
                rows = [json.dumps(row, ensure_ascii=False) for row in batch.to_pylist()]
                block = "\n".join(rows).encode("utf-8", "surrogatepass")
                done = unit.num_bytes * (number + len(rows)) // max(1, file.metadata.num_rows)
                yield _split(block, cut=False, first=number + 1, max_line=max_line, position=done)
                number += len(rows)
    except pyarrow.ArrowException as error:
        raise _damaged(unit, error) from error


def _require_column(path: str, schema: Any, key: str) -> None:
    """Check that a file has exactly one text column for the key (bytes and dates have no unique form as text)."""
    import pyarrow

    kinds = [field.type for field in schema if field.name == key]
    kinds = [kind.value_type if pyarrow.types.is_dictionary(kind) else kind for kind in kinds]
    if len(kinds) != 1 or str(kinds[0]) not in TEXT_COLUMNS:
        raise DataError(
            f'{path} has no single column of strings named "{key}" (--json-keys {key}); its columns are '
            + ", ".join(f"{field.name} ({field.type})" for field in schema),
            fix="Give --json-keys the name of a column of strings, or convert the column to strings",
        )
