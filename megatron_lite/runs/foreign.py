"""Detection of foreign checkpoints: Megatron-LM, DeepSpeed and Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.manifest import MANIFEST_NAME


class Kind(Enum):
    """Format of a checkpoint; the values are the words of `megatron-lite import --from`."""

    MEGATRON_LITE = "megatron_lite"
    HUGGING_FACE = "hf"
    MEGATRON = "megatron"
    MEGATRON_DIST = "megatron-dist"
    DEEPSPEED = "deepspeed"
    DEEPSPEED_UNIVERSAL = "deepspeed-universal"


PATTERNS = {
    MANIFEST_NAME: (Kind.MEGATRON_LITE, "a checkpoint of megatron_lite"),
    "mp_rank_*/*optim*.pt": (
        Kind.MEGATRON,
        "a Megatron-LM checkpoint (torch format, a folder mp_rank_XX for each rank)",
    ),
    # First of DeepSpeed's, for it has files of each rank as well.
    "zero/*/fp32.pt": (Kind.DEEPSPEED_UNIVERSAL, "a DeepSpeed universal checkpoint"),
    "layer_*-model_*states.pt": (
        Kind.DEEPSPEED,
        "a DeepSpeed pipeline checkpoint (global_stepN, a file for each layer)",
    ),
    "*mp_rank_*_model_states.pt": (Kind.DEEPSPEED, "a DeepSpeed checkpoint (global_stepN, a file for each rank)"),
    "metadata.json": (Kind.MEGATRON_DIST, "a Megatron-LM distributed checkpoint (torch_dist, .distcp files)"),
    "common.pt": (Kind.MEGATRON_DIST, "a Megatron-LM distributed checkpoint (torch_dist, .distcp files)"),
    "*.safetensors": (Kind.HUGGING_FACE, "a Hugging Face model (safetensors)"),
    "pytorch_model*.bin": (Kind.HUGGING_FACE, "a Hugging Face model (pytorch_model.bin)"),
    "*.index.json": (Kind.HUGGING_FACE, "a Hugging Face model (an index of its weights)"),
}
"""What a checkpoint's folder holds, as a glob, and what it is then; the first that matches counts."""
ANNOUNCED = {"latest_checkpointed_iteration.txt": "iter_{:0>7}", "latest": "{}", "latest_universal": "{}"}
"""Text files beside checkpoints that name the latest one."""


@dataclass(frozen=True)
class Recognised:
    """A checkpoint that was found in a folder.

    Attributes:
        kind: its format.
        folder: the folder that holds its files: the one given, or one inside it (iter_0000100, global_step100).
        file: the file by which it was recognised.
        title: what it is, for messages.
    """

    kind: Kind
    folder: Path
    file: Path
    title: str


def recognise(folder: Path) -> Recognised | None:
    """Return the checkpoint that a folder is, or the latest of those that it holds; None: none is recognised.

    Of a --save folder of megatron_lite it is the checkpoint that is found first; catalog.find_checkpoint chooses.
    """
    for candidate in _candidates(folder):
        for pattern, (kind, title) in PATTERNS.items():
            if (file := next(candidate.glob(pattern), None)) is not None:
                return Recognised(kind, candidate, file, title)
    return None


def foreign_error(load: Path) -> CheckpointError | None:
    """Return the error for a folder that holds a checkpoint of another program; None if none is recognised.

    Args:
        load: the folder of one checkpoint, or the one that holds several.
    """
    found = recognise(load)
    if found is None or found.kind is Kind.MEGATRON_LITE:
        return None
    finetune = (
        " --finetune"
        if found.kind is Kind.HUGGING_FACE
        else ", with --finetune if it is imported without optimizer state"
    )
    return CheckpointError(
        f"{found.folder} is {found.title}, as the file {found.file.relative_to(found.folder)} shows",
        rule="--load reads checkpoints of megatron_lite",
        fix=f"Import it with `megatron-lite import {found.folder} --output NEW`, then give --load NEW{finetune}",
    )


def _candidates(load: Path) -> Iterator[Path]:
    """Yield the folder itself, the one that it announces as the latest, and what it holds by the usual names."""
    if not load.is_dir():
        return
    yield load
    for name, form in ANNOUNCED.items():
        if (load / name).is_file():
            text = (load / name).read_text(encoding="utf-8", errors="replace").strip()
            # A name with a slash would lead elsewhere.
            if len(text) < 100 and "\x00" not in text:
                yield load / (form.format(text) if text.isdecimal() else Path(text or ".").name)
    for pattern in ("iter_*", "release", "global_step*", "checkpoint-*"):
        found = [path for path in load.glob(pattern) if path.is_dir()]
        yield from sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)
