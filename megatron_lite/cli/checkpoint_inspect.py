"""CLI commands `checkpoint inspect` and `checkpoint diff`: print content and differences of checkpoints."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.import_ import foreign_options
from megatron_lite.cli.standard_output import make_console
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.formatting import format_count, format_shape, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from megatron_lite.checkpoint.sources import TensorDifference
    from megatron_lite.interop.inspection import Comparable
    from megatron_lite.runs.foreign import Recognised
    from megatron_lite.runs.manifest import Manifest

_PATH, _NARROWEST, _PADDING = 42, 8, 8
"""Columns of a table of differences: of the longest path, of a value at least, of the table's frame."""
_SHOWN = 4
"""Values of a list that are shown."""


def inspect(options: argparse.Namespace, console: Console) -> int:
    """Show the content of checkpoints."""
    for given in options.folders:
        found = _foreign(given)
        if found is None:
            _inspect_own(one_checkpoint(given), options, console)
        else:
            _inspect_foreign(found, options, console)
    return 0


def _inspect_own(path: Path, options: argparse.Namespace, console: Console) -> None:
    from megatron_lite.runs.manifest import read_manifest

    manifest = read_manifest(path)
    console.print(str(path), style="bold")
    facts = table("", "", "")
    rows = {
        "iteration": f"{manifest.iteration:,}",
        "parameters": f"{num_parameters(manifest):,}",
        "size": f"{format_size(manifest.size)} in {format_count(len(manifest.files), 'file')}",
        "written by": f"megatron_lite {manifest.writer['megatron_lite']}, torch {manifest.writer['torch']}",
        "on": f"{format_count(manifest.writer['world_size'], 'rank')}, {when(manifest)}",
        **manifest.provenance.fingerprints,
        "samples left out": ", ".join(f"{first}-{end - 1}" for first, end in manifest.provenance.skipped_samples),
        **{f"state: {name}": _plain(value) for name, value in manifest.scalars.items()},
    }
    for name, value in rows.items():
        if value:
            facts.add_row(name, value)
    console.print(facts)
    if options.config:
        console.print_json(json.dumps(dict(manifest.provenance.config)))
    if options.tensors:
        tensors = table("tensors", "dtype", "pieces", "shape", "name")
        for name, tensor in manifest.tensors.items():
            tensors.add_row(tensor.dtype, str(len(tensor.pieces)), format_shape(tensor.shape), name)
        _print_wide(tensors)


def _inspect_foreign(found: Recognised, options: argparse.Namespace, console: Console) -> None:
    from megatron_lite.interop.inspection import summarize

    summary = summarize(found)
    console.print(str(found.folder), style="bold")
    facts = table("", "", "")
    for name, value in summary.rows.items():
        facts.add_row(name, value)
    console.print(facts)
    if options.config:
        console.print_json(json.dumps(dict(summary.config)))
    if options.tensors:
        tensors = table("tensors", "dtype", "shape", "name")
        for name, info in summary.tensors.tensors.items():
            tensors.add_row(info.dtype, format_shape(info.shape), name)
        _print_wide(tensors)


def diff(options: argparse.Namespace, console: Console) -> int:
    """Show the differences of two checkpoints; return 1 if there are any."""
    kinds = [_foreign(folder) for folder in (options.first, options.second)]
    if any(kinds):
        return _diff_kinds(options, kinds, console)
    if options.flags:
        raise _useless(options.flags)

    from megatron_lite.runs.manifest import read_manifest

    first, second = one_checkpoint(options.first), one_checkpoint(options.second)
    one, other = read_manifest(first), read_manifest(second)
    console.print(f"A {first}\nB {second}")
    parts = {
        "iteration": (one.iteration, other.iteration),
        "config": (one.provenance.config, other.provenance.config),
        "fingerprints": (one.provenance.fingerprints, other.provenance.fingerprints),
        "state": (one.scalars, other.scalars),
        "tensors": tuple({n: f"{t.dtype} {t.shape}" for n, t in m.tensors.items()} for m in (one, other)),
    }
    same = "same config, fingerprints, state and tensor shapes"
    differ = _print_differences(parts, same, console)
    if options.values:
        from megatron_lite.checkpoint.reading import compare_checkpoints

        differ = _print_values(compare_checkpoints(first, second), console) or differ
    return 1 if differ else 0


