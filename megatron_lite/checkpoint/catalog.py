"""Which checkpoints a folder holds, which of them are whole, and which one a load means.

A folder given to --save holds `iter_0000100/` for each checkpoint and `latest_checkpointed_iteration.txt`, as Megatron
lays it out. Other names that begin with `iter_0000100.` are on their way in or out and are never loaded as they are:
`.partial-…` is being written, `.replaced` steps aside for a new save of the same iteration, `.deleted-…` is going.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_lite.checkpoint.durable import replace_file, sync_folder
from megatron_lite.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_lite.errors import CheckpointError

LATEST_NAME = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,})")
_REPLACED = re.compile(r"(iter_\d{7,})\.replaced")
_STALE = re.compile(r"iter_\d{7,}\.(partial|deleted)-[0-9a-f]+")


def folder_name(iteration: int) -> str:
    """Name of an iteration's folder: iter_0000100."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int | None:
    """The iteration that a folder's name says, or None if it is not a checkpoint's name."""
    match = _FOLDER.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder is a whole checkpoint: its manifest is readable and every file has the length it says.

    This looks at names and lengths only; verify.py reads the bytes.
    """
    if iteration_of(checkpoint) is None or not (checkpoint / MANIFEST_NAME).is_file():
        return False
    try:
        manifest = read_manifest(checkpoint)
        return all((checkpoint / name).stat().st_size == file.size for name, file in manifest.files.items())
    except (CheckpointError, OSError):
        return False


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest iteration first."""
    if not root.is_dir():
        return []
    found = [(iteration_of(entry), entry) for entry in root.iterdir()]
    numbered = sorted((iteration, entry) for iteration, entry in found if iteration is not None)
    return [entry for _, entry in numbered if is_complete(entry)]


def announced(root: Path) -> str | None:
    """The text of latest_checkpointed_iteration.txt, stripped; None if there is no such file."""
    try:
        return (root / LATEST_NAME).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def announce(root: Path, iteration: int) -> None:
    """Makes `iteration` the one that a load of `root` takes."""
    replace_file(root / LATEST_NAME, f"{iteration}\n".encode())


def latest(root: Path, notify: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that a load of `root` means: the announced one, else the newest whole one.

    Args:
        root: the folder given to --load.
        notify: told when the announced one is not there or damaged and another is taken.

    Returns:
        None if nothing was ever saved here.

    Raises:
        CheckpointError: a checkpoint was announced but there is none that can be loaded.
    """
    text = announced(root)
    complete = list_checkpoints(root)
    if text is None:
        if complete:
            notify(f"{root / LATEST_NAME} is missing: taking the newest complete checkpoint, {complete[-1].name}")
        return complete[-1] if complete else None
    if text.isdecimal():
        wanted = root / folder_name(int(text))
        if wanted in complete:
            return wanted
        earlier = [entry for entry in complete if (iteration_of(entry) or 0) < int(text)]
        if earlier:
            notify(f"{LATEST_NAME} says {text} but {wanted.name} is missing or incomplete: taking {earlier[-1].name}")
            return earlier[-1]
    raise CheckpointError(
        "The checkpoint that latest_checkpointed_iteration.txt names must be there",
        found=f"{root} announces {text!r}, and holds {_names(complete)}",
        fix="Correct --load or the text file; a checkpoint of Megatron or DeepSpeed is imported first",
    )


def find_checkpoint(load: str, iteration: int = 0, notify: Callable[[str], None] = print) -> Path | None:
    """The folder of the checkpoint that --load and --load-iteration mean.

    Args:
        load: a folder given to --save, or one checkpoint's own folder iter_….
        iteration: the iteration wanted; 0: the latest.
        notify: told about anything surprising in the choice.

    Returns:
        None if the folder is missing or holds nothing yet (the caller decides whether that is a fresh start).

    Raises:
        CheckpointError: what was asked for by name is missing or incomplete.
    """
    path = Path(load)
    named = iteration_of(path)
    if named is not None and path.is_dir():
        if iteration not in (0, named):
            raise CheckpointError(
                "--load and --load-iteration must agree",
                found=f"--load {load} --load-iteration {iteration}",
                fix="Give the folder above it to --load, or leave --load-iteration out",
            )
        return _require_complete(path)
    restore_replaced(path)
    return _require_complete(path / folder_name(iteration)) if iteration else latest(path, notify)


def restore_replaced(root: Path) -> None:
    """Puts back a checkpoint that had stepped aside for a save of the same iteration which never arrived."""
    for entry in list(root.iterdir()) if root.is_dir() else []:
        match = _REPLACED.fullmatch(entry.name)
        if match and not (root / match[1]).exists():
            try:
                entry.rename(root / match[1])
            except OSError:
                # Another rank was faster, or the folder is read-only: then there is nothing to put back from here.
                continue


def make_visible(partial: Path, checkpoint: Path) -> None:
    """Gives a finished save its name in one rename; an older save of the same iteration steps aside first.

    Whenever the process dies, the older or the newer one is found: restore_replaced undoes the half-way state.

    Raises:
        OSError: the file system refuses.
    """
    replaced = checkpoint.with_name(f"{checkpoint.name}.replaced")
    if checkpoint.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        checkpoint.rename(replaced)
    partial.rename(checkpoint)
    sync_folder(checkpoint.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def remove_stale(root: Path) -> list[str]:
    """Removes what killed saves and deletions left behind, and returns the names."""
    restore_replaced(root)
    stale = [entry for entry in root.iterdir() if _STALE.fullmatch(entry.name) or _REPLACED.fullmatch(entry.name)]
    stale += root.glob(f"{LATEST_NAME}.*.tmp")
    for entry in stale:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return sorted(entry.name for entry in stale)


def _require_complete(checkpoint: Path) -> Path:
    if is_complete(checkpoint):
        return checkpoint
    state = "is incomplete or damaged" if checkpoint.is_dir() else "is not there"
    others = list_checkpoints(checkpoint.parent)
    raise CheckpointError(
        "The checkpoint asked for must be complete",
        found=f"{checkpoint} {state}; {checkpoint.parent} holds {_names(others)}",
        fix="Choose one of these with --load-iteration",
    )


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(entry.name for entry in checkpoints) or "no complete checkpoint"
