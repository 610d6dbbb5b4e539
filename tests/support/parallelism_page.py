"""Generator of the table of layouts in docs/parallelism.md.

PYTHONPATH=tests python tests/support/parallelism_page.py: run every layout and rewrite the table in the page.
"""

import sys
import tempfile
import time
from pathlib import Path

from support.layout_matrix import CELLS, LIMITS, deviation, put_together, run_cell, within
from support.ranks import RankPools

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- matrix: made by tests/support/parallelism_page.py -->\n", "<!-- end of matrix -->\n"
HEAD = (
    "world",
    "tp",
    "cp",
    "pp",
    "dp",
    "schedule",
    "chunks",
    "seq. par.",
    "ZeRO-1",
    "recompute",
    "model",
    "dropout",
    "type",
)
NUMBERS = ("same as", "loss", "grad norm", "parameters")


def layout_words(cell):
    """Return the columns that describe the layout of a cell."""
    sizes = [str(size) for size in (cell.world, cell.tp, cell.cp, cell.pp, cell.dp)]
    schedule = cell.schedule if cell.pp > 1 or cell.schedule != "1f1b" else ""
    chunks = {"zb-v": "2"}.get(cell.schedule, str(cell.chunks) if cell.layers_per_chunk else "")
    flags = ["yes" if on else "" for on in (cell.sequence_parallel, cell.zero1)]
    model = cell.model + (f", first stage {cell.first_layers} layers" if cell.first_layers else "")
    model += ", document mask" if cell.documents else ""
    model += f", {cell.exchange}" if cell.cp > 1 else ""
    return (*sizes, schedule, chunks, *flags, cell.recompute, model, cell.dropout, cell.dtype)


def table(rows):
    """Return an aligned Markdown table of (cell, deviation) pairs."""
    lines = [(*HEAD, *NUMBERS)]
    for cell, found in rows:
        alone = cell.reference()
        axes = [f"{axis} {size}" for axis, size in (("tp", alone.tp), ("cp", alone.cp)) if size > 1]
        reference = f"{' x '.join(axes)} alone" if axes else "one process"
        numbers = [f"{number:.0e}" if number else "0" for number in (found.loss, found.norm, found.parameters)]
        lines.append((*layout_words(cell), reference, *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    text = (" | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"| {line} |\n" for line in text)


def run_all(on_ranks):
    """Run every cell; return pairs of cell and deviation from its reference."""
    references, rows = {}, []
    for cell in CELLS:
        started = time.perf_counter()
        for wanted in (cell.reference(), cell):
            if wanted not in references:
                references[wanted] = put_together(on_ranks(wanted.world, run_cell, wanted))
        found = deviation(references[cell], references[cell.reference()])
        rows.append((cell, found))
        result = "same" if within(found, LIMITS[cell.dtype]) else "DIFFERS"
        print(f"{time.perf_counter() - started:6.1f} s  {result}  {cell}", flush=True)
    return rows


def main():
    """Run the matrix and rewrite the table; return 1 if a layout deviates."""
    with tempfile.TemporaryDirectory() as folder:
        pools = RankPools(lambda: Path(tempfile.mkdtemp(dir=folder)))
        rows = run_all(pools)
        pools.close()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.split(END)[1], encoding="utf-8")
    print(table(rows))
    return int(not all(within(found, LIMITS[cell.dtype]) for cell, found in rows))


if __name__ == "__main__":
    sys.exit(main())
