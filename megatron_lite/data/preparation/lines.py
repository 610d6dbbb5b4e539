"""Line reader of preprocessing: lines of plain and compressed files (gzip, bz2, xz, zstd), rows of Parquet files."""

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
    try:
        if unit.source.kind == "parquet":
            yield from _read_parquet(unit, json_keys, max_line)
        elif unit.source.kind == "text":
            yield from _read_text(unit, max_line)
        else:
            yield from _read_packed(unit, max_line)
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


def _read_packed(unit: Unit, max_line: int) -> Iterator[Line]:
    number, packing = 0, unit.source.kind
    assert packing != "text" and packing != "parquet"
    try:
        with Path(unit.source.path).open("rb") as raw, unpacked(raw, packing) as file:
            while True:
                content, too_long, size = _read_line(file, max_line)
                if not size:
                    return
                number += 1
                yield Line(number, content, too_long, raw.tell())
    except damage_errors(packing) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the content
        raise _damaged(unit, error) from error


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
