"""Distributed checkpoint saving: every rank writes its shards to a temporary folder, rank 0 renames it."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lite import __version__
from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.pieces import Share, merge_shares
from megatron_lite.checkpoint.sharing import share_out
from megatron_lite.checkpoint.writing import DCP_METADATA_NAME, write_dcp_metadata, write_pieces
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_size
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.runs.atomic import replace_file, sync_folder, write_synced
from megatron_lite.runs.catalog import announce, folder_name
from megatron_lite.runs.manifest import MANIFEST_NAME, Manifest, Provenance, encode_manifest
from megatron_lite.runs.retention import KEEP_ALL, Retention, delete_expired
from megatron_lite.runs.turnover import make_visible, remove_stale


def no_check() -> None:
    """The folder is nobody else's."""


@dataclass(frozen=True)
class SaveReport:
    """What a save did, for the log.

    Attributes:
        path: the checkpoint's folder.
        size: bytes on disk, of all ranks together.
        seconds: from the call until it was announced.
        blocking_seconds: how much of that training stood still.
        removed: names of what was deleted: expired checkpoints and the remains of killed saves.
        problem: why an expired checkpoint could not be deleted; empty: they all were.
    """

    path: Path
    size: int
    seconds: float
    blocking_seconds: float
    removed: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class SaveRequest:
    """What is to be saved besides the tensors.

    Attributes:
        root: the folder of --save.
        iteration: the iteration that has just been finished.
        scalars: JSON values: progress, loss scaler, step counts. Rank 0's count.
        provenance: config and fingerprints of the run.
        retention: what is kept once this one is announced.
        check: called on the rank that completes the save before it changes the folder; raises to keep it from that.
    """

    root: Path
    iteration: int
    scalars: Mapping[str, Any]
    provenance: Provenance
    retention: Retention = KEEP_ALL
    check: Callable[[], None] = no_check

    @property
    def path(self) -> Path:
        """The folder that the checkpoint will have."""
        return self.root / folder_name(self.iteration)


def save_checkpoint(
    root: Path,
    iteration: int,
    tensors: Sequence[GlobalTensor],
    scalars: Mapping[str, Any],
    provenance: Provenance,
    world: Group,
    *,
    retention: Retention = KEEP_ALL,
    check: Callable[[], None] = no_check,
) -> SaveReport:
    """Writes a checkpoint and announces it; a collective call that returns once it is safe on the disk.

    Args:
        root: the folder of --save, which all ranks must share.
        iteration: the iteration that has just been finished.
        tensors: what this rank holds; over all ranks, each element must have exactly one writer, or
            replicas that share the work.
        scalars: JSON values; rank 0's count.
        provenance: config and fingerprints; rank 0's count.
        world: all ranks.
        retention: which checkpoints are kept; the others are deleted after this one is announced.
        check: as of SaveRequest.

    Raises:
        CheckpointError: it could not be written, on every rank. Earlier checkpoints are untouched and nothing of this
            one is left.
    """
    begun = time.monotonic()
    request = SaveRequest(root, iteration, scalars, provenance, retention, check)
    tensors = share_out(tensors)
    partial, stale = open_partial(request, size_to_write(tensors), world)
    try:
        run_on_all_ranks(world, lambda: write_share(partial, request, tensors, world))
        report = run_on_all_ranks(
            world, lambda: finish(partial, request, world, begun, stale) if world.rank == 0 else None
        )
    finally:
        # After a rename there is nothing here any more; after a failure this is what is left of it.
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    told: SaveReport = world.all_gather_object(report)[0]
    return told


def open_partial(request: SaveRequest, size: int, world: Group) -> tuple[Path, list[str]]:
    """Makes the folder that a save is written in, after removing what killed saves left; a collective call.

    Returns:
        The folder, and the names of what was removed.

    Raises:
        CheckpointError: there is no room, or no permission.
    """
    needed = sum(world.all_gather_object(size))

    def make() -> tuple[Path, list[str]]:
        request.check()
        try:
            request.root.mkdir(parents=True, exist_ok=True)
            stale = remove_stale(request.root)
            _check_room(request, needed)
            partial = request.path.with_name(f"{request.path.name}.partial-{secrets.token_hex(4)}")
            partial.mkdir()
        except OSError as error:
            raise explain(error, request, needed) from error
        return partial, stale

    return broadcast_from_rank0(world, make)


