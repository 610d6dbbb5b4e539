"""Modeling code in exports: files for classes that transformers lacks, and a check that an export's copy is unmodified.

Only unchanged copies are executed: a folder that is imported may come from anywhere.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "remote_code"


def has_own_code(folder: Path) -> bool:
    """Return whether the Python code of a Hugging Face folder is an unchanged modeling file of ours; False: none."""
    code = list(folder.glob("*.py"))
    return bool(code) and all(is_unchanged(path) for path in code)


def is_unchanged(path: Path) -> bool:
    """Return whether a file is an unchanged copy of the modeling file of its name."""
    original = FOLDER / path.name
    return path.is_file() and original.is_file() and path.read_bytes() == original.read_bytes()
