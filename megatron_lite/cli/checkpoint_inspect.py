"""megatron-lite checkpoint inspect and diff: what a checkpoint of any kind holds, and where two differ."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.checkpoint_tables import existing, num_parameters, one_checkpoint, plain, print_whole, table
from megatron_lite.formatting import format_count, format_shape, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console
    from rich.table import Table

    from megatron_lite.checkpoint.sources import TensorDifference
    from megatron_lite.interop.inspection import Comparable
    from megatron_lite.runs.foreign import Recognised
    from megatron_lite.runs.manifest import Manifest

_PATH, _NARROWEST, _PADDING = 42, 8, 8


def inspect(options: argparse.Namespace, console: Console) -> int:
    """Show what checkpoints hold."""
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
        **{f"state: {name}": plain(value) for name, value in manifest.scalars.items()},
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
        print_whole(tensors)


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
        print_whole(tensors)


def diff(options: argparse.Namespace, console: Console) -> int:
    """Show where two checkpoints differ; 1 if they do."""
    if any(_foreign(folder) is not None for folder in (options.first, options.second)):
        return _diff_kinds(options, console)

    from megatron_lite.checkpoint.reading import compare_checkpoints
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
        differ = _print_values(compare_checkpoints(first, second), console) or differ
    return 1 if differ else 0


def _diff_kinds(options: argparse.Namespace, console: Console) -> int:
    """Compare the models and weights of two checkpoints, of which one at least is foreign, under our names."""
    from megatron_lite.checkpoint.sources import compare_sources
    from megatron_lite.interop.inspection import comparable, says_vocabulary

    kinds = [_foreign(folder) for folder in (options.first, options.second)]
    # A file of Megatron-LM may not say how large the vocabulary is without its padding: the other one does.
    order = sorted((0, 1), key=lambda number: not says_vocabulary(kinds[number]))
    found: dict[int, Comparable] = {}
    for number in order:
        size = found[order[0]].model["vocab_size"] if found else 0
        found[number] = comparable((options.first, options.second)[number], kinds[number], size)
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


def _foreign(given: Path) -> Recognised | None:
    """Return the foreign checkpoint of a folder; None: it holds one of ours, or none that is recognised."""
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
            show = plain if name == "state" else str
            differences.add_row(difference.path, show(difference.saved), show(difference.current))
    _share_width(differences, console)
    differ = bool(differences.row_count)
    console.print(differences if differ else same)
    return differ


def _share_width(made: Table, console: Console) -> None:
    """Names stay whole as long as they leave half of a terminal to the values."""
    names, *values = made.columns
    names.min_width = min(_PATH, max((len(str(cell)) for cell in names.cells), default=0))
    for column in values:
        column.max_width = max(_NARROWEST, (console.width - names.min_width - _PADDING) // 2)


def _print_values(differences: Iterable[TensorDifference], console: Console) -> bool:
    values = table("values", "largest |A - B|", "‖A - B‖ / ‖A‖", "tensor")
    count = 0
    for difference in differences:
        count += 1
        if not difference.equal:
            values.add_row(f"{difference.largest:.3e}", f"{difference.relative:.3e}", difference.name)
    if values.row_count:
        print_whole(values)
    console.print(f"{count - values.row_count} of {count} common tensors are equal bit for bit")
    return bool(values.row_count)


def when(manifest: Manifest) -> str:
    """Return the time at which a checkpoint was written."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.writer["time"]))