def write_share(partial: Path, request: SaveRequest, tensors: Sequence[GlobalTensor], world: Group) -> None:
    """Writes this rank's pieces, and a note of them for rank 0.

    Raises:
        CheckpointError: the disk is full, the folder is not shared, …
    """
    try:
        share = write_pieces(partial, tensors, world.rank)
        replace_file(share_path(partial, world.rank), share.encode())
    except OSError as error:
        raise explain(error, request, size_to_write(tensors)) from error


def share_path(partial: Path, rank: int) -> Path:
    """Where a rank leaves the note of what it wrote, until the save is finished."""
    return partial / f"share-{rank:05d}.json"


def finish(partial: Path, request: SaveRequest, world: Group, begun: float, stale: Sequence[str]) -> SaveReport:
    """Rank 0's part once all shares lie in the folder: manifest, rename, announcement, retention.

    Raises:
        CheckpointError: the shares do not add up, or the disk is full.
    """
    try:
        shares = [Share.decode(share_path(partial, rank).read_bytes()) for rank in range(world.size)]
        tensors = merge_shares(shares)
        files = {name: file for share in shares for name, file in share.files.items()}
        files[DCP_METADATA_NAME] = write_dcp_metadata(partial, tensors, files)
        writer = {
            "megatron_lite": __version__,
            "torch": torch.__version__,
            "world_size": world.size,
            "time": round(time.time(), 3),
        }
        manifest = Manifest(request.iteration, tensors, files, request.scalars, request.provenance, writer)
        write_synced(partial / MANIFEST_NAME, encode_manifest(manifest))
        for rank in range(world.size):
            share_path(partial, rank).unlink()
        sync_folder(partial)
        request.check()
        make_visible(partial, request.path)
        _announce(request, partial)
    except OSError as error:
        raise explain(error, request, 0) from error
    removed, problem = list[str](), ""
    try:
        removed = delete_expired(request.root, request.iteration, request.retention)
    except OSError as error:
        problem = f"what --keep-last does not keep cannot be deleted: {error.filename or ''} {error.strerror or error}"
    seconds = time.monotonic() - begun
    return SaveReport(request.path, manifest.size, seconds, seconds, (*stale, *removed), problem)


def _announce(request: SaveRequest, partial: Path) -> None:
    """Makes the finished folder the latest; one that cannot be announced is no checkpoint, and stays aside."""
    try:
        announce(request.root, request.iteration)
    except OSError:
        request.path.rename(partial)
        raise


def size_to_write(tensors: Sequence[GlobalTensor]) -> int:
    """Bytes of the pieces that this rank is the writer of."""
    return sum(piece.tensor.nbytes for tensor in tensors if tensor.write for piece in tensor.pieces)


def explain(error: OSError, request: SaveRequest, needed: int) -> CheckpointError:
    """The error for the user, with how much room there is."""
    found = f"iteration {request.iteration} in {request.root}: {error.strerror or error}"
    if error.filename:
        found += f" ({error.filename})"
    if isinstance(error, FileNotFoundError) and ".partial-" in str(error.filename):
        return CheckpointError(
            "One job at a time saves in a folder",
            found=f"{found}: another process removed what was being written",
            fix="See whether another job runs with the same --save, or whether hosts see different folders there",
        )
    try:
        found += f"; {format_size(shutil.disk_usage(request.root).free)} are free there"
    except OSError:
        found += "; the folder itself cannot be read"
    if needed:
        found += f", this rank writes {format_size(needed)}"
    return CheckpointError("A checkpoint must be written whole", found=found, fix=_ROOM)


_ROOM = "Earlier checkpoints are untouched. Make room, keep fewer with --keep-last, or give another --save"


def _check_room(request: SaveRequest, needed: int) -> None:
    free = shutil.disk_usage(request.root).free
    if free < needed:
        raise CheckpointError(
            "A save needs room for all of its bytes",
            found=f"iteration {request.iteration} takes {format_size(needed)}, {request.root} has {format_size(free)} "
            "free",
            fix=_ROOM,
        )
