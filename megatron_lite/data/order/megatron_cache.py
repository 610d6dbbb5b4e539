"""Reader of index caches written by Megatron-DeepSpeed (legacy) and Megatron-LM (modern).

Neither's file names say everything that the content depends on: a legacy cache is silently wrong after --split changed,
either is after the dataset was made again. So lengths, range and spot checks must agree before a cache is believed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.order.sample_index import CHUNK, IndexPlan, SampleIndex

LOG = logging.getLogger(__name__)

SPOT_CHECKS = 256
"""Stretches of the stream whose number of tokens is recomputed from the lengths."""


def find_megatron_index(
    prefix: str, name: str, split: str, folder: Path | None, plan: IndexPlan, sizes: NDArray[np.int32]
) -> SampleIndex | None:
    """The first usable cache of the plan's generation; None, after a warning for each stale one, if there is none.

    Args:
        prefix: the dataset's path as it was given.
        name: train, valid, test, or the name of a weighted split's group.
        split: --split's text.
        folder: --data-cache-path, where modern caches lie; None: beside the dataset.
        plan: what the index must be made from.
        sizes: lengths of all sequences.
    """
    candidates = (
        _legacy_files(prefix, name, plan)
        if plan.order == "legacy"
        else _modern_files(prefix, name, split, folder, plan)
    )
    for paths in candidates:
        if not all(path.is_file() for path in paths):
            continue
        try:
            documents, rows, shuffle = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        except (OSError, ValueError) as error:
            LOG.warning("index cache %s cannot be read (%s): building the index anew", paths[0], error)
            continue
        index = SampleIndex(plan, documents, shuffle, np.empty(0, dtype=np.int64), rows)
        stale = why_stale(index, rows, sizes)
        if stale is None:
            LOG.info("using Megatron's index cache %s", paths[0])
            return index
        LOG.warning("index cache %s is not this run's (%s): building the index anew", paths[0], stale)
    return None


def _legacy_files(prefix: str, name: str, plan: IndexPlan) -> Iterator[tuple[Path, ...]]:
    if plan.num_samples is not None:
        stem = f"{prefix}_{name}_indexmap_{plan.num_samples}ns_{plan.seq_length}sl_{plan.seed}s"
        yield tuple(Path(f"{stem}_{part}.npy") for part in ("doc_idx", "sample_idx", "shuffle_idx"))


def _modern_files(
    prefix: str, name: str, split: str, folder: Path | None, plan: IndexPlan
) -> Iterator[tuple[Path, ...]]:
    """Caches whose description is of this dataset. Their names are hashes over the tokenizer too, which need not match:
    the order of samples does not depend on it.
    """
    place = folder if folder is not None else Path(prefix).parent / "cache" / "GPTDataset_indices"
    wanted = {
        "class": "GPTDataset",
        "num_samples": plan.num_samples,
        "index_split": name,
        "random_seed": plan.seed,
        "sequence_length": plan.seq_length,
    }
    for description in sorted(place.glob(f"*-GPTDataset-{name}-description.txt")):
        try:
            found = json.loads(description.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(found, dict) or any(found.get(key) != value for key, value in wanted.items()):
            continue
        same_path = Path(str(found.get("dataset_path"))).absolute() == Path(prefix).absolute()
        if same_path and found.get("split") in (None, split):
            stem = str(description).removesuffix("description.txt")
            yield tuple(Path(f"{stem}{part}.npy") for part in ("document_index", "sample_index", "shuffle_index"))


def why_stale(index: SampleIndex, rows: NDArray[np.integer], sizes: NDArray[np.int32]) -> str | None:
    """What shows that an index's arrays, `rows` among them, are not its plan's, or None if nothing does.

    Shapes and the range of documents are checked whole; that samples lie seq_length tokens apart, and that the shuffle
    stays in range, at SPOT_CHECKS places.
    """
    plan, documents, shuffle = index.plan, index.documents, index.shuffle
    shapes = {
        "document entries": (documents.shape, (plan.epochs * plan.num_documents,)),
        "sample rows": (rows.shape, (plan.total_samples + 1, 2)),
        "shuffled samples": (shuffle.shape, (plan.total_samples,)),
    }
    for what, (found, expected) in shapes.items():
        if found != expected:
            return f"it has {what} of shape {found}, the run needs {expected}"
    pieces = [documents[low : low + CHUNK] for low in range(0, documents.shape[0], CHUNK)]
    low, high = min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)
    if (low, high + 1) != (plan.first, plan.last):
        return f"it covers sequences {low} to {high + 1}, the split is {plan.first} to {plan.last}"
    return _why_inconsistent(index, rows, sizes)


def _why_inconsistent(index: SampleIndex, rows: NDArray[np.integer], sizes: NDArray[np.int32]) -> str | None:
    plan, documents, shuffle = index.plan, index.documents, index.shuffle
    # Far enough apart that a piece holds ends of documents, whose lengths are what is checked.
    apart = min(plan.total_samples, 1 + 2 * plan.tokens_per_epoch // (plan.num_documents * plan.seq_length))
    for number in np.unique(np.linspace(0, plan.total_samples - apart, SPOT_CHECKS).astype(np.int64)).tolist():
        if not 0 <= shuffle[number] < plan.total_samples:
            return f"sample {number} is number {shuffle[number]} of {plan.total_samples}"
        (position, offset), (next_position, next_offset) = rows[number].tolist(), rows[number + apart].tolist()
        if not 0 <= position <= next_position < documents.shape[0]:
            return f"sample {number} reaches from document entry {position} to {next_position}"
        between = int(np.sum(sizes[documents[position:next_position]], dtype=np.int64)) + next_offset - offset
        if between != apart * plan.seq_length or not 0 <= next_offset < sizes[documents[next_position]]:
            return f"samples {number} to {number + apart} are {between} tokens by the dataset's lengths"
    return None
