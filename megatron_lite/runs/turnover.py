"""Crash-safe creation, replacement and removal of checkpoint folders."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from pathlib import Path

from megatron_lite.runs.atomic import sync_folder
from megatron_lite.runs.catalog import (
    LATEST_NAME,
    REPLACED,
    announce,
    folder_name,
    list_iterations,
    locate,
    replaced_name,
)

_STALE = re.compile(r"iter_\d{7,}\.(partial|deleted)-[0-9a-f]+")


def make_visible(partial: Path, checkpoint: Path) -> None:
    """Gives a finished save its name in one rename; an older save of the same iteration steps aside first.

    Whenever the process dies, the older or the newer one is found: see locate.

    Raises:
        OSError: the file system refuses.
    """
    replaced = replaced_name(checkpoint)
    if checkpoint.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        checkpoint.rename(replaced)
    partial.rename(checkpoint)
    sync_folder(checkpoint.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def remove_stale(root: Path) -> list[str]:
    """Cleans up after killed saves and deletions (the saving rank only), and returns the names of what was removed."""
    stale = [entry for entry in root.iterdir() if _STALE.fullmatch(entry.name)]
    for replaced in root.glob(f"iter_*{REPLACED}"):
        checkpoint = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if checkpoint.exists():
            stale.append(replaced)
        else:
            replaced.rename(checkpoint)
    stale += root.glob(f"{LATEST_NAME}.*.tmp")
    for entry in stale:
        if entry.is_dir():
            with contextlib.suppress(OSError):
                discard(entry)
        else:
            entry.unlink(missing_ok=True)
    return sorted(entry.name for entry in stale)


def discard(folder: Path) -> None:
    """Removes a folder, under another name first.

    One that is half removed is then never taken for a checkpoint; nor can what looked like the remains of a save, but
    was another job's, still get its name while it is being removed.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    going = folder.with_name(f"{folder.name.partition('.')[0]}.deleted-{secrets.token_hex(4)}")
    folder.rename(going)
    shutil.rmtree(going)


def step_back(root: Path, iteration: int) -> list[str]:
    """Makes `iteration` the latest after later ones were found damaged: these get names by which nothing takes them.

    Returns:
        Their new names.

    Raises:
        OSError: one of them cannot be renamed.
    """
    aside = []
    for number in list_iterations(root):
        if number > iteration:
            path = locate(root, number)
            aside.append(f"{folder_name(number)}.damaged-{secrets.token_hex(4)}")
            path.rename(root / aside[-1])
    announce(root, iteration)
    return aside
