"""Line reader: lines of plain and compressed files (gzip, bz2, xz, zstd), rows of Parquet files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_lite.config.text_format import BUFFER, damage_errors, unpacked
from megatron_lite.data.preparation.options import MAX_LINE
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

TEXT_COLUMNS = ("string", "large_string", "string_view", "null")
"""Parquet types of text, and the type of a column without any value."""
SHOWN = 200
"""Bytes kept of a line that is too long."""


class Line(NamedTuple):
    """One line of a unit, as undecoded bytes."""

    number: int
    """Line number from 1 within the unit (compressed files: within the file)."""
    content: bytes
    too_long: bool
    """The line exceeds the maximum; `content` is its beginning."""
    position: int
    """Bytes of the file that have been read so far, from the start of the unit."""


def read_lines(unit: Unit, json_keys: Sequence[str], max_line: int = MAX_LINE) -> Iterator[Line]:
    """Yield the lines that begin in a unit, including blank ones.

    Args:
        unit: the unit.
        json_keys: columns to read of a Parquet file.
        max_line: maximum number of bytes of a line; only the beginning of a longer one is returned.

    Raises:
        DataError: the file cannot be read to its end: it is truncated, damaged, or the disk fails.
    """
    try:
        if unit.source.kind == "parquet":
            yield from _read_parquet(unit, json_keys, max_line)
        elif unit.source.kind == "text":
            yield from _read_text(unit, max_line)
        else:
            yield from _read_compressed(unit, max_line)
    except OSError as error:
        raise DataError(
            f"Cannot read {unit.source.path} to its end: {reason(error)}",
            fix=remedy(error, unit.source.path, instead="leave the file out of --input"),
        ) from error


COPY_AGAIN = "Copy or compress the file again, or leave it out of --input"


def _damaged(unit: Unit, error: BaseException) -> DataError:
    return DataError(
        f"{unit.source.path} ({unit.source.num_bytes:,} bytes) is truncated or damaged: {str(error).rstrip('.')}",
        fix=COPY_AGAIN,
    )


def _read_text(unit: Unit, max_line: int) -> Iterator[Line]:
    with Path(unit.source.path).open("rb", buffering=BUFFER) as file:
        if unit.start:  # a line that begins before the unit belongs to the previous one
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
    """Return the next line (cut if longer than `max_line`), whether it was cut, and its bytes in the file."""
    content = file.readline(max_line + 1)
    size = len(content)
    too_long = size > max_line and not content.endswith(b"\n")
    if too_long:
        content = content[:SHOWN]
        while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
            size += len(rest)
        size += len(rest)
    return content, too_long, size


def _read_compressed(unit: Unit, max_line: int) -> Iterator[Line]:
    number, compression = 0, unit.source.kind
    assert compression != "text" and compression != "parquet"
    try:
        with Path(unit.source.path).open("rb") as raw, unpacked(raw, compression) as file:
            while True:
                content, too_long, size = _read_line(file, max_line)
                if not size:
                    return
                number += 1
                yield Line(number, content, too_long, raw.tell())
    except damage_errors(compression) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk
        raise _damaged(unit, error) from error


def _read_parquet(unit: Unit, json_keys: Sequence[str], max_line: int) -> Iterator[Line]:
    """Yield the rows as JSON lines, which are then parsed like those of other files."""
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
