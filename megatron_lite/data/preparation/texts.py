"""Text iterator over input files, for tokenizer training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_lite.data.preparation.documents import BadLineError, parse_line
from megatron_lite.data.preparation.lines import Line, read_lines
from megatron_lite.data.preparation.sources import find_sources, plan_units
from megatron_lite.errors import DataError


def iterate_texts(
    inputs: Sequence[str], json_keys: Sequence[str] = ("text",), *, max_bytes: int | None = None, skip_bad: bool = False
) -> Iterator[str]:
    """The texts under `json_keys` of every document, up to `max_bytes` of lines.

    Raises:
        DataError: an input is missing or damaged, or a line holds no document (without `skip_bad`).
    """
    left = max_bytes
    for unit in plan_units(find_sources(inputs), unit_bytes=1 << 62):
        for line in read_lines(unit, json_keys):
            if left is not None:
                left -= len(line.content)
                if left < 0:
                    return
            yield from _texts(line, json_keys, unit.source.path, skip_bad)


def _texts(line: Line, json_keys: Sequence[str], path: str, skip_bad: bool) -> list[str]:
    try:
        return parse_line(line, json_keys) or []
    except BadLineError as error:
        if skip_bad:
            return []
        raise DataError(
            "Every line of the input is a document",
            found=f"{path}:{line.number}: {error}",
            fix="Repair the line, or pass --skip-bad-lines to leave out such lines",
        ) from error
