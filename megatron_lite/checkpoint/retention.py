"""Which checkpoints are kept, and the deletion of the others once a newer one is safe."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_lite.checkpoint.catalog import folder_name, iteration_of, list_checkpoints


def expired(iterations: Iterable[int], newest: int, keep_last: int) -> list[int]:
    """The iterations whose checkpoints go, oldest first.

    Args:
        iterations: those of all complete checkpoints.
        newest: the one that was just saved. Later ones belong to a history that was rolled back: they are left alone,
            and do not count as newer.
        keep_last: how many are kept, `newest` among them; 0: all.
    """
    past = sorted(iteration for iteration in iterations if iteration <= newest)
    return past[:-keep_last] if keep_last > 0 else []


def delete_expired(root: Path, newest: int, keep_last: int) -> list[str]:
    """Deletes what `expired` says, and returns the names of the folders that went.

    A folder first gets another name, so that one that is half deleted is never taken for a checkpoint.

    Raises:
        OSError: a folder cannot be renamed or removed.
    """
    if keep_last <= 0:
        return []
    found = [iteration_of(checkpoint) for checkpoint in list_checkpoints(root)]
    names = [folder_name(number) for number in expired([n for n in found if n is not None], newest, keep_last)]
    for name in names:
        going = root / f"{name}.deleted-{secrets.token_hex(4)}"
        (root / name).rename(going)
        shutil.rmtree(going)
    return names
