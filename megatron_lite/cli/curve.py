"""CLI command `curve`: loss curve of a run in the terminal or as an SVG file."""

from __future__ import annotations

import shutil
import sys

from megatron_lite.cli.output_file import write_output
from megatron_lite.cli.parser import Parser, file_path, whole
from megatron_lite.errors import ConfigError

SUMMARY = "draw a run's loss curve from its metrics.jsonl, in the terminal and as an SVG file"


def run(argv: list[str]) -> int:
    """Draw the loss curve."""
    parser = Parser(prog="megatron-lite curve", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    parser.add_argument("metrics", type=file_path, help="a run's metrics.jsonl, or the folder that holds it")
    parser.add_argument("--svg", type=file_path, metavar="FILE", help="write the picture to this file as well")
    parser.add_argument("--title", default="", help="title of the picture (default: the model's size)")
    parser.add_argument(
        "--width", type=whole(0, 10_000), default=0, help="columns of the terminal drawing (default: the terminal's)"
    )
    parser.add_argument("--no-terminal", action="store_true", help="draw nothing in the terminal")
    options = parser.parse_args(argv)

    from megatron_lite.metrics.curve import read_curve
    from megatron_lite.metrics.curve_svg import draw_svg
    from megatron_lite.metrics.curve_terminal import draw_terminal

    path = options.metrics / "metrics.jsonl" if options.metrics.is_dir() else options.metrics
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"Cannot read a loss curve from {path}, which is a pipe or a device",
            fix="Give the metrics.jsonl of a run",
        )
    curve = read_curve(path, options.title)
    if not options.no_terminal:
        width = options.width or min(120, shutil.get_terminal_size().columns)
        print(draw_terminal(curve, width, unicode=has_braille(sys.stdout.encoding)), end="")
    if options.svg:
        write_output(options.svg, draw_svg(curve), "--svg")
        print(f"loss curve written to {options.svg}")
    return 0


def has_braille(encoding: str | None) -> bool:
    """Return whether an output encoding has the characters of the drawing."""
    try:
        "⠒●│└─".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
