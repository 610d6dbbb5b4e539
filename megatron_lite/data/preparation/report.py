"""Preprocessing statistics: counts of documents, tokens and rejected lines, per unit and in total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

KEPT_EXAMPLES = 20
"""Bad lines, and outliers of each kind, that are recorded; the others are counted."""

SHOWN = 5
"""Examples of each kind that are printed; the manifest has all recorded ones."""


@dataclass(frozen=True)
class Example:
    """Place of a bad line or an outlier, with its score and description."""

    line: int
    score: float
    what: str
    file: str = ""
    """Path of the document, if it is a file."""


@dataclass
class UnitReport:
    """Counts of one unit or the sum over units; line numbers are relative to the unit."""

    lines: int = 0
    """Lines and files read."""
    files: int = 0
    """Files of these, each one document."""
    ignored: int = 0
    """Files of folders and archives that are no .txt files."""
    blank: int = 0
    bad: int = 0
    not_sampled: int = 0
    documents: int = 0
    """Documents of the first key in the output."""
    empty: int = 0
    """Documents without tokens, of all keys."""
    too_few_chars: int = 0
    too_few_tokens: int = 0
    too_many_tokens: int = 0
    joined: int = 0
    """Documents appended to the document before (--join-short)."""
    short: int = 0
    """Documents below --min-tokens in spite of --join-short."""
    document_bytes: int = 0
    """UTF-8 bytes of the texts in the output, of all keys."""
    text_bytes: int = 0
    """Bytes of the lines read (after decompression)."""
    tokens: int = 0
    """Tokens in the output, of all keys, including end-of-document tokens."""
    unknown: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of bad lines by reason."""
    bad_lines: list[Example] = field(default_factory=list)
    longest: list[Example] = field(default_factory=list)
    repetitive: list[Example] = field(default_factory=list)
    with_unknown: list[Example] = field(default_factory=list)

    def reject(self, line: int, reason: str, file: str = "") -> None:
        """Count a bad line or file, and record the first KEPT_EXAMPLES."""
        self.bad += 1
        kind = reason.split(":")[0].split(" at ")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        if len(self.bad_lines) < KEPT_EXAMPLES:
            self.bad_lines.append(Example(line, 0.0, reason, file))

    def note(self, kind: str, example: Example) -> None:
        """Record an example if its score is among the highest of its kind."""
        kept: list[Example] = getattr(self, kind)
        limit = 1 if kind == "longest" else KEPT_EXAMPLES
        if len(kept) < limit or example.score > kept[-1].score:
            kept.append(example)
            kept.sort(key=lambda one: -one.score)
            del kept[limit:]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> UnitReport:
        """Return the report of a JSON object from `to_dict`."""
        examples = {kind: [Example(**one) for one in saved[kind]] for kind in EXAMPLE_KINDS}
        return cls(**{**saved, **examples})


COUNTS = tuple(item.name for item in fields(UnitReport) if item.type == "int")
EXAMPLE_KINDS = ("bad_lines", "longest", "repetitive", "with_unknown")


@dataclass
class Summary:
    """Sum of the reports of all units, with examples as `file:line`."""

    total: UnitReport = field(default_factory=UnitReport)
    places: dict[str, list[tuple[float, str, str]]] = field(
        default_factory=lambda: {kind: [] for kind in EXAMPLE_KINDS}
    )
    """(score, file:line, description) of each kind of example, highest score first."""
    empty_inputs: list[str] = field(default_factory=list)
    """Inputs without a line or file."""

    def add(self, report: UnitReport, path: str, lines_before: int) -> None:
        """Add the report of a unit of the file `path`, before which the file has `lines_before` lines."""
        for name in COUNTS:
            setattr(self.total, name, getattr(self.total, name) + getattr(report, name))
        for kind, count in report.reasons.items():
            self.total.reasons[kind] = self.total.reasons.get(kind, 0) + count
        for kind in EXAMPLE_KINDS:
            examples: list[Example] = getattr(report, kind)
            limit = 1 if kind == "longest" else KEPT_EXAMPLES
            kept = self.places[kind]
            kept.extend((one.score, one.file or f"{path}:{lines_before + one.line}", one.what) for one in examples)
            kept.sort(key=lambda one: -one[0])
            del kept[limit:]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON, for the manifest."""
        counts = {name: getattr(self.total, name) for name in COUNTS}
        examples = {kind: [f"{place} {what}" for _, place, what in self.places[kind]] for kind in EXAMPLE_KINDS}
        reasons = dict(sorted(self.total.reasons.items()))
        return {**counts, "reasons": reasons, **examples, "empty_inputs": self.empty_inputs}

    def text(self) -> str:
        """Return the summary as text: input, output, dropped documents, outliers."""
        total = self.total
        per_token = total.document_bytes / total.tokens if total.tokens else 0.0
        rows = [
            ("documents", f"{total.documents:,}"),
            ("tokens", f"{total.tokens:,}"),
            ("input", f"{self._read()} ({total.text_bytes / 1e6:,.1f} MB)"),
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

    def explain_empty(self) -> str:
        """Return the reasons why the output has no tokens."""
        lost = ", ".join(f"{name} {count:,}" for name, count in self._dropped().items())
        first = "".join(f"; {place} {what}" for _, place, what in self.places["bad_lines"][:1])
        return f"no tokens are left of {self._read()} of input" + (f" ({lost}{first})" if lost else "")

    def remedy_of_empty(self, keys: Sequence[str]) -> str:
        """Return what to do about the most frequent of these reasons."""
        lost = self._dropped()
        remedies = {
            "bad lines skipped": "Give --input files of JSON lines: an object on each line, strings in double quotes",
            "not in the sample": "Give a larger --sample-documents",
            "below --min-chars": "Lower --min-chars",
            "below --min-tokens": "Lower --min-tokens, or add --join-short",
            "files ignored": "Give --input a folder or an archive with .txt files; name files of other formats",
            "above --max-tokens": "Raise --max-tokens",
        }
        main = max(lost, key=lambda name: lost[name], default="")
        return remedies.get(main, f"Give --input files that have text under {' or '.join(keys)} (--json-keys)")

    def _read(self) -> str:
        """Return the number of lines and files read."""
        lines, files = self.total.lines - self.total.files, self.total.files
        read = [f"{count:,} {name}" for count, name in ((lines, "lines"), (files, "files")) if count]
        return " and ".join(read) or "0 lines"

    def _dropped(self) -> dict[str, int]:
        """Return the counts of dropped or altered documents that are not zero."""
        total = self.total
        counts = {
            "empty inputs": len(self.empty_inputs),
            "files ignored": total.ignored,
            "bad lines skipped": total.bad,
            "blank lines": total.blank,
            "empty documents": total.empty,
            "not in the sample": total.not_sampled,
            "below --min-chars": total.too_few_chars,
            "below --min-tokens": total.too_few_tokens,
            "above --max-tokens": total.too_many_tokens,
            "joined": total.joined,
            "still short": total.short,
            "unknown tokens": total.unknown,
        }
        return {name: count for name, count in counts.items() if count}
