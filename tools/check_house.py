"""Checks what the linters cannot: file and function sizes, bare __init__ files, and the README's tree of folders.

Run by `make check` and pre-commit; prints every violation and exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_lite"
CODE_FOLDERS = ("megatron_lite", "tools", "examples", "benchmarks", "tests")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 100
BANNED_NAMES = {"utils", "helpers", "common", "misc"}
# One line of the README's tree: "  config/        what a run is: …"
TREE_LINE = re.compile(r"^  (\w+)/ {2,}\S", re.MULTILINE)


def main() -> int:
    """Returns 1 if the house breaks a rule of its own, after printing each."""
    violations = [*sizes(), *inits(), *readme_tree()]
    print(
        "\n".join(violations)
        if violations
        else "house: sizes, names, __init__ files and README tree are as they should be"
    )
    return 1 if violations else 0


def sizes() -> Iterator[str]:
    """Files over 400 lines, functions over 100, files named utils."""
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT)
            source = path.read_text(encoding="utf-8")
            if path.stem in BANNED_NAMES:
                yield f"{name}: name the file after what it holds, not {path.stem}"
            if (count := len(source.splitlines())) > MAX_FILE_LINES:
                yield f"{name}: {count} lines, over {MAX_FILE_LINES}; split it by concept"
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    if length > MAX_FUNCTION_LINES:
                        yield f"{name}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION_LINES}"


def inits() -> Iterator[str]:
    """Package __init__ files hold one docstring and re-export nothing."""
    for path in sorted(PACKAGE.rglob("__init__.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT)
        if ast.get_docstring(tree) is None:
            yield f"{name}: says nothing about its folder"
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            yield f"{name}: re-exports; import from the file that defines a name"


def readme_tree() -> Iterator[str]:
    """Every package folder stands in the README's tree, and the tree names none that is not there."""
    readme = ROOT / "README.md"
    told = set(TREE_LINE.findall(readme.read_text(encoding="utf-8"))) if readme.exists() else set()
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for folder in sorted(there - told):
        yield f"README.md: the tree does not show megatron_lite/{folder}/"
    for folder in sorted(told - there):
        yield f"README.md: the tree shows megatron_lite/{folder}/, which does not exist"


if __name__ == "__main__":
    sys.exit(main())
