"""Path suggestions for missing files and datasets."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

SHOWN = 5
RAW_TEXT = (".jsonl", ".json", ".txt", ".parquet", ".gz", ".zst")


def suggest_path(flag: str, path: str) -> str:
    """Return the fix of an error about a file that a flag names and that does not exist."""
    near, missing = _nearest_path(Path(path))
    if near is not None and missing != Path(path) and near == missing.parent / near.name:
        return f"Give {flag} a path that exists: there is no folder {missing}, but {near} with {_listed(_names(near))}"
    if near:
        return f"Did you mean {flag} {near}?"
    if missing != Path(path):
        return f"Give {flag} a path that exists: there is no folder {missing}"
    return f"Give {flag} a path that exists: {missing.parent.absolute()} holds {_listed(_names(missing.parent))}"


def suggest_dataset(prefix: str) -> str:
    """Return the fix of an error about a dataset without its .bin or .idx."""
    path = Path(prefix)
    if path.is_dir():
        inside = _prefixes(path)
        if not inside:
            return f"Make a dataset with `megatron-lite preprocess`: there is no .idx file in {prefix}"
        return f"Give a dataset of that folder: {_listed([str(path / name) for name in inside])}"
    if path.suffix in (".bin", ".idx"):
        return f"Give the common prefix of both files: {prefix[: -len(path.suffix)]}"
    halves = {suffix for suffix in (".bin", ".idx") if Path(prefix + suffix).is_file()}
    if len(halves) == 1:
        return f"Copy it to the folder of {prefix}{halves.pop()}, or preprocess the corpus again"
    if path.is_file() and path.suffix in RAW_TEXT:
        return f"Make a dataset of that text with `megatron-lite preprocess --input {prefix} --output-prefix …`"
    names = _prefixes(path.parent)
    near = next((name for name in names if name.startswith(path.name)), None) or _nearest(path.name, names)
    if near:
        return f"Did you mean {path.parent / near}?"
    if not path.parent.is_dir():
        folder, missing = _nearest_path(path.parent)
        return f"Did you mean {folder / path.name}?" if folder else f"There is no folder {missing}: give another prefix"
    there = (
        f"{path.parent.absolute()} holds {_listed(names)}" if names else f"{path.parent.absolute()} holds no dataset"
    )
    return f"Give the common prefix of a .bin/.idx pair, without an extension: {there}"


def _nearest_path(path: Path) -> tuple[Path | None, Path]:
    """Return the existing path that was probably meant (or None), and the first part of the path that does not exist.

    That part is compared with the names beside it. If the rest does not exist either, only the part is suggested.
    """
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    near = _nearest(missing.name, _names(missing.parent))
    if not near:
        return None, missing
    meant = missing.parent / near / path.relative_to(missing)
    return meant if meant.exists() else missing.parent / near, missing


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _prefixes(folder: Path) -> list[str]:
    return [name[: -len(".idx")] for name in _names(folder) if name.endswith(".idx")]


def _nearest(name: str, names: Sequence[str]) -> str | None:
    same = [other for other in names if other.lower() == name.lower()]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return next(iter([*same, *close]), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "nothing"
