"""CLI command `report`: HTML report of a run, or comparison of several."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.cli.parser import Parser, file_path
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_size

SUMMARY = "write an HTML report of a run, or a comparison of several runs"
_TEXT = (
    "Writes one self-contained HTML file: key figures, loss and other curves with spikes, restarts and rollbacks, "
    "speed, time by part and goodput, checkpoints, evaluations, configuration. With several runs: curves over tokens, "
    "samples and iterations, and the settings in which they differ. A job may be training meanwhile."
)
REPORT_NAME, COMPARISON_NAME = "report.html", "comparison.html"
MAX_RUNS = 8
"""Runs in a comparison: as many as there are colours."""


def run(argv: list[str]) -> int:
    """Write the report and print its path."""
    parser = Parser(prog="megatron-lite report", description=_TEXT)
    parser.add_argument(
        "runs",
        nargs="*",
        type=file_path,
        metavar="RUN",
        help="--save folder of a run, or its metrics.jsonl (default: here)",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="FILE",
        help=f"default: RUN/{REPORT_NAME}; for several runs: {COMPARISON_NAME} in the current folder",
    )
    options = parser.parse_args(argv)
    runs: list[Path] = options.runs or [Path()]
    if len(runs) > MAX_RUNS:
        raise ConfigError(
            f"Cannot compare {len(runs)} runs in one report; at most {MAX_RUNS} have distinct colours",
            fix=f"Give at most {MAX_RUNS} runs, or write several reports with --output",
        )

    from megatron_lite.cli.output_file import write_output
    from megatron_lite.report.comparison import comparison_page, same_runs
    from megatron_lite.report.page import run_page
    from megatron_lite.report.run_log import read_run

    logs = [read_run(path) for path in runs]
    for note in same_runs(logs):
        print(f"note: {note}")
    page = run_page(logs[0]) if len(logs) == 1 else comparison_page(logs)
    path = options.output or (logs[0].folder / REPORT_NAME if len(logs) == 1 else Path(COMPARISON_NAME))
    write_output(path, page, "--output")
    print(f"report written to {path} ({format_size(len(page.encode()))})")
    return 0
