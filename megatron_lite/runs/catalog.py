"""Checkpoint catalog: lists the checkpoints of a folder and finds the one to load.

A folder given to --save holds `iter_0000100/` for each checkpoint and `latest_checkpointed_iteration.txt`, as Megatron
lays it out. Longer names are on their way in or out: `iter_0000100.partial-…` is being written, `.deleted-…` is going,
and `.replaced` has stepped aside for a new save of the same iteration, for which it stands until that is there. A
`.damaged-…` one was passed over by a run that went on from an earlier one: it stays for people to look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.foreign import foreign_error
from megatron_lite.runs.manifest import MANIFEST_NAME, CorruptCheckpointError, read_manifest

LATEST_NAME = "latest_checkpointed_iteration.txt"
REPLACED = ".replaced"
_FOLDER = re.compile(rf"iter_(\d{{7,}})({re.escape(REPLACED)})?")


def folder_name(iteration: int) -> str:
    """Name of an iteration's folder: iter_0000100."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int | None:
    """The iteration that a folder's name says, or None if it is not a checkpoint's name."""
    match = _FOLDER.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def locate(root: Path, iteration: int) -> Path:
    """Where an iteration's checkpoint lies, or would lie if there is none."""
    checkpoint = root / folder_name(iteration)
    replaced = replaced_name(checkpoint)
    return replaced if replaced.exists() and not checkpoint.exists() else checkpoint


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder is a whole checkpoint: its manifest is readable and every file has the length it says.

    This looks at names and lengths only; verify.py reads the bytes.
    """
    return iteration_of(checkpoint) is not None and incompleteness(checkpoint) is None


def incompleteness(checkpoint: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, with the file's name, or None."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is not there"
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return error.problem
    if manifest.iteration != iteration_of(checkpoint):
        return f"{checkpoint} is that of iteration {manifest.iteration} under another name"
    for name, file in manifest.files.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            return f"{path} is missing" if size is None else f"{path} has {size} bytes instead of {file.size}"
    return None


def list_iterations(root: Path) -> list[int]:
    """Iterations that a folder has checkpoints of, whole or not, in order."""
    if not root.is_dir():
        return []
    return sorted({iteration for entry in root.iterdir() if (iteration := iteration_of(entry)) is not None})


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest iteration first."""
    return [entry for iteration in list_iterations(root) if is_complete(entry := locate(root, iteration))]


def announced(root: Path) -> str | None:
    """The text of latest_checkpointed_iteration.txt, stripped; None if there is no such file.

    It may be empty or hold anything: a full disk or a power failure leaves such files.
    """
    try:
        return (root / LATEST_NAME).read_bytes().decode("utf-8-sig", "replace").strip(" \t\r\n\x00")
    except FileNotFoundError:
        return None


def _iteration(text: str) -> int | None:
    """The iteration that the announcement's text is, or None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def latest_iteration(root: Path) -> int | None:
    """Return the iteration in latest_checkpointed_iteration.txt; None: there is no such file, or it is damaged."""
    text = announced(root)
    return None if text is None else _iteration(text)


def announce(root: Path, iteration: int) -> None:
    """Makes `iteration` the one that a load of `root` takes."""
    replace_file(root / LATEST_NAME, f"{iteration}\n".encode())


def announcement_problem(root: Path) -> str | None:
    """Why a load of `root` would not take what its text file announces, with that file's name; None: it would."""
    text = announced(root)
    if text is None:
        return f"{root / LATEST_NAME} is missing"
    if (iteration := _iteration(text)) is None:
        return f"{root / LATEST_NAME} says {text[:40]!r}, which is no iteration"
    problem = incompleteness(locate(root, iteration))
    return problem and f"{root / LATEST_NAME} says {text}, but {problem}"


def unannounced(root: Path) -> int | None:
    """The iteration of a whole checkpoint that was written after the last announcement: a job died in between.

    A later checkpoint that is older than the announcement was left behind by a rollback or by hand; it does not count.
    """
    text = announced(root)
    if text is None or (last := _iteration(text)) is None:
        return None
    told = (root / LATEST_NAME).stat().st_mtime_ns
    for iteration in reversed([number for number in list_iterations(root) if number > last]):
        path = locate(root, iteration)
        if is_complete(path) and (path / MANIFEST_NAME).stat().st_mtime_ns > told:
            return iteration
    return None


