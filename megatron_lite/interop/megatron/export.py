"""Foreign checkpoint writers: Megatron-LM classic and DeepSpeed layer files, any tensor and pipeline size.

One file is in memory at a time. The result is read again and compared with the checkpoint bit for bit before it gets
its name.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.stored_model import StoredModel, stored_model
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.config.divisors import divisors
from megatron_lite.config.parameters import HEAD, WORD_EMBEDDINGS, ParameterLayout, parameter_layouts
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.errors import CheckpointError, ConfigError, report_bug
from megatron_lite.interop.architectures.base import sharing_problems
from megatron_lite.interop.export import Weights, checkpoint_to_export, require_weights
from megatron_lite.interop.mapping import Entry, ExportedTensors
from megatron_lite.interop.megatron.arrangements import CURRENT_VERSION, arrangement_of
from megatron_lite.interop.megatron.classic import FILE
from megatron_lite.interop.megatron.naming import (
    DEEPSPEED,
    EMBEDDING_FILE,
    FIRST_LAYER_FILE,
    LEGACY,
    NAMINGS,
    Scheme,
    final_norm_file,
)
from megatron_lite.interop.megatron.opening import MegatronOptions, open_megatron
from megatron_lite.interop.megatron.written_arguments import (
    gate_first,
    is_deepspeed_only,
    problems,
    written_arguments,
)
from megatron_lite.interop.output_folder import check_output, new_folder
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.foreign import recognise
from megatron_lite.schedules.progress import Progress

_SPARE = 1 << 20
_NESTED = {"language_model.embedding.": 3, "language_model.": 2, "word_embeddings_for_head.": 1}
"""Levels of dicts in the legacy naming; what follows is one key."""
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class MegatronExportOptions:
    """Options of an export as Megatron-LM or DeepSpeed files.

    Attributes:
        to: the format.
        tp: tensor-parallel size of the files.
        pp: pipeline size of the files.
        naming: naming scheme of Megatron-LM files, see NAMINGS; empty: follows from the model.
        dtype: of the weights; None: as they were saved.
        averaged: export the moving average of the weights.
    """

    to: Literal["megatron", "deepspeed"] = "megatron"
    tp: int = 1
    pp: int = 1
    naming: str = ""
    dtype: torch.dtype | None = None
    averaged: bool = False


@dataclass(frozen=True, eq=False)
class MegatronExport:
    """An export whose every precondition holds: the checkpoint, and how it is written."""

    path: Path
    stored: StoredModel
    weights: Weights
    layouts: Mapping[str, ParameterLayout]
    scheme: Scheme
    progress: Progress
    dtype: torch.dtype
    options: MegatronExportOptions

    @property
    def rows(self) -> int:
        """Rows of the padded vocabulary."""
        model = self.stored.model
        return padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, self.options.tp)

    @property
    def layers_of_stage(self) -> int:
        """Layers of one pipeline stage."""
        return self.stored.model.num_layers // self.options.pp


def plan_megatron_export(load: str, iteration: int, options: MegatronExportOptions) -> MegatronExport:
    """Check everything that an export needs, before any work.

    Args:
        load: a run's --save folder, or one checkpoint in it.
        iteration: which one; 0: the latest.
        options: see MegatronExportOptions.

    Raises:
        CheckpointError: there is no checkpoint, it lacks a weight, or the format cannot express the model.
        ConfigError: the sizes do not divide the model.
    """
    path = checkpoint_to_export(load, iteration)
    reader = CheckpointReader(path)
    manifest = reader.manifest
    stored = stored_model(manifest, path)
    model = stored.model
    scheme = _scheme(stored, options)
    found = list(problems(model, scheme))
    if found:
        raise CheckpointError(
            f"The model cannot be exported in {scheme.title}, which does not support {', '.join(found)}",
            fix="Use --to hf"
            if list(sharing_problems(model))
            else "Use --to hf, or another --naming (megatron-lite export --help lists them)",
        )
    for name, value, size, flag in (
        ("query groups", model.num_query_groups, options.tp, "--target-tensor-parallel"),
        ("channels of the MLP", model.ffn_hidden_size, options.tp, "--target-tensor-parallel"),
        ("layers", model.num_layers, options.pp, "--target-pipeline-parallel"),
    ):
        if size < 1 or value % size:
            raise ConfigError(
                f"Cannot split {value} {name} over {size} ranks ({flag} {size})", fix=f"Use {flag} {divisors(value)}"
            )
    layouts = parameter_layouts(model)
    weights = Weights(reader, tuple(layouts), options.dtype, averaged=options.averaged)
    require_weights(weights, {name: layout.shape for name, layout in layouts.items()}, path)
    dtype = options.dtype or getattr(torch, reader.tensors[WORD_EMBEDDINGS].dtype)
    progress = Progress.from_dict(manifest.scalars["progress"])
    progress = replace(progress, iteration=manifest.iteration)
    return MegatronExport(path, stored, weights, layouts, scheme, progress, dtype, options)


def export_megatron(
    plan: MegatronExport, output: Path, advance: Advance = lambda what, done, total: None
) -> tuple[list[str], int]:
    """Write the files.

    Args:
        plan: from plan_megatron_export.
        output: the folder to make; it must not exist, or be empty.
        advance: called with the current step, the amount done and the total.

    Returns:
        Names of the files, and their bytes.

    Raises:
        CheckpointError: a weight is not finite, the output exists, or there is no room. Nothing is left of the output.
    """
    check_output(output)
    total = _size(plan)
    with new_folder(output, total + _SPARE) as partial:
        write = _write_deepspeed if plan.scheme is DEEPSPEED else _write_classic
        done = 0
        for path, content in write(plan, partial):
            _save(content, path)
            done += path.stat().st_size
            del content  # before the next one is made
            advance("exporting", min(done, total), total)
        _read_back(plan, partial, advance)
        files = sorted(entry for entry in partial.rglob("*") if entry.is_file())
        names = [entry.relative_to(partial).as_posix() for entry in files]
        return names, sum(entry.stat().st_size for entry in files)


def _save(content: dict[str, Any], path: Path) -> None:
    """Write a file as torch.save does.

    Raises:
        OSError: it cannot be written. torch.save's own error, that its archive is incomplete, hides the cause.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _scheme(stored: StoredModel, options: MegatronExportOptions) -> Scheme:
    if options.to == "deepspeed":
        return DEEPSPEED
    return (
        NAMINGS[options.naming] if options.naming else LEGACY if is_deepspeed_only(stored.model) else NAMINGS["local"]
    )


