"""Checkpoint catalog: lists the checkpoints of a folder and finds the one to load.

As in Megatron, a --save folder holds `iter_0000100/` for each checkpoint, and `latest_checkpointed_iteration.txt`; with
--save-best also `best_checkpointed_iteration.txt`, the iteration with the lowest validation loss.
Other names are temporary: `iter_0000100.partial-…` is being written, `.deleted-…` is being removed, and `.replaced` is
an older save of the same iteration, which counts until the new one has its name. `.damaged-…` is a checkpoint that a
run passed over for an earlier one (--fallback-on-corrupt); it is kept for inspection.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.foreign import foreign_error
from megatron_lite.runs.manifest import MANIFEST_NAME, CorruptCheckpointError, read_manifest
from megatron_lite.system_errors import reason, remedy

LATEST_NAME = "latest_checkpointed_iteration.txt"
BEST_NAME = "best_checkpointed_iteration.txt"
BEST = "best"
"""Name after a --save folder, as in --load runs/mine/best, of the checkpoint with the lowest validation loss."""
REPLACED = ".replaced"
_FOLDER = re.compile(rf"iter_(\d{{7,}})({re.escape(REPLACED)})?")


def folder_name(iteration: int) -> str:
    """Return the name of an iteration's folder: iter_0000100."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int | None:
    """Return the iteration in a folder's name; None: it is not a checkpoint's name."""
    match = _FOLDER.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def replaced_name(checkpoint: Path) -> Path:
    """Return the name under which a checkpoint waits while a new save of its iteration takes its place."""
    return checkpoint.with_name(checkpoint.name + REPLACED)


def locate(root: Path, iteration: int) -> Path:
    """Return the folder of an iteration's checkpoint, whether it exists or not."""
    checkpoint = root / folder_name(iteration)
    replaced = replaced_name(checkpoint)
    return replaced if replaced.exists() and not checkpoint.exists() else checkpoint


def is_complete(checkpoint: Path) -> bool:
    """Return whether a folder is a complete checkpoint: its manifest is readable and every file has the right size.

    Contents are not read; checkpoint/verify.py does that.
    """
    return iteration_of(checkpoint) is not None and incompleteness(checkpoint) is None


def incompleteness(checkpoint: Path) -> str | None:
    """Return why a folder is not a complete checkpoint, with the file's name; None: it is one."""
    if not checkpoint.is_dir():
        return f"{checkpoint} does not exist"
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return error.problem
    if manifest.iteration != iteration_of(checkpoint):
        return f"{checkpoint} holds iteration {manifest.iteration}, unlike its name"
    for name, file in manifest.files.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            return f"{path} is missing" if size is None else f"{path} has {size} bytes instead of {file.size}"
    return None


def list_iterations(root: Path) -> list[int]:
    """Return the iterations of a folder's checkpoints, complete or not, in ascending order."""
    if not root.is_dir():
        return []
    return sorted({iteration for entry in root.iterdir() if (iteration := iteration_of(entry)) is not None})


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, in ascending order of iterations."""
    return [entry for iteration in list_iterations(root) if is_complete(entry := locate(root, iteration))]


def read_latest(root: Path) -> str | None:
    """Return the text of latest_checkpointed_iteration.txt, stripped; None: there is no such file.

    It may be empty or arbitrary: a full disk or a power failure leaves such files.
    """
    try:
        return (root / LATEST_NAME).read_bytes().decode("utf-8-sig", "replace").strip(" \t\r\n\x00")
    except FileNotFoundError:
        return None


def latest_iteration(root: Path) -> int | None:
    """Return the iteration in latest_checkpointed_iteration.txt; None: there is no such file, or it is damaged."""
    text = read_latest(root)
    return None if text is None else _parse_iteration(text)


def set_latest(root: Path, iteration: int) -> None:
    """Make `iteration` the latest of `root`, which is loaded by default."""
    replace_file(root / LATEST_NAME, f"{iteration}\n".encode())


def best_iteration(root: Path) -> int | None:
    """Return the iteration in best_checkpointed_iteration.txt; None: there is no such file, or it is damaged."""
    try:
        return _parse_iteration((root / BEST_NAME).read_bytes().decode("utf-8", "replace").strip())
    except FileNotFoundError:
        return None


def set_best(root: Path, iteration: int) -> None:
    """Make `iteration` the best of `root`, which --load ROOT/best loads and no retention rule deletes."""
    replace_file(root / BEST_NAME, f"{iteration}\n".encode())


def forget_best_after(root: Path, iteration: int) -> None:
    """Remove the record of a best checkpoint later than `iteration`; a resumed run restores the one before."""
    if (best_iteration(root) or 0) > iteration:
        (root / BEST_NAME).unlink()


def latest_problem(root: Path) -> str | None:
    """Return why the latest checkpoint of `root` cannot be loaded, with the file's name; None: it can."""
    text = read_latest(root)
    if text is None:
        return f"{root / LATEST_NAME} is missing"
    if (iteration := _parse_iteration(text)) is None:
        return f"{root / LATEST_NAME} contains {text[:40]!r} instead of an iteration"
    problem = incompleteness(locate(root, iteration))
    return problem and f"{root / LATEST_NAME} names iteration {text}, but {problem}"


def unrecorded_iteration(root: Path) -> int | None:
    """Return the iteration of a complete checkpoint that a job saved and was killed before it could make it the latest.

    It is newer than latest_checkpointed_iteration.txt. An older file with a later iteration was left by a rollback or
    a person, and does not count.
    """
    if (last := latest_iteration(root)) is None:
        return None
    recorded = (root / LATEST_NAME).stat().st_mtime_ns
    for iteration in reversed([number for number in list_iterations(root) if number > last]):
        path = locate(root, iteration)
        if is_complete(path) and (path / MANIFEST_NAME).stat().st_mtime_ns > recorded:
            return iteration
    return None


