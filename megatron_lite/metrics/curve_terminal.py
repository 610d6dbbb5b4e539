"""Terminal drawing of a loss curve with braille dots or ASCII letters."""

from __future__ import annotations

from megatron_lite.metrics.curve import Axis, LossCurve, Points, final_loss, make_axis, smooth

# Unicode's braille patterns: bit by (row, column) of the 4 x 2 dots of one cell.
BRAILLE_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BRAILLE_BASE = 0x2800
VALIDATION_MARKS = "●◆▲■★"
VALIDATION_LETTERS = "oxv#%"


def draw_terminal(curve: LossCurve, width: int = 80, height: int = 18, *, unicode: bool = True) -> str:
    """Return the drawing: `height` rows of at most `width` characters, plus axis and legend lines.

    Args:
        curve: loss curve; the training loss is drawn as a moving average.
        width: columns of the terminal.
        height: rows of the plot.
        unicode: False for encodings without braille, such as ASCII.
    """
    points = [point for series in curve.series for point in series]
    up = make_axis([y for _, y in points], max(2, height // 3))
    labels = [up.label(tick) for tick in up.ticks]
    margin = max(len(label) for label in labels) + 2
    columns = max(16, width - margin)
    across = make_axis([x for x, _ in points], max(2, columns // 14), whole=True)

    rows = _line(smooth(curve.train), across, up, columns, height, unicode)
    marks = VALIDATION_MARKS if unicode else VALIDATION_LETTERS
    legend = [f"{_train_sign(unicode)} train {final_loss(curve.train):.4f}"] if curve.train else []
    for number, (name, series) in enumerate(curve.validation.items()):
        mark = marks[number % len(marks)]
        for x, y in series:
            column, row = _cell(x, y, across, up, columns, height)
            rows[row][column] = mark
        legend.append(f"{mark} {name} {series[-1][1]:.4f}")

    at_row = {height - 1 - round(up.share(tick) * (height - 1)): up.label(tick) for tick in up.ticks}
    bar, corner, floor = ("│", "└", "─") if unicode else ("|", "+", "-")
    lines = [curve.title, "   ".join(legend)]
    lines += [f"{at_row.get(number, ''):>{margin - 2}} {bar}{''.join(row)}".rstrip() for number, row in enumerate(rows)]
    lines.append(" " * (margin - 1) + corner + floor * columns)
    lines.append(" " * margin + _labels_below(across, columns))
    return "\n".join(lines) + "\n"


def _train_sign(unicode: bool) -> str:
    return "⠒" if unicode else "."


def _cell(x: float, y: float, across: Axis, up: Axis, columns: int, height: int) -> tuple[int, int]:
    return round(across.share(x) * (columns - 1)), height - 1 - round(up.share(y) * (height - 1))


def _line(points: Points, across: Axis, up: Axis, columns: int, height: int, unicode: bool) -> list[list[str]]:
    """Return a character grid with the points joined by a line."""
    fine_columns, fine_height = (2 * columns, 4 * height) if unicode else (columns, height)
    dots: set[tuple[int, int]] = set()
    previous: tuple[int, int] | None = None
    for x, y in points:
        here = _cell(x, y, across, up, fine_columns, fine_height)
        dots.update(_between(previous or here, here))
        previous = here
    if not unicode:
        return [["." if (column, row) in dots else " " for column in range(columns)] for row in range(height)]
    cells = [[0] * columns for _ in range(height)]
    for column, row in dots:
        cells[row // 4][column // 2] |= BRAILLE_BITS[row % 4][column % 2]
    return [[chr(BRAILLE_BASE + bits) if bits else " " for bits in row] for row in cells]


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * step / steps), round(start[1] + (end[1] - start[1]) * step / steps))
        for step in range(steps + 1)
    ]


def _labels_below(across: Axis, columns: int) -> str:
    """Return tick numbers centred under their columns without overlap, and the axis name if there is room."""
    text = ""
    for tick in across.ticks:
        label = across.label(tick)
        start = min(columns - len(label), max(0, round(across.share(tick) * (columns - 1)) - len(label) // 2))
        if not text or start > len(text):
            text = text.ljust(start) + label
    return text + "  iteration" if len(text) + 11 <= columns else text
