"""Hub repository as the destination of `megatron-lite sync`: one commit for the logs, one for each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.hub import MAIN, Hub
from megatron_lite.ops.sync import STATE_FOLDER, Advance
from megatron_lite.ops.sync_files import Batch, SourceGone, SyncFile


class HubDestination:
    """A repository that holds the copy of one run. Its record and lock are in the run's folder.

    Args:
        hub: the repository.
        run: the --save folder.
    """

    def __init__(self, hub: Hub, run: Path) -> None:
        self.name = hub.name
        self.state = run / STATE_FOLDER / hub.name.replace("/", "--")
        self._hub = hub

    def check(self, known: bool) -> None:
        """Accept any repository: its history keeps what a commit replaces."""

    def is_current(self, file: SyncFile, recorded: Sequence[int] | None) -> bool:
        """Return whether the record has size and stamp of the file; the hub itself compares checksums."""
        return recorded == [file.size, file.stamp]

    def put(self, batch: Batch, files: Sequence[SyncFile], advance: Advance) -> dict[str, list[int]]:
        """Upload files and commit them; files that the hub has already are not sent again."""
        made = {file.name: [file.size, file.stamp] for file in files}
        with TemporaryDirectory(prefix="megatron-lite-sync-") as folder:
            paths: dict[str, Path] = {}
            for number, file in enumerate(files):
                if file.grows or isinstance(file.source, bytes):
                    paths[file.name] = Path(folder) / str(number)
                    made[file.name] = _write_copy(file, paths[file.name])
                else:
                    paths[file.name] = file.source

            def uploaded(names: Sequence[str]) -> None:
                advance(sum(made[name][0] for name in names))
                if batch.folder:
                    batch.require_unchanged()

            try:
                self._hub.commit(paths, MAIN, batch.title, uploaded=uploaded)
            except CheckpointError:
                if batch.folder:  # a file that was deleted meanwhile is no fault of the hub
                    batch.require_unchanged()
                raise
        return made

    def delete(self, names: Sequence[str]) -> None:
        """Delete files by one commit."""
        self._hub.commit({}, MAIN, f"delete {len(names)} files", deleted=names)

    def finish(self) -> None:
        """Do nothing: a commit leaves nothing behind."""


def _write_copy(file: SyncFile, path: Path) -> list[int]:
    """Copy a growing file up to its consistent end; return size and stamp."""
    source, size, stamp = file.open()
    with source, path.open("wb") as copy:
        left = size
        while left and (chunk := source.read(min(2**20, left))):
            copy.write(chunk)
            left -= len(chunk)
    if left:
        raise SourceGone(file.name)
    return [size, stamp]
