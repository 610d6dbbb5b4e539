"""CLI command `checkpoint`: list, inspect, verify, compare, average and reshard checkpoints."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.checkpoint_inspect import diff, existing, inspect, num_parameters, one_checkpoint, table, when
from megatron_lite.cli.import_ import add_foreign_arguments
from megatron_lite.cli.parser import Parser, real
from megatron_lite.cli.progress import byte_progress
from megatron_lite.cli.standard_output import make_console
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_count, format_size

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_lite.checkpoint.writing import SaveReport

SUMMARY = "list, inspect, verify, compare, average and reshard checkpoints"


def run(argv: list[str]) -> int:
    """Run the command; return 1 if verify finds damage or diff a difference."""
    parser = _parser()
    options, flags = parser.parse_known_args(argv)
    if flags and options.action != "diff":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    options.flags = flags

    console = make_console(highlight=False, markup=False, soft_wrap=True)
    actions = {
        "list": _list,
        "inspect": inspect,
        "verify": _verify,
        "diff": diff,
        "average": _average,
        "reshard": _reshard,
    }
    return actions[options.action](options, console)


def _list(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.runs.catalog import (
        BEST,
        best_iteration,
        incompleteness,
        latest_problem,
        list_iterations,
        locate,
        read_latest,
    )
    from megatron_lite.runs.foreign import foreign_error
    from megatron_lite.runs.manifest import read_manifest
    from megatron_lite.runs.rollback import WEIGHTS_FOLDER

    for root in options.folders:
        listed, broken = table(root, "", "iteration", "size", "parameters", "ranks", "saved"), []
        latest, best = read_latest(existing(root)), best_iteration(root)
        for iteration in list_iterations(root):
            path = locate(root, iteration)
            if (problem := incompleteness(path)) is not None:
                broken.append(problem)
                continue
            manifest = read_manifest(path)
            listed.add_row(
                ("*" if latest == str(iteration) else "") + ("b" if best == iteration else ""),
                f"{iteration:,}",
                format_size(manifest.size),
                f"{num_parameters(manifest):,}",
                f"{manifest.writer['world_size']:,}",
                when(manifest),
            )
        console.print(listed)
        if (problem := latest_problem(root)) is None:
            console.print(f"* latest (loaded by --load {root})")
            if best is not None:
                console.print(f"b lowest validation loss (loaded by --load {root / BEST})")
        elif listed.row_count or broken:
            console.print(problem, style="red")
        else:
            foreign = foreign_error(root)
            console.print(f"There is no checkpoint in {root}" if foreign is None else foreign.problem, highlight=False)
        for problem in broken:
            console.print("incomplete", style="red", end=" ")
            console.print(problem)
        if weights_only := list_iterations(root / WEIGHTS_FOLDER):
            console.print(f"{root / WEIGHTS_FOLDER} holds weights-only checkpoints of {len(weights_only)} iterations")
    return 0


def _verify(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.runs.catalog import iteration_of, latest_problem, resolve_best

    paths, lost = [], 0
    for given in options.folders:
        given = resolve_best(given)
        single = iteration_of(given) is not None
        found = [given] if single else sorted(p for p in existing(given).iterdir() if iteration_of(p) is not None)
        if not found:
            raise CheckpointError(
                f'The folder "{given.absolute()}" contains no checkpoint',
                fix="Give the --save folder of a run, or one of its iter_… folders",
            )
        paths += found
        if not single and (problem := latest_problem(given)) is not None:
            lost += 1
            console.print("damaged", style="red", end=" ")
            console.print(problem)
    failures = [_verify_one(path, console) for path in paths].count(False)
    console.print(f"{len(paths) - failures} of {len(paths)} checkpoints are intact")
    return 1 if failures or lost else 0


def _verify_one(path: Path, console: Console) -> bool:
    from megatron_lite.checkpoint.verify import verify_checkpoint

    begun = time.monotonic()
    try:
        manifest = verify_checkpoint(path)
    except CheckpointError as error:
        console.print("damaged", style="red", end=" ")
        console.print(error.problem)
        return False
    rate = manifest.size / max(time.monotonic() - begun, 1e-9)
    console.print("intact ", style="green", end=" ")
    console.print(
        f"{path}: {format_count(len(manifest.files), 'file')}, {format_size(manifest.size)}, {format_size(rate)}/s"
    )
    return True


def _average(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.checkpoint.rewriting import average
    from megatron_lite.cli.folder_lock import holding

    with holding(options.output, "checkpoint average"), byte_progress("averaging") as progress:
        paths = [one_checkpoint(path) for path in options.folders]
        report = average(paths, options.output, file_size=file_size(options), progress=progress)
    _summarize(report, f"average of {', '.join(path.name for path in paths)}", console)
    return 0


def _reshard(options: argparse.Namespace, console: Console) -> int:
    from megatron_lite.checkpoint.rewriting import reshard
    from megatron_lite.cli.folder_lock import holding

    path, dtype = one_checkpoint(options.folder), options.dtype
    with holding(options.output, "checkpoint reshard"), byte_progress("rewriting") as progress:
        report = reshard(
            path,
            options.output,
            weights_only=options.weights_only,
            dtype=dtype,
            file_size=file_size(options),
            progress=progress,
        )
    content = "weights" if dtype or options.weights_only else "state"
    _summarize(report, f"{content} of {path}{f' in {dtype}' if dtype else ''}", console)
    return 0


def _summarize(report: SaveReport, content: str, console: Console) -> None:
    from megatron_lite.runs.manifest import read_manifest

    rate = report.size / max(report.seconds, 1e-9)
    files = [name for name in read_manifest(report.path).files if name.endswith(".distcp")]
    console.print(f"wrote {report.path}: {content}")
    console.print(
        f"{format_size(report.size)} in {format_count(len(files), 'file')}, {report.seconds:.1f} s, "
        f"{format_size(rate)}/s"
    )
    console.print(f"Load it with --load {report.path.parent}, in any layout")


def _parser() -> Parser:
    parser = Parser(prog="megatron-lite checkpoint", description=SUMMARY.capitalize() + ".")
    actions = parser.add_subparsers(dest="action", required=True, metavar="<action>")

    def action(name: str, text: str) -> Parser:
        return actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    listing = action("list", "show the complete checkpoints of --save folders")
    listing.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a folder that --save wrote")

    inspecting = action("inspect", "show the content of a checkpoint, also of Hugging Face, Megatron-LM and DeepSpeed")
    inspecting.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="iter_…, or a folder: its latest")
    inspecting.add_argument("--tensors", action="store_true", help="list every tensor")
    inspecting.add_argument("--config", action="store_true", help="print the full config as JSON")

    verifying = action("verify", "read every byte and compare it with the manifest's checksums")
    verifying.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="iter_…, or a folder: all in it")

    comparing = action("diff", "show the differences of two checkpoints, also of different kinds; exit code 1 if any")
    comparing.add_argument("first", type=Path, metavar="A", help="iter_…, or a folder: its latest")
    comparing.add_argument("second", type=Path, metavar="B", help="as A")
    comparing.add_argument("--values", action="store_true", help="compare the tensors' values as well")
    add_foreign_arguments(comparing)
    comparing.epilog = (
        "Flags of the model complete checkpoints of Megatron-LM and DeepSpeed that do not store them, as in "
        "`megatron-lite import`: --num-attention-heads 16 --vocab-size 50257 …"
    )

    averaging = action("average", "write a checkpoint with the mean of the weights of several")
    averaging.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="iter_…, or a folder: its latest")

    resharding = action("reshard", "rewrite a checkpoint in fewer files, without optimizer state or in another dtype")
    resharding.epilog = (
        "Not needed to change the layout: a run in any layout reads every checkpoint, each rank only its part. It "
        "serves to keep or move checkpoints that thousands of ranks wrote. Memory does not depend on the size; the new "
        "checkpoint appears under its name once it is complete."
    )
    resharding.add_argument("folder", type=Path, metavar="FOLDER", help="iter_…, or a folder: its latest")
    resharding.add_argument(
        "--weights-only",
        action="store_true",
        help="leave out the optimizer's state except fp32 main parameters, which are weights",
    )
    resharding.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="write the weights alone in this dtype, converted from the fp32 main parameters where these were saved",
    )
    for writing in (averaging, resharding):
        add_output_arguments(writing)
    return parser


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --output and --max-file-gb of a command that writes a checkpoint (see file_size)."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="the --save folder to write iter_… into"
    )
    parser.add_argument(
        "--max-file-gb",
        type=real(1e-9, 1e9),
        default=5.0,
        metavar="GB",
        help="maximum size of a file, unless a single record of up to 0.034 GB is larger (default: 5)",
    )


def file_size(options: argparse.Namespace) -> int:
    """Return the bytes of --max-file-gb."""
    return int(options.max_file_gb * 1e9)
