"""Checkpoint folder operations: crash-safe creation, renaming and removal of a checkpoint in --save."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from pathlib import Path

from megatron_lite.runs.atomic import sync_folder
from megatron_lite.runs.catalog import (
    BEST_NAME,
    LATEST_NAME,
    REPLACED,
    folder_name,
    forget_best_after,
    list_iterations,
    locate,
    replaced_name,
    set_latest,
)

_STALE = re.compile(r"iter_\d{7,}\.(partial|deleted)-[0-9a-f]+")


def make_visible(partial: Path, checkpoint: Path) -> None:
    """Give a finished save its final name by one rename; an older save of the same iteration is renamed first.

    Whenever the process is killed, `locate` finds the older or the newer one.

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
    """Remove the remains of killed saves and deletions (on the saving rank only), and return their names."""
    stale = [entry for entry in root.iterdir() if _STALE.fullmatch(entry.name)]
    for replaced in root.glob(f"iter_*{REPLACED}"):
        checkpoint = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if checkpoint.exists():
            stale.append(replaced)
        else:
            replaced.rename(checkpoint)
    stale += [*root.glob(f"{LATEST_NAME}.*.tmp"), *root.glob(f"{BEST_NAME}.*.tmp")]
    for entry in stale:
        if entry.is_dir():
            with contextlib.suppress(OSError):
                discard(entry)
        else:
            entry.unlink(missing_ok=True)
    return sorted(entry.name for entry in stale)


def discard(folder: Path) -> None:
    """Rename a folder, then remove it.

    So a half-removed folder never counts as a checkpoint, and a save of another job that looked like the remains of a
    killed one cannot get its final name while it is being removed.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    going = folder.with_name(f"{folder.name.partition('.')[0]}.deleted-{secrets.token_hex(4)}")
    folder.rename(going)
    shutil.rmtree(going)


def set_damaged_aside(root: Path, iteration: int) -> list[str]:
    """Make `iteration` the latest after later checkpoints were found damaged, and rename these to `.damaged-…`.

    Returns:
        The new names.

    Raises:
        OSError: one of them cannot be renamed.
    """
    aside = []
    for number in list_iterations(root):
        if number > iteration:
            path = locate(root, number)
            aside.append(f"{folder_name(number)}.damaged-{secrets.token_hex(4)}")
            path.rename(root / aside[-1])
    forget_best_after(root, iteration)
    set_latest(root, iteration)
    return aside
