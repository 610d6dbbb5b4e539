"""Bash word expansion: parameters, arrays, arithmetic, quotes, braces and globs, on the syntax tree of shfmt.

The tree is the JSON that `shfmt --to-json` prints (https://pkg.go.dev/mvdan.cc/sh/v3/syntax names its nodes).
A value that exists in the running job only, as the output of `scontrol`, is replaced by a marker with the name of its
source (`unknown_text`), so that a caller sees which argument depends on it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from megatron_lite.ops.shell.text import (
    UnknownValueError,
    brace_choices,
    decode_ansi,
    operate,
    replace_pattern,
    trim,
    unknown_sources,
    unknown_text,
)

Node = Mapping[str, Any]
Value = str | dict[str, str]
"""A variable's value: text, or an array by index (or by key, for an associative one)."""


@dataclass
class Variables:
    """Variables of a shell.

    Attributes:
        values: by name.
        exported: names that child processes inherit.
        associative: names of associative arrays.
        arguments: positional parameters, from $1.
        missing: names that were expanded without having a value, and the first line in which.
        nullglob: a glob without a match is removed, instead of being kept as it is.
        line: of the statement that is evaluated.
    """

    values: dict[str, Value] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    associative: set[str] = field(default_factory=set)
    arguments: list[str] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)
    nullglob: bool = False
    line: int = 0

    def text(self, name: str) -> str | None:
        """Return a variable's text (of an array: element 0), or None if it is not set."""
        value = self.values.get(name)
        return value.get("0") if isinstance(value, dict) else value


@dataclass(frozen=True)
class Segment:
    """A part of a word; the `items` of "$@" become separate fields."""

    text: str
    quoted: bool
    split: bool = False
    items: tuple[str, ...] | None = None


