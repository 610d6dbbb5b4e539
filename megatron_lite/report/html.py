"""HTML elements of report pages: document, cards, tables, chart selector, and durations and dates as text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from html import escape
from pathlib import Path

from megatron_lite import __version__


def document(title: str, body: str) -> str:
    """Return a self-contained page: style and script are part of it."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_resource('page.css')}</style></head>"
        f"<body><main>{body}<footer>Written by megatron-lite {__version__} on {date(now())}</footer></main>"
        f"<script>{_resource('page.js')}</script></body></html>\n"
    )


@cache
def _resource(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def section(name: str, title: str, *content: str) -> str:
    """Return a section with a heading, or nothing if it has no content."""
    inner = "".join(content)
    return f"<section id='{name}'><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def cards(values: Iterable[tuple[str, str, str]]) -> str:
    """Return cards of key figures: label, value, and a note below the value."""
    entries = "".join(
        f"<div class='card'><dt>{escape(label)}</dt><dd>{escape(value)}"
        f"{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for label, value, note in values
        if value
    )
    return f"<dl class='cards'>{entries}</dl>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[int] = ()) -> str:
    """Return a table in a panel that scrolls sideways on narrow screens.

    Args:
        header: column titles.
        rows: cells, escaped unless they are Markup.
        numbers: columns aligned to the right.
    """

    def cell(tag: str, index: int, text: str) -> str:
        shown = text if isinstance(text, Markup) else escape(text)
        kind = " class='n'" if index in numbers else " class='text'" if tag == "td" and len(text) > 60 else ""
        return f"<{tag}{kind}>{shown}</{tag}>"

    lines = ["".join(cell("td", index, text) for index, text in enumerate(row)) for row in rows]
    if not lines:
        return ""
    head = "".join(cell("th", index, text) for index, text in enumerate(header))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    titles = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f"<div class='panel scroll'><table>{titles}<tbody>{body}</tbody></table></div>"


def details(summary: str, content: str) -> str:
    """Return content that is shown on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def choice(name: str, figures: Sequence[tuple[str, str]]) -> str:
    """Return figures of which one is shown, with a button for each; without script."""
    if len(figures) == 1:
        return figures[0][1]
    buttons = "".join(
        f"<input type='radio' name='{name}' id='{name}-{number}'{' checked' if not number else ''}>"
        f"<label for='{name}-{number}'>{escape(label)}</label>"
        for number, (label, _) in enumerate(figures)
    )
    return f"<div class='choice'>{buttons}{''.join(figure for _, figure in figures)}</div>"


def duration(seconds: float) -> str:
    """Return a duration with its two largest units.

    >>> duration(0.00025), duration(0.25), duration(125), duration(3725), duration(200_000), duration(float("nan"))
    ('0.25 ms', '0.25 s', '2 min 5 s', '1 h 2 min', '2 d 8 h', 'unknown')
    """
    if not math.isfinite(seconds):
        return "unknown"
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def percent(share: float) -> str:
    """Return a share in percent.

    >>> percent(0.4567), percent(0.0004), percent(float("nan"))
    ('45.7%', '0.04%', 'unknown')
    """
    if not math.isfinite(share):
        return "unknown"
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{100 * share:.2g}%"


def date(seconds: float) -> str:
    """Return a time as date and minute, UTC.

    >>> date(0)
    '1970-01-01 00:00 UTC'
    """
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def now() -> float:
    """Return the time in seconds since 1970."""
    return datetime.now(tz=timezone.utc).timestamp()
