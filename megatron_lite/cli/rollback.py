"""CLI command `rollback`: resets a run to an earlier checkpoint, with its metrics."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import Parser, whole
from megatron_lite.config.values import read_int, shortened
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.system_errors import reason, remedy

if TYPE_CHECKING:
    from megatron_lite.runs.rollback import RollbackReport

SUMMARY = "reset a run to an earlier checkpoint, skipping samples from there"
_TEXT = (
    "Makes an earlier checkpoint the latest, so that the same command resumes from there. Later checkpoints are moved "
    "to a folder rolled-back-…, metrics.jsonl and TensorBoard's files are truncated; nothing is deleted."
)


def run(argv: list[str]) -> int:
    """Roll back and print what was done."""
    options = _parser().parse_args(argv)

    from megatron_lite.cli.folder_lock import holding
    from megatron_lite.runs.rollback import roll_back

    root: Path = options.folder
    try:
        with holding(root, "rollback") if root.is_dir() else nullcontext():
            report = roll_back(root, options.to, options.skip_samples)
            print(f"the latest checkpoint of {root} is {report.checkpoint.name}")
            if report.moved:
                print(f"moved {', '.join(report.moved)} to {report.aside}")
            if report.skipped:
                ranges = ", ".join(f"{first}-{end - 1}" for first, end in report.skipped)
                print(f"samples skipped from here on: {ranges}")
            for line in _rewind(options, report):
                print(line)
    except OSError as error:
        raise CheckpointError(
            f"The rollback is not complete, because {error.filename or root} cannot be changed: {reason(error)}",
            fix=f"{remedy(error, root, writing=True)}; then give the same command again to complete it",
        ) from error
    return 0


def _rewind(options: argparse.Namespace, report: RollbackReport) -> list[str]:
    from megatron_lite.metrics.rewind import rewind
    from megatron_lite.runs.manifest import read_manifest

    settings = read_manifest(report.checkpoint).provenance.config.get("metrics", {})
    metrics = options.metrics_file or settings.get("metrics_file") or options.folder / "metrics.jsonl"
    return rewind(Path(metrics), options.to, report.aside, options.tensorboard_dir)


def _range(text: str) -> tuple[int, int]:
    """Parse "a-b" (both skipped, as in the log) to [a, b + 1)."""
    first, dash, last = text.partition("-")
    try:
        begin, end = read_int(first), read_int(last if dash else first) + 1
    except ValueError:
        begin, end = 0, 0
    if begin >= end:
        raise ConfigError(
            f"--skip-samples {shortened(text)} is not a range of samples",
            fix="Give the first and the last sample to skip, for example --skip-samples 1024-2047: the warning of the "
            "loss spike in "
            "the log states them",
        )
    return begin, end


def _parser() -> Parser:
    parser = Parser(prog="megatron-lite rollback", description=_TEXT)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="the run's --save (default: here)")
    parser.add_argument(
        "--to", type=whole(1), required=True, metavar="N", help="iteration of the checkpoint to return to"
    )
    parser.add_argument("--skip-samples", type=_range, metavar="A-B", help="samples to skip, both ends included")
    parser.add_argument("--metrics-file", type=Path, metavar="FILE", help="default: the run's")
    parser.add_argument("--tensorboard-dir", metavar="FOLDER", help="default: the run's")
    return parser
