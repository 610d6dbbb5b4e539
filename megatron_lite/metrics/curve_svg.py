"""SVG drawing of a loss curve, without a plotting library."""

from __future__ import annotations

from html import escape

from megatron_lite.metrics.curve import Axis, LossCurve, Points, final_loss, make_axis, smooth, thin

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 72, 64
TRAIN_COLOUR = "#2563eb"
# Colours that remain distinguishable with colour-vision deficiency (Okabe and Ito 2008).
VALIDATION_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def draw_svg(curve: LossCurve) -> str:
    """Return the SVG text: training loss per iteration, its moving average, and validation losses with markers."""
    points = [point for series in curve.series for point in series]
    across = make_axis([x for x, _ in points], 8, whole=True)
    up = make_axis([y for _, y in points], 6)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' "
        f"role='img' aria-label='{escape(curve.title, quote=True)}' {FONT}>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#ffffff'/>",
        f"<text x='{LEFT}' y='32' font-size='19' font-weight='600' fill='#111827'>{escape(curve.title)}</text>",
        *_axes(across, up, curve.quantity),
    ]
    legend: list[tuple[str, str]] = []
    if curve.train:
        parts += _train(curve.train, across, up)
        legend.append((f"train {final_loss(curve.train):.4f}", TRAIN_COLOUR))
    for number, (name, series) in enumerate(curve.validation.items()):
        colour = VALIDATION_COLOURS[number % len(VALIDATION_COLOURS)]
        parts += _validation(series, across, up, colour)
        legend.append((f"{name} {series[-1][1]:.4f}", colour))
    parts += _legend(legend)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _place(x: float, y: float, across: Axis, up: Axis) -> tuple[float, float]:
    return (
        LEFT + across.share(x) * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - up.share(y) * (HEIGHT - TOP - BOTTOM),
    )


def _axes(across: Axis, up: Axis, quantity: str) -> list[str]:
    parts = []
    for tick in up.ticks:
        _, y = _place(across.low, tick, across, up)
        parts.append(f"<line x1='{LEFT}' y1='{y:.1f}' x2='{WIDTH - RIGHT}' y2='{y:.1f}' stroke='#e5e7eb'/>")
        parts.append(
            f"<text x='{LEFT - 10}' y='{y + 4.5:.1f}' font-size='13' fill='#4b5563' text-anchor='end'>"
            f"{up.label(tick)}</text>"
        )
    floor = HEIGHT - BOTTOM
    for tick in across.ticks:
        x, _ = _place(tick, up.low, across, up)
        parts.append(f"<line x1='{x:.1f}' y1='{floor}' x2='{x:.1f}' y2='{floor + 5}' stroke='#6b7280'/>")
        parts.append(
            f"<text x='{x:.1f}' y='{floor + 22}' font-size='13' fill='#4b5563' text-anchor='middle'>"
            f"{across.label(tick)}</text>"
        )
    parts.append(f"<line x1='{LEFT}' y1='{floor}' x2='{WIDTH - RIGHT}' y2='{floor}' stroke='#6b7280'/>")
    middle = TOP + (floor - TOP) / 2
    parts.append(
        f"<text x='{(LEFT + WIDTH - RIGHT) / 2:.1f}' y='{HEIGHT - 16}' font-size='14' fill='#374151' "
        "text-anchor='middle'>iteration</text>"
    )
    parts.append(
        f"<text transform='translate(22 {middle:.1f}) rotate(-90)' font-size='14' fill='#374151' "
        f"text-anchor='middle'>{escape(quantity)}</text>"
    )
    return parts


def _train(points: Points, across: Axis, up: Axis) -> list[str]:
    raw, averaged = thin(points, 2 * WIDTH), thin(smooth(points), WIDTH)
    if len(points) == 1:
        return [_marker(*_place(*points[0], across, up), TRAIN_COLOUR)]
    return [
        f"<polyline points='{_path(raw, across, up)}' fill='none' stroke='{TRAIN_COLOUR}' stroke-opacity='0.28' "
        "stroke-width='1'/>",
        f"<polyline points='{_path(averaged, across, up)}' fill='none' stroke='{TRAIN_COLOUR}' stroke-width='2.2' "
        "stroke-linejoin='round'/>",
    ]


def _validation(points: Points, across: Axis, up: Axis, colour: str) -> list[str]:
    shown = thin(points, WIDTH)
    line = (
        f"<polyline points='{_path(shown, across, up)}' fill='none' stroke='{colour}' stroke-width='2' "
        "stroke-dasharray='6 4'/>"
    )
    # More markers would hide the training loss.
    marked = shown if len(shown) <= 60 else shown[-1:]
    return [line, *(_marker(*_place(*point, across, up), colour) for point in marked)]


def _marker(x: float, y: float, colour: str) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{colour}' stroke='#ffffff' stroke-width='1.5'/>"


def _legend(entries: list[tuple[str, str]]) -> list[str]:
    parts, x = [], float(LEFT)
    for text, colour in entries:
        parts.append(f"<rect x='{x:.1f}' y='47' width='14' height='4' rx='2' fill='{colour}'/>")
        parts.append(f"<text x='{x + 20:.1f}' y='54' font-size='14' fill='#374151'>{escape(text)}</text>")
        x += 48 + 7.6 * len(text)
    return parts


def _path(points: Points, across: Axis, up: Axis) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(*point, across, up) for point in points))