def _diff_kinds(options: argparse.Namespace, kinds: Sequence[Recognised | None], console: Console) -> int:
    """Compare models and weights of two checkpoints, at least one of them foreign, under megatron_lite's names."""
    from megatron_lite.checkpoint.sources import compare_sources
    from megatron_lite.interop.inspection import comparable, says_vocabulary

    if options.flags and all(map(says_vocabulary, kinds)):
        raise _useless(options.flags)
    chosen = foreign_options(options, options.flags, weights_only=True)
    # A file of Megatron-LM may not state the size of the vocabulary without padding: the other checkpoint does.
    order = sorted((0, 1), key=lambda number: not says_vocabulary(kinds[number]))
    found: dict[int, Comparable] = {}
    for number in order:
        size = found[order[0]].model["vocab_size"] if found else 0
        found[number] = comparable((options.first, options.second)[number], kinds[number], chosen, size)
    one, other = found[0], found[1]
    console.print(f"A {one.path}\nB {other.path}")
    parts = {
        "model": (one.model, other.model),
        "tensors": tuple({n: f"{t.dtype} {t.shape}" for n, t in m.tensors.tensors.items()} for m in (one, other)),
    }
    differ = _print_differences(parts, "same model and tensor shapes", console)
    if options.values:
        differ = _print_values(compare_sources(one.tensors, other.tensors), console) or differ
    return 1 if differ else 0


def _useless(flags: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{' '.join(flags)} has no effect: both checkpoints store the configuration of their model",
        fix=f"Remove {' '.join(flags)}: flags of the model apply to checkpoints of Megatron-LM and DeepSpeed",
    )


def _foreign(given: Path) -> Recognised | None:
    """Return the foreign checkpoint in a folder; None: there is none, or one of megatron_lite."""
    from megatron_lite.runs.catalog import list_checkpoints
    from megatron_lite.runs.foreign import Kind, recognise

    found = recognise(existing(given))
    if found is None or found.kind is Kind.MEGATRON_LITE or list_checkpoints(given):
        return None
    return found


def _print_differences(parts: Mapping[str, tuple[object, ...]], same: str, console: Console) -> bool:
    from megatron_lite.runs.comparison import compare_configs

    differences = table("", "", "A", "B")
    for name, (a, b) in parts.items():
        for difference in compare_configs({name: a}, {name: b}):
            show = _plain if name == "state" else str
            differences.add_row(difference.path, show(difference.saved), show(difference.current))
    _share_width(differences, console)
    differ = bool(differences.row_count)
    console.print(differences if differ else same)
    return differ


def _share_width(made: Table, console: Console) -> None:
    """Set the widths of columns: names are not folded as long as they leave half of a terminal to the values."""
    names, *values = made.columns
    names.min_width = min(_PATH, max((len(str(cell)) for cell in names.cells), default=0))
    for column in values:
        column.max_width = max(_NARROWEST, (console.width - names.min_width - _PADDING) // 2)


def _print_values(differences: Iterable[TensorDifference], console: Console) -> bool:
    values = table("values", "max |A - B|", "norm(A - B) / norm(A)", "tensor")
    count = 0
    for difference in differences:
        count += 1
        if not difference.equal:
            values.add_row(f"{difference.largest:.3e}", f"{difference.relative:.3e}", difference.name)
    if values.row_count:
        _print_wide(values)
    console.print(f"{count - values.row_count} of {count} common tensors are equal bit for bit")
    return bool(values.row_count)


def when(manifest: Manifest) -> str:
    """Return the time at which a checkpoint was written."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.writer["time"]))


def table(title: object, *columns: str) -> Table:
    """Return an empty table; columns of numbers are right-aligned."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(title=str(title) or None, title_justify="left", box=SIMPLE, show_header=any(columns), pad_edge=False)
    for column in columns:
        numbers = column in ("iteration", "size", "parameters", "ranks", "pieces")
        made.add_column(column, overflow="fold", justify="right" if numbers else "left")
    return made


def _print_wide(made: Table) -> None:
    """Print a table of names at full width: names are copied and searched for, so none is folded."""

    make_console(width=1 << 12, highlight=False, markup=False).print(made)


def _plain(value: object) -> str:
    """Return a value of the state as text; of a long list, its length."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list) and len(value) > _SHOWN:
        return f"[{len(value)} values]"
    return json.dumps(value)


def num_parameters(manifest: Manifest) -> int:
    """Return the number of elements of all weights."""
    from megatron_lite.checkpoint.names import is_weight

    return sum(math.prod(t.shape) for name, t in manifest.tensors.items() if is_weight(name))


def existing(folder: Path) -> Path:
    """Return the folder; for a --save folder followed by /best, that of its best checkpoint.

    Raises:
        CheckpointError: it does not exist.
    """
    from megatron_lite.runs.catalog import resolve_best

    folder = resolve_best(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f'"{folder}" {"is a file, not a folder" if folder.exists() else "does not exist"}',
            fix="Give the --save folder of a run",
        )
    return folder


def one_checkpoint(given: Path) -> Path:
    """Return a checkpoint's folder: the given one, or the latest checkpoint in a --save folder.

    Raises:
        CheckpointError: there is none.
    """
    from megatron_lite.runs.catalog import find_checkpoint

    found = find_checkpoint(str(existing(given)))
    if found is None:
        raise CheckpointError(
            f'The folder "{given.absolute()}" contains no checkpoint',
            fix="Give the --save folder of a run, or one of its iter_… folders",
        )
    return found
