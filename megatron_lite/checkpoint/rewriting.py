"""Offline checkpoint rewriting in one process: averaging, resharding into fewer files, dtype conversion.

Everything goes tile by tile from the old files to the new ones, so memory does not depend on the checkpoint's size. All
checkpoints are cut along one grid (tiles.py), so that each record is read once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.backend.group import LocalGroup
from megatron_lite.checkpoint.names import MAIN_PREFIX, OPTIMIZER_PREFIX, is_model_tensor, source_of
from megatron_lite.checkpoint.offline import read_rectangle
from megatron_lite.checkpoint.save import SaveReport, SaveRequest, explain, finish, open_partial, share_path
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.checkpoint.writing import PieceWriter
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.catalog import iteration_of
from megatron_lite.runs.manifest import Manifest, read_manifest

FILE_SIZE = 5 * 10**9
"""Bytes of a file of the new checkpoint, unless another limit is given."""


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of a new checkpoint, and a function that reads a rectangle (offset, shape) of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Sequence[int], Sequence[int]], Tensor]


def average(
    paths: Sequence[Path],
    output: Path,
    *,
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaveReport:
    """Writes a checkpoint whose weights are the mean of several checkpoints' weights, without optimizer state.

    The mean is taken of the fp32 main parameters where they were saved, added up in fp64. Iteration, progress and
    config are the last one's.

    Args:
        paths: at least two checkpoints of one run, or of runs of one model.
        output: the folder that the new checkpoint is saved in.
        file_size: bytes that a file of the new checkpoint has at most.
        progress: told the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: fewer than two, their weights differ in name or shape, `output` is a folder that one of them
            lies in or holds that iteration already, or there is no room. Nothing of the new one is left.
        CorruptCheckpointError: one of them is damaged where it is read.
    """
    if len(paths) < 2:
        raise CheckpointError(
            "An average is of at least two checkpoints",
            found=", ".join(map(str, paths)) or "none",
            fix="Name two or more, as RUN/iter_0000100 RUN/iter_0000200",
        )
    sources = [(path, read_manifest(path)) for path in paths]
    last = sources[-1][1]
    weights = {name: tensor for name, tensor in last.tensors.items() if is_model_tensor(name)}
    for path, manifest in sources:
        shapes = {name: tensor.shape for name, tensor in manifest.tensors.items() if is_model_tensor(name)}
        wanted = {name: tensor.shape for name, tensor in weights.items()}
        if shapes != wanted:
            names = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                "Averaged checkpoints must hold the same weights",
                found=f"{path} and {paths[-1]} differ in {', '.join(names[:5])}",
                fix="Average checkpoints of one model, saved in one precision",
            )

    def target(name: str) -> StreamedTensor:
        main, saved = MAIN_PREFIX + name, weights[name]
        source, dtype = main if main in weights else name, getattr(torch, saved.dtype)

        def mean(offset: Sequence[int], shape: Sequence[int]) -> Tensor:
            total = torch.zeros(tuple(shape), dtype=torch.float64)
            for path, manifest in sources:
                total += read_rectangle(path, manifest, source, offset, shape, torch.float64)
            return (total / len(sources)).to(dtype)

        return StreamedTensor(name, saved.shape, dtype, mean)

    return _rewrite(paths, output, last, [target(name) for name in weights], file_size, progress)


def reshard(
    path: Path,
    output: Path,
    *,
    weights_only: bool = False,
    dtype: str = "",
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaveReport:
    """Writes a checkpoint anew in files of bounded size, whatever number of ranks wrote it.

    Any layout reads it without this. It serves to keep or move a checkpoint of thousands of files, to drop optimizer
    state, and to store weights in fewer bytes.

    Args:
        path: the checkpoint.
        output: the folder that the new checkpoint is saved in.
        weights_only: leave the optimizer's state out, but for the fp32 main parameters, which are weights.
        dtype: float32, bfloat16 or float16: the weights in this dtype, made from the main parameters where these were
            saved, and nothing else. Empty: every bit of every tensor stays.
        file_size: bytes that a file of the new checkpoint has at most.
        progress: told the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: `output` is the folder it lies in or holds that iteration already, or there is no room.
            Nothing of the new one is left.
        CorruptCheckpointError: it is damaged where it is read.
    """
    manifest = read_manifest(path)
    saved = manifest.tensors

    def target(name: str) -> StreamedTensor:
        source = source_of(name, bool(dtype), saved) or name
        old = getattr(torch, saved[source].dtype)
        new = getattr(torch, dtype) if dtype and old.is_floating_point else old
        return StreamedTensor(
            name,
            saved[name].shape,
            new,
            lambda offset, shape: read_rectangle(path, manifest, source, offset, shape, new),
        )

    def is_kept(name: str) -> bool:
        if dtype:
            return not name.startswith(OPTIMIZER_PREFIX)
        return is_model_tensor(name) or not weights_only

    return _rewrite([path], output, manifest, [target(name) for name in saved if is_kept(name)], file_size, progress)


def _rewrite(
    sources: Sequence[Path],
    output: Path,
    manifest: Manifest,
    targets: Sequence[StreamedTensor],
    file_size: int,
    progress: Callable[[int, int], None],
) -> SaveReport:
    request = SaveRequest(output, manifest.iteration, manifest.scalars, manifest.provenance)
    _check_output(sources, request)
    return write_streamed(request, targets, file_size, progress)


def write_streamed(
    request: SaveRequest,
    targets: Sequence[StreamedTensor],
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaveReport:
    """Write a checkpoint in one process, a tile at a time; it appears under its name once it is complete.

    Args:
        request: where to, and what it holds besides tensors.
        targets: the tensors.
        file_size: bytes that a file has at most.
        progress: told the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: there is no room, or a tensor cannot be read. Nothing of the checkpoint is left.
    """
    begun = time.monotonic()
    world = LocalGroup("world")
    # Of these only shapes and dtypes count: for the room that is needed.
    planned = [_planned(target) for target in targets]
    total, done = sum(piece.tensor.nbytes for tensor in planned for piece in tensor.pieces), 0
    partial, stale = open_partial(request, planned, world)
    try:
        with PieceWriter(partial, world.rank, file_size) as writer:
            for target in targets:
                for offset, shape in tiles(target.shape, target.dtype.itemsize, (0,) * len(target.shape), target.shape):
                    tensor = target.read(offset, shape)
                    writer.write(target.name, target.shape, offset, tensor)
                    done += tensor.nbytes
                    progress(done, total)
        share = writer.share(tuple(target.name for target in targets))
        replace_file(share_path(partial, world.rank), share.encode())
        return finish(partial, request, world, begun, stale)
    except OSError as error:
        raise explain(error, request, total) from error
    finally:
        # After the rename there is nothing here any more; after a failure or Ctrl-C this is what is left of it.
        shutil.rmtree(partial, ignore_errors=True)


def _check_output(sources: Sequence[Path], request: SaveRequest) -> None:
    if request.root.resolve() in {source.resolve().parent for source in sources}:
        raise CheckpointError(
            "A checkpoint is rewritten into another folder",
            found=f"{', '.join(str(path) for path in sources)} and --output {request.root}",
            fix="Give --output another folder",
        )
    if iteration_of(request.root) is not None:
        raise CheckpointError(
            "A checkpoint is written into a folder of checkpoints, not into one of them",
            found=f"--output {request.root}",
            fix=f"Give --output {request.root.parent}: iter_… is made in it",
        )
    if request.path.exists():
        raise CheckpointError(
            "A rewritten checkpoint takes no other's place",
            found=f"{request.path} is there already",
            fix="Give --output another folder, or remove that one first",
        )


def _planned(target: StreamedTensor) -> GlobalTensor:
    tensor = torch.empty(target.shape, dtype=target.dtype, device="meta")
    return GlobalTensor(target.name, target.shape, target.dtype, [Piece((0,) * len(target.shape), tensor)])
