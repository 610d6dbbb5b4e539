"""Structure checks beyond the linters: file and function sizes, file names, __init__ files, the package list of README.

Run by `make check` and pre-commit. Prints every violation and exits with 1 if there is one; functions over 100 lines
are warnings only.
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
LONG_FUNCTION_LINES = 100
BANNED_NAMES = {"utils", "helpers", "common", "misc"}
# A line of the README's package list: "  config/        run configuration: …"
PACKAGE_LINE = re.compile(r"^  (\w+)/ {2,}\S", re.MULTILINE)


def main() -> int:
    """Print warnings and violations; return 1 if there is a violation."""
    for warning in long_functions():
        print(f"warning: {warning}")
    violations = [*file_violations(), *init_violations(), *readme_violations()]
    print("\n".join(violations) or "structure: file sizes, file names, __init__ files and README are valid")
    return 1 if violations else 0


def file_violations() -> Iterator[str]:
    """Yield files over MAX_FILE_LINES and files with a banned name."""
    for path, source in _sources():
        if path.stem in BANNED_NAMES:
            yield f"{path}: name the file after its content instead of {path.stem}"
        if (count := len(source.splitlines())) > MAX_FILE_LINES:
            yield f"{path}: {count} lines, over {MAX_FILE_LINES}; split it by concept"


def long_functions() -> Iterator[str]:
    """Yield functions over LONG_FUNCTION_LINES."""
    for path, source in _sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONG_FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name} has {length} lines, over {LONG_FUNCTION_LINES}"


def init_violations() -> Iterator[str]:
    """Yield package __init__ files without docstring, or with imports."""
    for path in sorted(PACKAGE.rglob("__init__.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT)
        if ast.get_docstring(tree) is None:
            yield f"{name}: has no docstring that describes the package"
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            yield f"{name}: re-exports names; import from the module that defines them"


def readme_violations() -> Iterator[str]:
    """Yield differences between the package list in README.md and the package folders."""
    listed = set(PACKAGE_LINE.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    existing = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for folder in sorted(existing - listed):
        yield f"README.md: the package list lacks megatron_lite/{folder}/"
    for folder in sorted(listed - existing):
        yield f"README.md: the package list has megatron_lite/{folder}/, which does not exist"


def _sources() -> Iterator[tuple[Path, str]]:
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
