"""CLI command `checkpoint`: list, inspect, verify, compare, average and reshard checkpoints."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import Parser, real
from megatron_lite.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megatron_lite.checkpoint.save import SaveReport
    from megatron_lite.runs.manifest import Manifest

_SHOWN = 4
_PATH, _NARROWEST, _PADDING = 42, 8, 8
SUMMARY = "list, inspect, verify, compare, average and reshard checkpoints"


def run(argv: list[str]) -> int:
    """Do what `argv` asks for; 1 if verify or diff found something."""
    options = _parser().parse_args(argv)

    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    actions = {
        "list": _list,
        "inspect": _inspect,
        "verify": _verify,
        "diff": _diff,
        "average": _average,
        "reshard": _reshard,
    }
    return actions[options.action](options, console)


def _list(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.runs.catalog import (
        announced,
        announcement_problem,
        incompleteness,
        list_iterations,
        locate,
    )
    from megatron_lite.runs.foreign import foreign_error
    from megatron_lite.runs.manifest import read_manifest, size_text
    from megatron_lite.runs.rollback import WEIGHTS_FOLDER

    for root in options.folders:
        table, broken = _table(root, "", "iteration", "size", "parameters", "ranks", "saved"), []
        latest = announced(_existing(root))
        for iteration in list_iterations(root):
            path = locate(root, iteration)
            if (problem := incompleteness(path)) is not None:
                broken.append(problem)
                continue
            manifest = read_manifest(path)
            table.add_row(
                "→" if latest == str(iteration) else "",
                f"{iteration:,}",
                size_text(manifest.size),
                f"{_num_parameters(manifest):,}",
                f"{manifest.writer['world_size']:,}",
                _when(manifest),
            )
        console.print(table)
        if (problem := announcement_problem(root)) is None:
            console.print(f"→ is what --load {root} takes")
        elif table.row_count:
            console.print(problem, style="red")
        else:
            foreign = foreign_error(root)
            console.print("there is no checkpoint here" if foreign is None else foreign.found, highlight=False)
        for problem in broken:
            console.print("not whole", style="red", end=" ")
            console.print(problem)
        if alone := list_iterations(root / WEIGHTS_FOLDER):
            console.print(f"the weights alone of {len(alone)} iterations are in {root / WEIGHTS_FOLDER}")
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.runs.manifest import read_manifest, size_text

    for given in options.folders:
        path = _one(given)
        manifest = read_manifest(path)
        console.print(str(path), style="bold")
        table = _table("", "", "")
        rows = {
            "iteration": f"{manifest.iteration:,}",
            "parameters": f"{_num_parameters(manifest):,}",
            "size": f"{size_text(manifest.size)} in {_counted(len(manifest.files), 'file')}",
            "written by": f"megatron_lite {manifest.writer['megatron_lite']}, torch {manifest.writer['torch']}",
            "on": f"{_counted(manifest.writer['world_size'], 'rank')}, {_when(manifest)}",
            **manifest.provenance.fingerprints,
            "samples left out": ", ".join(f"{first}-{end - 1}" for first, end in manifest.provenance.skipped_samples),
            **{f"state: {name}": _plain(value) for name, value in manifest.scalars.items()},
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, value)
        console.print(table)
        if options.config:
            console.print_json(json.dumps(dict(manifest.provenance.config)))
        if options.tensors:
            tensors = _table("tensors", "dtype", "pieces", "shape", "name")
            for name, tensor in manifest.tensors.items():
                shape = " x ".join(map(str, tensor.shape)) or "scalar"
                tensors.add_row(tensor.dtype, str(len(tensor.pieces)), shape, name)
            _print_whole(tensors)
    return 0


def _plain(value: object) -> str:
    """A value of the state in words; of a long list, only its length."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list) and len(value) > _SHOWN:
        return f"[{len(value)} values]"
    return json.dumps(value)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _verify(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.runs.catalog import announcement_problem, iteration_of

    paths, lost = [], 0
    for given in options.folders:
        single = iteration_of(given) is not None
        found = [given] if single else sorted(p for p in _existing(given).iterdir() if iteration_of(p) is not None)
        if not found:
            raise CheckpointError(
                "There must be something to verify",
                found=f"no iter_… in {given}",
                fix="Give a folder that --save wrote",
            )
        paths += found
        if not single and (problem := announcement_problem(given)) is not None:
            lost += 1
            console.print("damaged", style="red", end=" ")
            console.print(problem)
    failures = [_verify_one(path, console) for path in paths].count(False)
    console.print(f"{len(paths) - failures} of {len(paths)} checkpoints are whole")
    return 1 if failures or lost else 0


def _verify_one(path: Path, console: Console) -> bool:
    from megatron_lite.checkpoint.verify import verify_checkpoint
    from megatron_lite.runs.manifest import size_text

    begun = time.monotonic()
    try:
        manifest = verify_checkpoint(path)
    except CheckpointError as error:
        console.print("damaged", style="red", end=" ")
        console.print(f"{path}: {error.found}")
        return False
    rate = manifest.size / max(time.monotonic() - begun, 1e-9)
    console.print("whole  ", style="green", end=" ")
    console.print(f"{path}: {_counted(len(manifest.files), 'file')}, {size_text(manifest.size)}, {size_text(rate)}/s")
    return True


def _diff(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.runs.comparison import compare_configs
    from megatron_lite.runs.manifest import read_manifest

    first, second = _one(options.first), _one(options.second)
    one, other = read_manifest(first), read_manifest(second)
    console.print(f"A {first}\nB {second}")
    parts = {
        "iteration": (one.iteration, other.iteration),
        "config": (one.provenance.config, other.provenance.config),
        "fingerprints": (one.provenance.fingerprints, other.provenance.fingerprints),
        "state": (one.scalars, other.scalars),
        "tensors": tuple({n: f"{t.dtype} {t.shape}" for n, t in m.tensors.items()} for m in (one, other)),
    }
    table = _table("", "", "A", "B")
    for name, (a, b) in parts.items():
        for difference in compare_configs({name: a}, {name: b}):
            show = _plain if name == "state" else str
            table.add_row(difference.path, show(difference.saved), show(difference.current))
    _share_width(table, console)
    differ = bool(table.row_count)
    console.print(table if differ else "same config, fingerprints, state and tensor shapes")
    if options.values:
        differ = _diff_values(first, second, console) or differ
    return 1 if differ else 0


def _share_width(table: Table, console: Console) -> None:
    """Names stay whole as long as they leave half of a terminal to the values."""
    names, *values = table.columns
    names.min_width = min(_PATH, max((len(str(cell)) for cell in names.cells), default=0))
    for column in values:
        column.max_width = max(_NARROWEST, (console.width - names.min_width - _PADDING) // 2)


def _diff_values(first: Path, second: Path, console: Console) -> bool:
    from megatron_lite.checkpoint.offline import compare_values

    table = _table("values", "largest |A - B|", "‖A - B‖ / ‖A‖", "tensor")
    count = 0
    for difference in compare_values(first, second):
        count += 1
        if not difference.equal:
            table.add_row(f"{difference.largest:.3e}", f"{difference.relative:.3e}", difference.name)
    if table.row_count:
        _print_whole(table)
    console.print(f"{count - table.row_count} of {count} common tensors are equal bit for bit")
    return bool(table.row_count)


def _average(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.checkpoint.rewriting import average
    from megatron_lite.cli.folder_lock import holding

    with holding(options.output, "checkpoint average"), _progress("averaging") as progress:
        paths = [_one(path) for path in options.folders]
        report = average(paths, options.output, file_size=_file_size(options), progress=progress)
    _summarize(report, f"the average of {', '.join(path.name for path in paths)}", console)
    return 0


def _reshard(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.checkpoint.rewriting import reshard
    from megatron_lite.cli.folder_lock import holding

    path, dtype, file_size = _one(options.folder), options.dtype, _file_size(options)
    with holding(options.output, "checkpoint reshard"), _progress("rewriting") as progress:
        report = reshard(
            path,
            options.output,
            weights_only=options.weights_only,
            dtype=dtype,
            file_size=file_size,
            progress=progress,
        )
    what = f"its weights in {dtype}" if dtype else "its weights" if options.weights_only else "all of it"
    _summarize(report, f"{path}, {what}", console)
    return 0


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, and a function that takes bytes done and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summarize(report: SaveReport, what: str, console: Console) -> None:
    from megatron_lite.runs.manifest import read_manifest, size_text

    rate = report.size / max(report.seconds, 1e-9)
    files = [name for name in read_manifest(report.path).files if name.endswith(".distcp")]
    console.print(f"wrote {report.path}: {what}")
    console.print(
        f"{size_text(report.size)} in {_counted(len(files), 'file')}, {report.seconds:.1f} s, {size_text(rate)}/s"
    )
    console.print(f"--load {report.path.parent} takes it, in any layout")


def _file_size(options: argparse.Namespace) -> int:
    return int(options.max_file_gb * 1e9)


def _one(given: Path) -> Path:
    """The checkpoint that a folder means: itself, or the latest of a --save folder."""
    from megatron_lite.runs.catalog import find_checkpoint

    found = find_checkpoint(str(_existing(given)))
    if found is None:
        raise CheckpointError(
            "There must be a checkpoint", found=f"{given} holds none", fix="Give a folder that --save wrote, or iter_…"
        )
    return found


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError("The folder must exist", found=str(folder), fix="Give the folder that --save names")
    return folder


def _table(title: object, *columns: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=str(title) or None, title_justify="left", box=SIMPLE, show_header=any(columns), pad_edge=False)
    for column in columns:
        numbers = column in ("iteration", "size", "parameters", "ranks", "pieces")
        table.add_column(column, overflow="fold", justify="right" if numbers else "left")
    return table


def _print_whole(table: Table) -> None:
    """Prints a table of names, which are copied and searched for: none is folded, however narrow the terminal."""
    from rich.console import Console

    Console(width=1 << 12, highlight=False, markup=False).print(table)


def _num_parameters(manifest: Manifest) -> int:
    from megatron_lite.checkpoint.names import OPTIMIZER_PREFIX

    return sum(math.prod(t.shape) for name, t in manifest.tensors.items() if not name.startswith(OPTIMIZER_PREFIX))


def _when(manifest: Manifest) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.writer["time"]))


def _parser() -> Parser:
    parser = Parser(prog="megatron-lite checkpoint", description=SUMMARY.capitalize() + ".")
    actions = parser.add_subparsers(dest="action", required=True, metavar="<action>")

    def action(name: str, text: str) -> Parser:
        return actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    listing = action("list", "show the complete checkpoints of --save folders")
    listing.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a folder that --save wrote")

    inspecting = action("inspect", "show what a checkpoint holds")
    inspecting.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="iter_…, or a folder: its latest")
    inspecting.add_argument("--tensors", action="store_true", help="list every tensor")
    inspecting.add_argument("--config", action="store_true", help="print the full config as JSON")

    verifying = action("verify", "read every byte and compare it with the manifest's checksums")
    verifying.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="iter_…, or a folder: all in it")

    comparing = action("diff", "show where two checkpoints differ; exit code 1 if they do")
    comparing.add_argument("first", type=Path, metavar="A", help="iter_…, or a folder: its latest")
    comparing.add_argument("second", type=Path, metavar="B", help="the same")
    comparing.add_argument("--values", action="store_true", help="compare the tensors' values as well")

    averaging = action("average", "write a checkpoint with the mean of the weights of several")
    averaging.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="iter_…, or a folder: its latest")

    resharding = action("reshard", "write a checkpoint anew: in fewer files, without optimizer state, in another dtype")
    resharding.epilog = (
        "A run in another layout needs none of this: every layout reads every checkpoint, and each rank only its part. "
        "This is to keep or move what thousands of ranks wrote. It takes little memory whatever the size; the new "
        "checkpoint appears under its name once it is whole."
    )
    resharding.add_argument("folder", type=Path, metavar="FOLDER", help="iter_…, or a folder: its latest")
    resharding.add_argument(
        "--weights-only",
        action="store_true",
        help="leave the optimizer's state out; fp32 main parameters, which are weights, stay",
    )
    resharding.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="keep nothing but the weights, in this dtype, made from the fp32 main parameters where there are some",
    )
    for writing in (averaging, resharding):
        writing.add_argument(
            "--output", type=Path, required=True, metavar="FOLDER", help="the --save folder to write iter_… into"
        )
        writing.add_argument(
            "--max-file-gb",
            type=real(1e-9, 1e9),
            default=5.0,
            metavar="GB",
            help="size that no file exceeds, unless a single record of up to 0.034 GB does (default: 5)",
        )
    return parser
