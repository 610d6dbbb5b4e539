"""Detection of foreign checkpoints: Megatron-LM, DeepSpeed and Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.manifest import MANIFEST_NAME

KINDS = {
    "mp_rank_*/*optim*.pt": "a Megatron-LM checkpoint (torch format, a folder mp_rank_XX for each rank)",
    "metadata.json": "a Megatron-LM distributed checkpoint (torch_dist, .distcp files)",
    "common.pt": "a Megatron-LM distributed checkpoint (torch_dist, .distcp files)",
    "*mp_rank_*_model_states.pt": "a DeepSpeed checkpoint (global_stepN, a file for each rank)",
    "layer_*-model_*states.pt": "a DeepSpeed pipeline checkpoint (global_stepN, a file for each layer)",
    "zero/*/fp32.pt": "a DeepSpeed universal checkpoint",
    "*.safetensors": "a Hugging Face model (safetensors)",
    "pytorch_model*.bin": "a Hugging Face model (pytorch_model.bin)",
}
"""What a checkpoint's folder holds, as a glob, and what it is then; the first that matches counts."""
ANNOUNCED = {"latest_checkpointed_iteration.txt": "iter_{:0>7}", "latest": "{}", "latest_universal": "{}"}
"""Text files beside checkpoints that name the latest one."""


def foreign_error(load: Path) -> CheckpointError | None:
    """The error for a folder that holds a checkpoint of another program; None if none is recognised.

    Args:
        load: the folder of one checkpoint, or the one that holds several.
    """
    for folder in _candidates(load):
        if (folder / MANIFEST_NAME).is_file():
            return None
        for pattern, kind in KINDS.items():
            if (file := next(folder.glob(pattern), None)) is not None:
                return CheckpointError(
                    "--load takes checkpoints that megatron_lite wrote",
                    found=f"{folder} is {kind}: it holds {file.relative_to(folder)}",
                    fix="Importing other programs' weights is not built yet. Give the --save folder of a run of "
                    "megatron_lite, or leave --load out to start from fresh weights",
                )
    return None


def _candidates(load: Path) -> Iterator[Path]:
    """The folder itself, the one that it announces as the latest, and what it holds by the usual names."""
    if not load.is_dir():
        return
    yield load
    for name, form in ANNOUNCED.items():
        if (load / name).is_file():
            text = (load / name).read_text(encoding="utf-8", errors="replace").strip()
            if len(text) < 100 and "\x00" not in text:
                yield load / (form.format(text) if text.isdecimal() else text or ".")
    for pattern in ("iter_*", "release", "global_step*", "checkpoint-*"):
        yield from sorted(path for path in load.glob(pattern) if path.is_dir())
