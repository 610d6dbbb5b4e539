"""Preprocessing statistics: document, token and rejection counts, summed over units."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

KEPT_EXAMPLES = 20
"""Bad lines, and outliers of each kind, that are named; the others are counted."""

SHOWN = 5
"""Examples of each kind that are printed; the manifest has all that were kept."""


@dataclass(frozen=True)
class Example:
    """A line worth looking at: how extreme it is, and what about it."""

    line: int
    score: float
    what: str


@dataclass
class Report:
    """Counts of one unit, or of all of them. Line numbers are the unit's own until `locate` makes them the file's."""

    lines: int = 0
    blank: int = 0
    bad: int = 0
    not_sampled: int = 0
    documents: int = 0
    """Documents in the output, of the first key."""
    empty: int = 0
    """Documents without tokens, over all keys."""
    too_few_chars: int = 0
    too_few_tokens: int = 0
    too_many_tokens: int = 0
    document_bytes: int = 0
    """Bytes of the texts in the output, over all keys."""
    text_bytes: int = 0
    """Bytes of the lines that were read (unpacked)."""
    tokens: int = 0
    """Tokens in the output, over all keys, ends of documents included."""
    unknown: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Kinds of bad lines."""
    bad_lines: list[Example] = field(default_factory=list)
    longest: list[Example] = field(default_factory=list)
    repetitive: list[Example] = field(default_factory=list)
    with_unknown: list[Example] = field(default_factory=list)

    def reject(self, line: int, reason: str) -> None:
        """Count a bad line, and remember the first few."""
        self.bad += 1
        kind = reason.split(":")[0].split(" at ")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        if len(self.bad_lines) < KEPT_EXAMPLES:
            self.bad_lines.append(Example(line, 0.0, reason))

    def note(self, kind: str, example: Example) -> None:
        """Remember an example if it is among the most extreme of its kind (high scores are)."""
        kept: list[Example] = getattr(self, kind)
        limit = 1 if kind == "longest" else KEPT_EXAMPLES
        if len(kept) < limit or example.score > kept[-1].score:
            kept.append(example)
            kept.sort(key=lambda one: -one.score)
            del kept[limit:]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Report:
        """From `to_dict`'s JSON."""
        examples = {kind: [Example(**one) for one in saved[kind]] for kind in EXAMPLE_KINDS}
        return cls(**{**saved, **examples})


COUNTS = tuple(item.name for item in fields(Report) if item.type == "int")
EXAMPLE_KINDS = ("bad_lines", "longest", "repetitive", "with_unknown")


@dataclass
class Summary:
    """All units' reports as one, with examples as `file:line`."""

    total: Report = field(default_factory=Report)
    places: dict[str, list[tuple[float, str, str]]] = field(
        default_factory=lambda: {kind: [] for kind in EXAMPLE_KINDS}
    )
    """For each kind of example: (score, file:line, what), the most extreme first."""
    empty_inputs: list[str] = field(default_factory=list)
    """Files without a line."""

    def add(self, report: Report, path: str, lines_before: int) -> None:
        """Add a unit of the file `path` that `lines_before` of its lines precede."""
        for name in COUNTS:
            setattr(self.total, name, getattr(self.total, name) + getattr(report, name))
        for kind, count in report.reasons.items():
            self.total.reasons[kind] = self.total.reasons.get(kind, 0) + count
        for kind in EXAMPLE_KINDS:
            examples: list[Example] = getattr(report, kind)
            limit = 1 if kind == "longest" else KEPT_EXAMPLES
            place = self.places[kind]
            place.extend((one.score, f"{path}:{lines_before + one.line}", one.what) for one in examples)
            place.sort(key=lambda one: -one[0])
            del place[limit:]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the manifest."""
        counts = {name: getattr(self.total, name) for name in COUNTS}
        examples = {kind: [f"{place} {what}" for _, place, what in self.places[kind]] for kind in EXAMPLE_KINDS}
        reasons = dict(sorted(self.total.reasons.items()))
        return {**counts, "reasons": reasons, **examples, "empty_inputs": self.empty_inputs}

    def text(self) -> str:
        """For people: what went in, what came out, and what is odd."""
        total = self.total
        per_token = total.document_bytes / total.tokens if total.tokens else 0.0
        rows = [
            ("documents", f"{total.documents:,}"),
            ("tokens", f"{total.tokens:,}"),
            ("input lines", f"{total.lines:,} ({total.text_bytes / 1e6:,.1f} MB)"),
            ("bytes per token", f"{per_token:.2f}"),
        ]
        rows += [(name, f"{count:,}") for name, count in self._dropped().items()]
        text = [f"  {name:<18} {value}" for name, value in rows]
        text += [f"  {'empty input':<18} {path}" for path in self.empty_inputs[:SHOWN]]
        titles = {
            "longest": "longest document",
            "bad_lines": "bad lines",
            "with_unknown": "many unknown tokens",
            "repetitive": "repetitive",
        }
        for kind, title in titles.items():
            places = self.places[kind]
            text += [f"  {title:<18} {place} {what}" for _, place, what in places[:SHOWN]]
            hidden = (total.bad if kind == "bad_lines" else len(places)) - len(places[:SHOWN])
            if hidden > 0:
                text.append(f"  {'':<18} and {hidden:,} more")
        return "\n".join(text)

    def why_nothing(self) -> str:
        """Where all the lines went, of a run that has nothing to show for them."""
        lost = ", ".join(f"{name} {count:,}" for name, count in self._dropped().items())
        first = "".join(f"; {place} {what}" for _, place, what in self.places["bad_lines"][:1])
        return f"nothing is left of {self.total.lines:,} lines of input" + (f": {lost}{first}" if lost else "")

    def _dropped(self) -> dict[str, int]:
        """What is not in the output as it was in the input, if there is any."""
        total = self.total
        counts = {
            "empty inputs": len(self.empty_inputs),
            "bad lines skipped": total.bad,
            "blank lines": total.blank,
            "empty documents": total.empty,
            "not in the sample": total.not_sampled,
            "below --min-chars": total.too_few_chars,
            "below --min-tokens": total.too_few_tokens,
            "above --max-tokens": total.too_many_tokens,
            "unknown tokens": total.unknown,
        }
        return {name: count for name, count in counts.items() if count}
