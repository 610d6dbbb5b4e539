"""Offline checkpoint rewriting in one process: averaging, resharding into fewer files, dtype conversion.

Tensors are copied tile by tile, so memory does not depend on the checkpoint's size. All checkpoints are cut along one
grid (tiles.py), so that each record is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.backend.group import LocalGroup
from megatron_lite.checkpoint.names import MAIN_PREFIX, OPTIMIZER_PREFIX, is_model_tensor, source_of
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.sources import TensorInfo, TensorSource
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.checkpoint.writing import CheckpointWriter, SaveReport, SaveRequest
from megatron_lite.errors import CheckpointError
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.catalog import iteration_of
from megatron_lite.runs.manifest import Manifest

FILE_SIZE = 5 * 10**9
"""Default maximum bytes of a file of the new checkpoint."""


class _Mean:
    """Mean of the weights of several checkpoints as a TensorSource: of the main parameters where they were saved.

    Args:
        sources: the checkpoints, which hold the same tensors.
        names: of the weights.
    """

    def __init__(self, sources: Sequence[CheckpointReader], names: Iterable[str]) -> None:
        self._sources = sources
        self.tensors: Mapping[str, TensorInfo] = {name: sources[-1].tensors[name] for name in names}

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return the mean of a rectangle, added up in fp64."""
        main = MAIN_PREFIX + name
        total = torch.zeros(rectangle.shape, dtype=torch.float64)
        for source in self._sources:
            total += source.read(main if main in source.tensors else name, rectangle)
        return (total / len(self._sources)).to(getattr(torch, self.tensors[name].dtype))


class _Selection:
    """Some tensors of a checkpoint as a TensorSource.

    Args:
        source: the checkpoint.
        names: of the tensors.
        dtype: to which floating-point tensors are converted, from the main parameter where it was saved; empty: as is.
    """

    def __init__(self, source: CheckpointReader, names: Iterable[str], dtype: str) -> None:
        self._source = source
        saved = source.manifest.tensors
        self._source_of = {name: (dtype and source_of(name, True, saved)) or name for name in names}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(saved[old].shape, _converted(saved[old].dtype, dtype))
            for name, old in self._source_of.items()
        }

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a tensor, converted."""
        return self._source.read(self._source_of[name], rectangle).to(getattr(torch, self.tensors[name].dtype))


def average(
    paths: Sequence[Path],
    output: Path,
    *,
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaveReport:
    """Write a checkpoint whose weights are the mean of several checkpoints' weights, without optimizer state.

    The mean is taken of the fp32 main parameters where they were saved, summed in fp64. Iteration, progress and config
    are those of the last checkpoint.

    Args:
        paths: at least two checkpoints of one run, or of runs of one model.
        output: folder in which the new checkpoint is saved.
        file_size: maximum bytes of a file of the new checkpoint.
        progress: called with the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: there are fewer than two, their weights differ in name or shape, `output` contains one of them
            or a checkpoint of that iteration, or there is no room. Nothing of the new one is left.
        CorruptCheckpointError: a record that is read is damaged.
    """
    if len(paths) < 2:
        raise CheckpointError(
            f"Averaging needs at least two checkpoints, and {len(paths)} is given: "
            f"{', '.join(map(str, paths)) or 'none'}",
            fix="Name two or more, for example RUN/iter_0000100 RUN/iter_0000200",
        )
    sources = [CheckpointReader(path) for path in paths]
    last = sources[-1].manifest
    weights = [name for name in last.tensors if is_model_tensor(name)]
    wanted = {name: last.tensors[name].shape for name in weights}
    for path, source in zip(paths, sources, strict=True):
        shapes = {name: info.shape for name, info in source.tensors.items() if is_model_tensor(name)}
        if shapes != wanted:
            names = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                f"Cannot average {path} and {paths[-1]}: they are checkpoints of different models, in which these "
                "tensors are "
                f"missing or have other shapes: {', '.join(names[:5])}",
                fix="Give checkpoints of the same model",
            )

    return _rewrite(paths, output, last, _Mean(sources, weights), file_size, progress)


def reshard(
    path: Path,
    output: Path,
    *,
    weights_only: bool = False,
    dtype: str = "",
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaveReport:
    """Rewrite a checkpoint in files of bounded size, whatever number of ranks wrote it.

    Loading in another layout needs no rewriting. It serves to keep or move a checkpoint of thousands of files, to drop
    optimizer state, and to store weights in fewer bytes.

    Args:
        path: the checkpoint.
        output: the folder that the new checkpoint is saved in.
        weights_only: leave out the optimizer's state except the fp32 main parameters, which are weights.
        dtype: float32, bfloat16 or float16: write the weights alone in this dtype, converted from the main parameters
            where these were saved. Empty: keep every bit of every tensor.
        file_size: bytes that a file of the new checkpoint has at most.
        progress: called with the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: `output` contains it or a checkpoint of that iteration, or there is no room. Nothing of the new
            one is left.
        CorruptCheckpointError: a record that is read is damaged.
    """
    source = CheckpointReader(path)
    names = [
        name
        for name in source.tensors
        if not name.startswith(OPTIMIZER_PREFIX) or (not dtype and (is_model_tensor(name) or not weights_only))
    ]
    return _rewrite([path], output, source.manifest, _Selection(source, names, dtype), file_size, progress)


def _rewrite(
    sources: Sequence[Path],
    output: Path,
    manifest: Manifest,
    tensors: TensorSource,
    file_size: int,
    progress: Callable[[int, int], None],
) -> SaveReport:
    """Write tensors with a manifest's iteration, scalars and provenance."""
    request = SaveRequest(output, manifest.iteration, manifest.scalars, manifest.provenance)
    check_output(sources, output, request)
    return write_source(request, tensors, file_size, progress)