class WordExpander:
    """Expands words as bash does.

    Args:
        variables: read, and changed by `${x:=…}` and assignments within arithmetic.
        substitute: returns the output of a command substitution's statements.
        parse_arithmetic: returns the tree of an arithmetic expression's text.
    """

    def __init__(
        self, variables: Variables, substitute: Callable[[Node], str], parse_arithmetic: Callable[[str], Node]
    ) -> None:
        self.variables = variables
        self._substitute = substitute
        self._parse_arithmetic = parse_arithmetic

    def fields(self, word: Node) -> list[str]:
        """Return the fields to which a word of the script expands."""
        fields: list[str] = []
        for braced in _braces(word.get("Parts", [])):
            fields += self._split([segment for part in braced for segment in self._segments(part, False)])
        return fields

    def text(self, word: Node | None) -> str:
        """Return a word's text without splitting, as in an assignment or within double quotes."""
        return "".join(_joined(segment) for segment in self._all(word))

    def heredoc(self, word: Node, quoted: bool) -> str:
        """Return the text of a here-document's body; `quoted`: its delimiter is quoted, so nothing is expanded."""
        parts = word.get("Parts", [])
        if quoted:
            return "".join(part["Value"] for part in parts)
        return "".join(_joined(segment) for part in parts for segment in self._segments(part, True))

    def pattern(self, word: Node | None) -> str:
        """Return a word as a glob pattern, in which quoted parts match themselves."""
        return "".join(glob.escape(_joined(segment)) if segment.quoted else segment.text for segment in self._all(word))

    def _all(self, word: Node | None) -> Iterator[Segment]:
        for part in (word or {}).get("Parts", []):
            yield from self._segments(part, False)

    def _split(self, segments: list[Segment]) -> list[str]:
        """Join segments to fields: split unquoted expansions at white space, then expand globs."""
        fields: list[list[tuple[str, bool]]] = []
        open_field: list[tuple[str, bool]] | None = None
        for segment in segments:
            if segment.items is not None:
                for place, item in enumerate(segment.items):
                    if place and open_field is not None:
                        fields.append(open_field)
                        open_field = None
                    open_field = [*(open_field or []), (item, True)]
            elif segment.split:
                pieces = re.split(r"[ \t\n]+", segment.text)
                for place, piece in enumerate(pieces):
                    if place and open_field is not None:
                        fields.append(open_field)
                        open_field = None
                    if piece:
                        open_field = [*(open_field or []), (piece, False)]
            elif segment.text or segment.quoted:
                open_field = [*(open_field or []), (segment.text, segment.quoted)]
        if open_field is not None:
            fields.append(open_field)
        return [text for parts in fields for text in self._globbed(parts)]

    def _globbed(self, parts: list[tuple[str, bool]]) -> list[str]:
        text = "".join(piece for piece, _ in parts)
        if any(not quoted and re.search(r"[*?]|\[.+\]", piece) for piece, quoted in parts):
            pattern = "".join(glob.escape(piece) if quoted else piece for piece, quoted in parts)
            folder = self.variables.text("PWD") or "."
            found = sorted(glob.glob(pattern, root_dir=folder))  # noqa: PTH207 (a pattern may be absolute)
            return found or ([] if self.variables.nullglob else [text])
        return [text]

    def _segments(self, part: Node, quoted: bool) -> Iterator[Segment]:
        kind = part["Type"]
        if kind == "Lit":
            text = part["Value"].replace("\\\n", "")
            if not quoted and text.startswith("~") and text[1:2] in ("", "/"):
                text = (self.variables.text("HOME") or "~") + text[1:]
            yield from _literal(text, quoted)
        elif kind == "SglQuoted":
            text = part.get("Value", "")
            yield Segment(decode_ansi(text) if part.get("Dollar") else text, True)
        elif kind == "DblQuoted":
            inner = part.get("Parts", [])
            yield from (segment for piece in inner for segment in self._segments(piece, True))
            if not inner:
                yield Segment("", True)
        elif kind == "ParamExp":
            value = self.parameter(part)
            if isinstance(value, list) and quoted and _index(part) != "*":
                yield Segment("", True, items=tuple(value))
            else:
                yield Segment(" ".join(value) if isinstance(value, list) else value, quoted, split=not quoted)
        elif kind == "CmdSubst":
            yield Segment(self._substitute(part).rstrip("\n"), quoted, split=not quoted)
        elif kind == "ArithmExp":
            yield Segment(self.arithmetic_text(part["X"]), quoted, split=not quoted)
        elif kind == "ExtGlob":
            yield Segment(f"{part['Op']}{part['Pattern']['Value']})", quoted)
        else:
            yield Segment(unknown_text("process substitution"), quoted)

    def parameter(self, exp: Node) -> str | list[str]:
        """Return the value of `$name` or `${…}`; a list for all elements of an array or all arguments."""
        name, index = exp["Param"]["Value"], _index(exp)
        value: str | list[str] | None
        if exp.get("Excl"):
            if index in ("@", "*"):
                return list(_elements(self.variables.values.get(name)))
            name = self.variables.text(name) or ""
        if name in ("@", "*"):
            value = list(self.variables.arguments)
        elif index in ("@", "*"):
            value = list(_elements(self.variables.values.get(name)).values())
        elif exp.get("Index"):
            stored = _elements(self.variables.values.get(name))
            value = stored.get(self.index(name, exp["Index"]))
        elif name.isdigit() and name != "0":
            place = int(name) - 1
            value = self.variables.arguments[place] if place < len(self.variables.arguments) else None
        else:
            value = str(len(self.variables.arguments)) if name == "#" else self.variables.text(name)
        if exp.get("Length"):
            return str(len(value or ""))
        if value is None and (exp.get("Exp") or {}).get("Op") not in (":-", "-", ":=", "=", ":+", "+"):
            self.variables.missing.setdefault(name, self.variables.line)
        if slices := exp.get("Slice"):
            start = int(self.arithmetic(slices["Offset"])) if slices.get("Offset") else 0
            length = int(self.arithmetic(slices["Length"])) if slices.get("Length") else None
            whole: Any = value or ""
            start = max(0, len(whole) + start) if start < 0 else start
            if isinstance(value, list) and name in ("@", "*"):
                start -= 1
            end = None if length is None else (start + length if length >= 0 else length)
            sliced: str | list[str] = whole[start:end]
            return sliced
        return self._operated(exp, name, value)

    def _operated(self, exp: Node, name: str, value: str | list[str] | None) -> str | list[str]:
        """Apply `${x:-…}`, `${x%…}`, `${x/…/…}` and the like."""
        if operation := exp.get("Exp"):
            op, word = operation["Op"], operation.get("Word")
            unset = value is None or (op.startswith(":") and not value)
            if op in (":-", "-"):
                return self.text(word) if unset else value or ""
            if op in (":=", "="):
                if unset:
                    self.variables.values[name] = value = self.text(word)
                return "" if value is None else value
            if op in (":+", "+"):
                return "" if unset else self.text(word)
            if op in (":?", "?"):
                return "" if value is None else value
            pattern = self.pattern(word)
            return _each(value, lambda text: trim(text, op, pattern))
        if replacement := exp.get("Repl"):
            pattern, new = self.pattern(replacement.get("Orig")), self.text(replacement.get("With"))
            count = 0 if replacement.get("All") else 1
            return _each(value, lambda text: replace_pattern(text, pattern, new, count))
        return "" if value is None else value

    def index(self, name: str, tree: Node) -> str:
        """Return the key of an array's element."""
        return self.text(tree) if name in self.variables.associative else str(self.arithmetic(tree))

    def arithmetic_text(self, tree: Node) -> str:
        """Return the result of `$((…))`, or the marker of an unknown value."""
        try:
            return str(self.arithmetic(tree))
        except UnknownValueError as error:
            return unknown_text(str(error))

    def arithmetic(self, tree: Node) -> int:
        """Evaluate an arithmetic expression.

        Raises:
            UnknownValueError: an operand exists in the running job only.
        """
        kind = tree["Type"]
        if kind == "Word":
            return self._operand(self.text(tree))
        if kind == "ParenArithm":
            return self.arithmetic(tree["X"])
        op = tree["Op"]
        if kind == "UnaryArithm":
            if op in ("++", "--"):
                old = self.arithmetic(tree["X"])
                self.variables.values[self.text(tree["X"])] = str(old + (1 if op == "++" else -1))
                return old if tree.get("Post") else old + (1 if op == "++" else -1)
            value = self.arithmetic(tree["X"])
            return {"-": -value, "+": value, "!": int(not value), "~": ~value}[op]
        if op in ("&&", "||"):
            left = self.arithmetic(tree["X"])
            return int(
                bool(left and self.arithmetic(tree["Y"])) if op == "&&" else bool(left or self.arithmetic(tree["Y"]))
            )
        if op == "?":
            return self.arithmetic(tree["Y"]["X"] if self.arithmetic(tree["X"]) else tree["Y"]["Y"])
        if op.endswith("=") and op not in ("==", "!=", "<=", ">="):
            name, value = self.text(tree["X"]), self.arithmetic(tree["Y"])
            if op != "=":
                value = operate(op[:-1], self._operand(name), value)
            self.variables.values[name] = str(value)
            return value
        return operate(op, self.arithmetic(tree["X"]), self.arithmetic(tree["Y"]))

    def _operand(self, text: str, depth: int = 0) -> int:
        text = text.strip()
        if sources := unknown_sources(text):
            raise UnknownValueError(sources[0])
        if re.fullmatch(r"[-+]?\d+", text):
            return int(text)
        if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
            return int(text, 16)
        if not text:
            return 0
        if depth > 20:
            raise UnknownValueError(text)
        if re.fullmatch(r"\w+", text):
            return self._operand(self.variables.text(text) or "", depth + 1)
        return self.arithmetic(self._parse_arithmetic(text))


