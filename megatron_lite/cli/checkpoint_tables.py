"""Tables and short texts that the checkpoint command's actions share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.errors import CheckpointError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_lite.runs.manifest import Manifest

SHOWN = 4


def table(title: object, *columns: str) -> Table:
    """Return an empty table; columns of numbers are aligned to the right."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(title=str(title) or None, title_justify="left", box=SIMPLE, show_header=any(columns), pad_edge=False)
    for column in columns:
        numbers = column in ("iteration", "size", "parameters", "ranks", "pieces")
        made.add_column(column, overflow="fold", justify="right" if numbers else "left")
    return made


def print_whole(made: Table) -> None:
    """Print a table of names, which are copied and searched for: none is folded, however narrow the terminal."""
    from rich.console import Console

    Console(width=1 << 12, highlight=False, markup=False).print(made)


def plain(value: object) -> str:
    """Return a value of the state in words; of a long list, only its length."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    if isinstance(value, list) and len(value) > SHOWN:
        return f"[{len(value)} values]"
    return json.dumps(value)


def num_parameters(manifest: Manifest) -> int:
    """Return the elements of all weights."""
    from megatron_lite.checkpoint.names import OPTIMIZER_PREFIX

    return sum(math.prod(t.shape) for name, t in manifest.tensors.items() if not name.startswith(OPTIMIZER_PREFIX))


def existing(folder: Path) -> Path:
    """Return a folder.

    Raises:
        CheckpointError: it does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError("The folder must exist", found=str(folder), fix="Give the folder that --save names")
    return folder


def one_checkpoint(given: Path) -> Path:
    """Return the checkpoint that a folder means: itself, or the latest of a --save folder.

    Raises:
        CheckpointError: there is none.
    """
    from megatron_lite.runs.catalog import find_checkpoint

    found = find_checkpoint(str(existing(given)))
    if found is None:
        raise CheckpointError(
            "There must be a checkpoint", found=f"{given} holds none", fix="Give a folder that --save wrote, or iter_…"
        )
    return found