def check_output(sources: Sequence[Path], output: Path, request: SaveRequest) -> None:
    """Refuse an output that would replace anything.

    Args:
        sources: checkpoints from which the command reads.
        output: folder in which the new checkpoint is saved.
        request: of the new checkpoint.

    Raises:
        CheckpointError: `output` holds a source or the result already, or is a checkpoint.
    """
    if output.resolve() in {source.resolve().parent for source in sources}:
        raise CheckpointError(
            f"--output {output} is the folder of "
            f"{', '.join(str(path) for path in sources if path.resolve().parent == output.resolve())}, "
            "from which the command reads",
            fix="Give --output another folder",
        )
    if iteration_of(output) is not None:
        raise CheckpointError(
            f"--output {output} has the name of a single checkpoint, but --output is the folder in which checkpoints "
            "are "
            "created",
            fix=f"Give --output a folder such as {output.parent}; the result is {request.path.name} inside it",
        )
    if request.path.exists():
        raise CheckpointError(
            f"The result, {request.path}, exists already",
            fix="Give --output another folder",
        )


def write_source(
    request: SaveRequest,
    source: TensorSource,
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaveReport:
    """Write the tensors of a source as a checkpoint in one process, a tile at a time.

    Args:
        request: destination, and the content besides tensors.
        source: the tensors.
        file_size: maximum bytes of a file.
        progress: called with the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: there is no room, or a tensor cannot be read. Nothing of the checkpoint is left.
    """
    total, done = sum(info.full.numel * info.itemsize for info in source.tensors.values()), 0
    with CheckpointWriter(request, LocalGroup("world"), total, file_size) as writer:
        for name, info in source.tensors.items():
            for tile in tiles(info.shape, info.itemsize):
                tensor = source.read(name, tile)
                writer.add(name, info.shape, tile, tensor)
                done += tensor.nbytes
                progress(done, total)
        writer.close()
        return writer.finish()


def _converted(saved: str, wanted: str) -> str:
    return wanted if wanted and getattr(torch, saved).is_floating_point else saved
