"""Rendering of a simulated pipeline schedule as a text grid or an image file."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.schedules.simulate import Span, Timeline
from megatron_lite.system_errors import reason, remedy

MAX_COLUMNS = 2000
_COLOURS = {"F": "#5b8ff9", "B": "#f6bd16", "W": "#61c8a6"}
_NAMES = {"F": "forward", "B": "backward", "W": "weight gradient"}


def text_grid(timeline: Timeline) -> str:
    """Return a grid with a row per rank and a column per duration of the shortest action.

    Dots are idle time, `=` continues the action before. There are at most MAX_COLUMNS columns, plus one for each action
    shorter than a column. Stages are shown only if ranks hold more than one.
    """
    labels = [[_label(span, timeline) for span in spans] for spans in timeline.ranks]
    width = max((len(label) for row in labels for label in row), default=1)
    unit = min((span.end - span.start for spans in timeline.ranks for span in spans), default=1.0)
    unit = max(unit, timeline.makespan / MAX_COLUMNS)
    rows: list[list[str]] = []
    for spans, row in zip(timeline.ranks, labels, strict=True):
        cells: list[str] = []
        for span, label in zip(spans, row, strict=True):
            # Times are rounded to columns; every action keeps at least one.
            cells += ["." * width] * (round(span.start / unit) - len(cells))
            cells += [label.ljust(width)] + ["=" * width] * (round(span.end / unit) - len(cells) - 1)
        rows.append(cells)
    columns, digits = max(map(len, rows)), len(str(len(rows) - 1))
    padded = [cells + ["." * width] * (columns - len(cells)) for cells in rows]
    return "\n".join(f"rank {rank:>{digits}} | {' '.join(cells)} |" for rank, cells in enumerate(padded))


def save_picture(timeline: Timeline, path: Path, title: str) -> None:
    """Draw the timeline, one row per rank, into an image file whose type is the suffix of `path`.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ConfigError(
            "Cannot draw the schedule: matplotlib is not installed",
            fix=f"{install_extra('plot')}, or remove --png",
        ) from error
    num_ranks = len(timeline.ranks)
    figure = Figure(figsize=(min(60.0, 2 + timeline.makespan * 0.35), 1.6 + num_ranks * 0.45), layout="constrained")
    axes = figure.subplots()
    for rank, spans in enumerate(timeline.ranks):
        stages = sorted({span.action.stage for span in spans})
        for span in spans:
            # Later chunks are drawn lighter.
            alpha = 1.0 - 0.5 * stages.index(span.action.stage) / max(1, len(stages) - 1)
            colour = _COLOURS[span.action.kind]
            axes.barh(rank, span.end - span.start, 0.9, span.start, color=colour, alpha=alpha, edgecolor="white")
            axes.text((span.start + span.end) / 2, rank, _label(span, timeline), ha="center", va="center", fontsize=7)
    kinds = [kind for kind in _NAMES if any(span.action.kind == kind for spans in timeline.ranks for span in spans)]
    figure.legend(
        [Patch(color=_COLOURS[kind]) for kind in kinds],
        [_NAMES[kind] for kind in kinds],
        ncols=3,
        loc="outside lower center",
    )
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.set_xlim(0, timeline.makespan or 1)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Cannot write the image --png {path}: {reason(error)}",
            fix=remedy(error, path, instead="give another path with --png", writing=True)
            if isinstance(error, OSError)
            else "Give --png a path that ends in .png, .svg or .pdf",
        ) from error


def _label(span: Span, timeline: Timeline) -> str:
    several = any(span.action.stage >= len(timeline.ranks) for spans in timeline.ranks for span in spans)
    return str(span.action) if several else f"{span.action.kind}{span.action.microbatch}"