def find_checkpoint(
    load: str, iteration: int = 0, *, fallback: bool = False, notify: Callable[[str], None] = print
) -> Path | None:
    """Return the folder of the checkpoint that --load and --load-iteration mean.

    Args:
        load: a --save folder, one checkpoint's own folder iter_…, or a --save folder followed by /best.
        iteration: the iteration wanted; 0: the latest.
        fallback: --fallback-on-corrupt: take an earlier one if the latest is missing or damaged.
        notify: receives a line if the choice is not the latest.

    Returns:
        None if the folder is missing or holds no checkpoint yet (the caller decides whether that is a fresh start).

    Raises:
        CheckpointError: the checkpoint that was named, or the latest, is missing or incomplete; or the folder cannot
            be read.
    """
    try:
        path = Path(load)
        if path.is_file():
            raise CheckpointError(
                f"--load {path} is a file, not a folder",
                fix="Give --load the --save folder of a run, or one of its iter_… folders",
            )
        best = resolve_best(path)
        named = iteration_of(best) if path.is_dir() or best != path else None
        if named is not None:
            if iteration not in (0, named):
                raise CheckpointError(
                    f"--load {path} is the checkpoint of one iteration, and --load-iteration {iteration} asks for "
                    "another",
                    fix=f"Remove --load-iteration, or give --load {path.parent}",
                )
            return _require_complete(best)
        if iteration:
            return _require_complete(locate(path, iteration))
        found = _find_latest(path, fallback, notify)
        if found is None and (foreign := foreign_error(path)) is not None:
            raise foreign
        return found
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"Cannot read --load {load}: {reason(error)}{where}",
            fix=remedy(error, load, instead="give --load the --save folder of a run, or one of its iter_… folders"),
        ) from error


def resolve_best(load: Path) -> Path:
    """Return the folder of the best checkpoint if `load` is a --save folder followed by /best, else `load`.

    Raises:
        CheckpointError: no best checkpoint is recorded there.
    """
    root = load.parent
    if load.name != BEST or load.exists() or not (root / LATEST_NAME).exists():
        return load
    if (iteration := best_iteration(root)) is not None:
        return locate(root, iteration)
    raise CheckpointError(
        f"--load {load}: no best checkpoint is recorded in {root} ({BEST_NAME})",
        rule="A run records the checkpoint with the lowest validation loss if it has --save-best",
        fix=f"Give --load {root} for the latest checkpoint, or train with --save-best and validation data",
    )


def _find_latest(root: Path, fallback: bool, notify: Callable[[str], None]) -> Path | None:
    """Return the latest checkpoint; the newest complete one if none is recorded; None: nothing was ever saved."""
    text = read_latest(root)
    if text is None:
        complete = list_checkpoints(root)
        if complete:
            notify(f"{root / LATEST_NAME} is missing: loading the newest complete checkpoint, {complete[-1].name}")
        return complete[-1] if complete else None
    if (iteration := _parse_iteration(text)) is None:
        if (foreign := foreign_error(root)) is not None:
            raise foreign
        complete = list_checkpoints(root)
        problem = f"{root / LATEST_NAME} contains {text[:40]!r} instead of the number of an iteration"
        if fallback and complete and text != "release":  # Megatron's name of a checkpoint without an iteration
            notify(f"{problem}: loading the newest complete checkpoint, {complete[-1].name}")
            return complete[-1]
        raise CheckpointError(
            f"{problem}; complete checkpoints in that folder: {_names(complete)}",
            fix=f"Write {iteration_of(complete[-1])} into that file, add --load-iteration "
            f"{iteration_of(complete[-1])}, or add "
            "--fallback-on-corrupt to load the newest complete checkpoint"
            if complete
            else "Give --load the --save folder of a run, or remove --load to start from newly initialized weights",
        )
    wanted = locate(root, iteration)
    # The others are examined only if needed: each has a manifest of megabytes and a file for every rank.
    if fallback and (problem_of_wanted := incompleteness(wanted)) is not None:
        earlier = [entry for entry in list_checkpoints(root) if (iteration_of(entry) or 0) < iteration]
        if earlier:
            notify(f"{problem_of_wanted}: loading {earlier[-1].name} instead of the latest, {wanted.name}")
            return earlier[-1]
    return _require_complete(wanted)


def _parse_iteration(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _require_complete(checkpoint: Path) -> Path:
    problem = incompleteness(checkpoint)
    if problem is None:
        return checkpoint
    kind = CorruptCheckpointError if (checkpoint / MANIFEST_NAME).is_file() else CheckpointError
    others = list_checkpoints(checkpoint.parent)
    # DeepSpeed writes Megatron's text file beside its own folders.
    where = checkpoint if others or checkpoint.is_dir() else checkpoint.parent
    if (foreign := foreign_error(where)) is not None:
        raise foreign
    if others:
        fix = "Choose one of these with --load-iteration, or add --fallback-on-corrupt to load the newest complete one"
    elif not checkpoint.is_dir():
        fix = "Give --load the --save folder of a run, or remove --load to start from newly initialized weights"
    else:
        fix = "Copy the folder again if it was copied here; otherwise remove --load to train from scratch"
    raise kind(
        f"Cannot load {checkpoint.name}: {problem}; complete checkpoints in {checkpoint.parent}: {_names(others)}",
        fix=fix,
    )


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(entry.name for entry in checkpoints) or "none"