def _index(exp: Node) -> str:
    parts = (exp.get("Index") or {}).get("Parts") or [{}]
    return str(exp["Param"]["Value"]) if exp["Param"]["Value"] in ("@", "*") else str(parts[0].get("Value", ""))


def _elements(value: Value | None) -> dict[str, str]:
    return {} if value is None else value if isinstance(value, dict) else {"0": value}


def _joined(segment: Segment) -> str:
    return segment.text if segment.items is None else " ".join(segment.items)


def _each(value: str | list[str] | None, change: Callable[[str], str]) -> str | list[str]:
    return [change(text) for text in value] if isinstance(value, list) else change(value or "")


def _literal(text: str, quoted: bool) -> Iterator[Segment]:
    """Remove backslashes; an escaped character of an unquoted literal is quoted."""
    for piece in re.split(r"(\\.)", text, flags=re.DOTALL):
        if len(piece) == 2 and piece[0] == "\\":
            kept = quoted and piece[1] not in '$`"\\\n'
            yield Segment(piece if kept else piece[1], True)
        elif piece:
            yield Segment(piece, quoted)


def _braces(parts: list[Node]) -> Iterator[list[Node]]:
    """Yield a word's parts for each choice of its unquoted {a,b} and {1..4}; the braces lie within one literal."""
    choices = [
        [{"Type": "Lit", "Value": text} for text in brace_choices(part["Value"])] if part["Type"] == "Lit" else [part]
        for part in parts
    ]
    yield from (list(choice) for choice in product(*choices))
