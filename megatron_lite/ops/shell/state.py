"""Shell state of the Bash interpreter: variables, written files, recorded commands, output; `test` conditions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.ops.shell.text import matches, unknown_sources, unknown_text
from megatron_lite.ops.shell.words import Node, WordExpander


@dataclass(frozen=True)
class StartedCommand:
    """A command that a script starts.

    Attributes:
        arguments: after expansion; of `srun bash -c "…"`, the outer command's followed by the inner one's.
        line: of the script.
    """

    arguments: tuple[str, ...]
    line: int


@dataclass
class Evaluation:
    """The result of a script's evaluation.

    Attributes:
        commands: in the order in which they start.
        files: content of the files that the script writes, by absolute path.
        missing: variables that were expanded without having a value, in order, and the line.
        missing_sources: sourced files that do not exist, as named in the script.
        notes: statements that could not be evaluated.
        failure: where and why the script ends with an error; empty: it does not.
        folder: the current folder at the end.
        exported: exported variables at the end.
        stops_at_missing: the script ends at a variable without a value (set -u).
        last_output: the text that the script printed last.
    """

    commands: list[StartedCommand] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    missing_sources: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    folder: str = ""
    exported: Mapping[str, str] = field(default_factory=dict)
    stops_at_missing: bool = False
    last_output: str = ""


class LeaveError(Exception):
    """Control flow: break, continue, return or exit."""

    def __init__(self, kind: str, count: int = 1) -> None:
        self.kind = kind
        self.count = count


class ShellState:
    """The part of a shell on which builtins act."""

    def __init__(self, evaluation: Evaluation, words: WordExpander) -> None:
        self.variables = words.variables
        self.evaluation = evaluation
        self.words = words
        self.functions: dict[str, Node] = {}
        self.status = 0
        self.output: list[str] | None = None

    def write(self, text: str) -> None:
        """Append to the output of the current command substitution or pipe."""
        if self.output is not None:
            self.output.append(text)
        elif text.strip() and not unknown_sources(text):
            self.evaluation.last_output = text.strip()

    def environment(self) -> dict[str, str]:
        """Return the variables that a command inherits."""
        names = sorted(self.variables.exported)
        return {name: text for name in names if (text := self.variables.text(name)) is not None}

    def folder(self) -> str:
        """Return the current folder."""
        return self.variables.text("PWD") or "/"

    def _folder_or_none(self) -> str | None:
        return self.folder() if Path(self.folder()).is_dir() else None

    def path(self, name: str) -> str:
        """Return the absolute path of a file that the script names."""
        return os.path.normpath(Path(self.folder()) / name)

    def content(self, path: str) -> str | None:
        """Return the text of a file that the script wrote or that is on the disk."""
        if path in self.evaluation.files:
            return self.evaluation.files[path]
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def read(self, name: str) -> str:
        """Return the text of a file, or the marker of an unknown value."""
        text = self.content(self.path(name))
        return unknown_text(f"content of {name}") if text is None else text

    def test_arguments(self, arguments: list[str]) -> bool:
        """Evaluate the arguments of [ … ] or `test`."""
        if "-o" in arguments[1:-1]:
            place = arguments.index("-o", 1)
            return self.test_arguments(arguments[:place]) or self.test_arguments(arguments[place + 1 :])
        if "-a" in arguments[1:-1]:
            place = arguments.index("-a", 1)
            return self.test_arguments(arguments[:place]) and self.test_arguments(arguments[place + 1 :])
        if len(arguments) > 1 and arguments[0] == "!":
            return not self.test_arguments(arguments[1:])
        if len(arguments) == 2:
            return self.unary_test(arguments[0], arguments[1])
        return self.compare(*arguments) if len(arguments) == 3 else bool(arguments and arguments[0])

    def unary_test(self, op: str, text: str) -> bool:
        """Evaluate `-f FILE`, `-z TEXT` and the like."""
        if op in ("-z", "-n"):
            return bool(text) == (op == "-n")
        if op == "-v":
            return text in self.variables.values
        path = self.path(text)
        if path in self.evaluation.files:
            return op in ("-e", "-f", "-s", "-r", "-w")
        try:
            return {"-d": os.path.isdir, "-f": os.path.isfile, "-s": lambda p: Path(p).stat().st_size > 0}.get(
                op, os.path.exists
            )(path)
        except OSError:
            return False

    def compare(self, left: str, op: str, right: str) -> bool:
        """Evaluate a comparison of two texts or integers."""
        if op in ("=", "==", "!=", "<", ">"):
            return {"<": left < right, ">": left > right}.get(op, (left == right) != (op == "!="))
        try:
            a, b = int(left or 0), int(right or 0)
        except ValueError:
            return False
        return {"-eq": a == b, "-ne": a != b, "-lt": a < b, "-le": a <= b, "-gt": a > b, "-ge": a >= b}.get(op, False)

    def test_tree(self, tree: Node) -> bool:
        """Evaluate the expression of [[ … ]]."""
        kind = tree["Type"]
        if kind == "Word":
            return self.words.text(tree) != ""
        if kind == "ParenTest":
            return self.test_tree(tree["X"])
        op = tree["Op"]
        if kind == "UnaryTest":
            return not self.test_tree(tree["X"]) if op == "!" else self.unary_test(op, self.words.text(tree["X"]))
        if op in ("&&", "||"):
            left = self.test_tree(tree["X"])
            return (left and self.test_tree(tree["Y"])) if op == "&&" else (left or self.test_tree(tree["Y"]))
        left_text = self.words.text(tree["X"])
        if op == "=~":
            return re.search(self.words.text(tree["Y"]), left_text) is not None
        if op in ("=", "==", "!="):
            return matches(left_text, self.words.pattern(tree["Y"])) != (op == "!=")
        return self.compare(left_text, op, self.words.text(tree["Y"]))