def _write_classic(plan: MegatronExport, root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every rank's file and its content."""
    folder = root / f"iter_{plan.progress.iteration:07d}"
    tp, pp = plan.options.tp, plan.options.pp
    for stage in range(pp):
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            yield folder / name / FILE, _general(plan) | {"model": _stage(plan, stage, rank)}
    (root / "latest_checkpointed_iteration.txt").write_text(str(plan.progress.iteration), encoding="utf-8")


def _write_deepspeed(plan: MegatronExport, root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every layer file and every mp_rank file, and their contents."""
    folder = root / f"global_step{plan.progress.iteration}"
    model, tp, pp = plan.stored.model, plan.options.tp, plan.options.pp
    numbers = [EMBEDDING_FILE, *range(FIRST_LAYER_FILE, FIRST_LAYER_FILE + model.num_layers)]
    for number in (*numbers, final_norm_file(model.num_layers)):
        prefix = f"{number}."
        for rank in range(tp):
            content = OrderedDict(
                (theirs.removeprefix(prefix), _part(plan, ours, rank))
                for ours, theirs in plan.scheme.table(plan.layouts, model.num_layers).items()
                if theirs.startswith(prefix)
            )
            yield folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt", content
    for rank in range(tp * pp):
        general = _general(plan) | {
            "module": None,
            "global_steps": plan.progress.iteration,
            "skipped_steps": plan.progress.skipped_iterations,
            "dp_world_size": 1,
            "mp_world_size": tp * pp,
        }
        yield folder / f"mp_rank_{rank:02d}_model_states.pt", general
    (root / "latest").write_text(folder.name, encoding="utf-8")


def _general(plan: MegatronExport) -> dict[str, Any]:
    """Return what every file says besides its tensors."""
    model = plan.stored.model
    args = written_arguments(
        model,
        plan.scheme,
        tp=plan.options.tp,
        pp=plan.options.pp,
        rows=plan.rows,
        progress=plan.progress,
        seq_length=plan.stored.seq_length,
        dtype=plan.dtype,
    )
    return {
        "args": Namespace(**args),
        "checkpoint_version": CURRENT_VERSION,
        "iteration": plan.progress.iteration,
        "tokens": plan.progress.consumed_train_tokens,
        "checkpoint_info": {"padded_vocab_size": plan.rows, "original_vocab_size": model.vocab_size},
    }


def _stage(plan: MegatronExport, stage: int, rank: int) -> dict[str, Any]:
    """Return the state dict of one rank: layers are numbered within the stage, the last one has the head's table."""
    model, size, last = plan.stored.model, plan.layers_of_stage, stage == plan.options.pp - 1
    content: dict[str, Any] = OrderedDict()
    for ours in plan.layouts:
        words = ours.split(".")
        is_layer = ours.startswith("decoder.layers.")
        if is_layer:
            home, words[2] = int(words[2]) // size, str(int(words[2]) % size)
        else:
            home = 0 if ours.startswith("embedding.") else plan.options.pp - 1
        if home == stage:
            _put(content, plan.scheme, plan.scheme.theirs(".".join(words), model.num_layers), _part(plan, ours, rank))
    if last and stage and model.tied_embeddings:
        (name,) = plan.scheme.head_copies
        _put(content, plan.scheme, name, _part(plan, WORD_EMBEDDINGS, rank))
    return content


def _put(content: dict[str, Any], scheme: Scheme, name: str, tensor: Tensor) -> None:
    """Set a tensor, in nested dicts if the naming has them."""
    levels = 0
    if scheme is LEGACY:
        levels = next(depth for prefix, depth in _NESTED.items() if name.startswith(prefix))
    *outer, key = name.split(".", levels)
    for word in outer:
        content = content.setdefault(word, OrderedDict())
    content[key] = tensor


def _part(plan: MegatronExport, ours: str, rank: int) -> Tensor:
    """Return one tensor-parallel rank's part of a tensor in their order.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    layout, model, tp = plan.layouts[ours], plan.stored.model, plan.options.tp
    source = ExportedTensors(plan.weights, [Entry(ours, (ours,))], plan.dtype, plan.path)
    offset, shape, missing = [0] * len(layout.shape), list(layout.shape), 0
    if layout.tp_dim is not None:
        whole = plan.rows if ours in (WORD_EMBEDDINGS, HEAD) else shape[layout.tp_dim]
        length = whole // tp
        begin = min(rank * length, shape[layout.tp_dim])
        end = min((rank + 1) * length, shape[layout.tp_dim])
        missing = length - (end - begin)
        offset[layout.tp_dim], shape[layout.tp_dim] = begin, end - begin
    tensor = source.read(ours, Rectangle(tuple(offset), tuple(shape)))
    if missing:
        tensor = torch.cat((tensor, tensor.new_zeros(missing, *shape[1:])))
    arrangement = arrangement_of(ours, model, CURRENT_VERSION, gate_first=gate_first(model, plan.scheme))
    return (tensor if arrangement is None else arrangement.to_theirs(tensor)).contiguous()


def _size(plan: MegatronExport) -> int:
    """Return about how many bytes the files have."""
    tp, itemsize = plan.options.tp, plan.dtype.itemsize
    total = 0
    for ours, layout in plan.layouts.items():
        size = prod(layout.shape) * (1 if layout.tp_dim is not None else tp)
        if ours in (WORD_EMBEDDINGS, HEAD):
            size = plan.rows * layout.shape[1]
        total += size * itemsize
    if plan.options.pp > 1 and plan.stored.model.tied_embeddings and plan.scheme is not DEEPSPEED:
        total += plan.rows * plan.stored.model.hidden_size * itemsize
    return total


def _read_back(plan: MegatronExport, folder: Path, advance: Advance) -> None:
    """Compare what was written with the checkpoint, tensor by tensor.

    Raises:
        CheckpointError: a tensor is another one.
    """
    found = recognise(folder)
    assert found is not None
    written = open_megatron(found, MegatronOptions(weights_only=True))
    entries = [Entry(name, (name,)) for name in plan.layouts]
    expected = ExportedTensors(plan.weights, entries, plan.dtype, plan.path)
    for number, (name, info) in enumerate(expected.tensors.items(), 1):
        advance("reading back", number, len(entries))
        same = written.tensors.tensors[name] == info and all(
            expected.read(name, tile).equal(written.tensors.read(name, tile))
            for tile in tiles(info.shape, info.itemsize)
        )
        if not same:
            raise CheckpointError(
                f"The export is not correct: the tensor {name} in {folder} differs from that in {plan.path}",
                fix="The export was discarded; give the command again. If the error comes again: " + report_bug(),
            )