def latest(root: Path, *, fallback: bool = False, notify: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that a load of `root` means: the announced one, or the newest whole one if none was announced.

    Args:
        root: the folder given to --load.
        fallback: whether an earlier one may be taken when the announced one is missing or damaged, or the newest when
            the announcement is damaged.
        notify: told when another one than the announced is taken.

    Returns:
        None if nothing was ever saved here.

    Raises:
        CheckpointError: a checkpoint was announced but is not there, or not whole.
    """
    text = announced(root)
    if text is None:
        complete = list_checkpoints(root)
        if complete:
            notify(f"{root / LATEST_NAME} is missing: taking the newest complete checkpoint, {complete[-1].name}")
        return complete[-1] if complete else None
    if (iteration := _iteration(text)) is None:
        if (foreign := foreign_error(root)) is not None:
            raise foreign
        complete = list_checkpoints(root)
        if fallback and complete and text != "release":  # Megatron's word for a checkpoint without an iteration
            notify(
                f"{root / LATEST_NAME} says {text[:40]!r}, which is no iteration: taking the newest complete "
                f"checkpoint, {complete[-1].name}"
            )
            return complete[-1]
        raise CheckpointError(
            f"{LATEST_NAME} must hold the number of an iteration",
            found=f"{root / LATEST_NAME} says {text[:40]!r}, and the folder holds {_names(complete)}",
            fix=f"Write {iteration_of(complete[-1])} into it, or add --load-iteration {iteration_of(complete[-1])}; "
            "training takes the newest one under --fallback-on-corrupt"
            if complete
            else "Give --load the folder that a run was given with --save, or leave it out to start from fresh weights",
        )
    wanted = locate(root, iteration)
    # The others are looked at only if they are needed: each has a manifest of megabytes and a file for every rank.
    if fallback and (problem := incompleteness(wanted)) is not None:
        earlier = [entry for entry in list_checkpoints(root) if (iteration_of(entry) or 0) < iteration]
        if earlier:
            notify(f"{problem}: taking {earlier[-1].name} instead of the announced {wanted.name}")
            return earlier[-1]
    return _require_complete(wanted)


def find_checkpoint(
    load: str, iteration: int = 0, *, fallback: bool = False, notify: Callable[[str], None] = print
) -> Path | None:
    """The folder of the checkpoint that --load and --load-iteration mean.

    Args:
        load: a folder given to --save, or one checkpoint's own folder iter_….
        iteration: the iteration wanted; 0: the latest.
        fallback: --fallback-on-corrupt: take an earlier one if the latest is missing or damaged.
        notify: told about anything surprising in the choice.

    Returns:
        None if the folder is missing or holds nothing yet (the caller decides whether that is a fresh start).

    Raises:
        CheckpointError: what was asked for by name, or announced, is missing or incomplete; or it cannot be read.
    """
    try:
        return _find(Path(load), iteration, fallback, notify)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            "--load must name a folder that can be read",
            found=f"--load {load}: {error.strerror}{where}",
            fix="Give the folder that was the --save of a run, or one of its iter_… folders",
        ) from error


def _find(path: Path, iteration: int, fallback: bool, notify: Callable[[str], None]) -> Path | None:
    named = iteration_of(path)
    if named is not None and path.is_dir():
        if iteration not in (0, named):
            raise CheckpointError(
                "--load and --load-iteration must agree",
                found=f"--load {path} --load-iteration {iteration}",
                fix="Give the folder above it to --load, or leave --load-iteration out",
            )
        return _require_complete(path)
    if iteration:
        return _require_complete(locate(path, iteration))
    found = latest(path, fallback=fallback, notify=notify)
    if found is None and (foreign := foreign_error(path)) is not None:
        raise foreign
    return found


def replaced_name(checkpoint: Path) -> Path:
    """Where a checkpoint steps aside for a new save of its iteration."""
    return checkpoint.with_name(checkpoint.name + REPLACED)


def _require_complete(checkpoint: Path) -> Path:
    problem = incompleteness(checkpoint)
    if problem is None:
        return checkpoint
    kind = CorruptCheckpointError if (checkpoint / MANIFEST_NAME).is_file() else CheckpointError
    others = list_checkpoints(checkpoint.parent)
    # DeepSpeed leaves Megatron's text file beside its own folders.
    where = checkpoint if others or checkpoint.is_dir() else checkpoint.parent
    if (foreign := foreign_error(where)) is not None:
        raise foreign
    if others:
        fix = "Choose one of these with --load-iteration, or add --fallback-on-corrupt to take the last whole one"
    elif not checkpoint.is_dir():
        fix = "Give --load the folder that a run was given with --save, or leave it out to start from fresh weights"
    else:
        fix = "If the folder was copied here, copy it again in full; if not, leave --load out to start afresh"
    raise kind(
        "The checkpoint to load must be whole",
        found=f"{problem}; {checkpoint.parent} holds {_names(others)}",
        fix=fix,
    )


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(entry.name for entry in checkpoints) or "no complete checkpoint"
