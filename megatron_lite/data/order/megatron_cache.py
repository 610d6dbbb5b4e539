"""Reader of index caches written by Megatron-DeepSpeed (legacy) and Megatron-LM (modern).

The file names do not cover everything that the content depends on: a legacy cache is silently wrong after a change of
--split, and both kinds are after the dataset was preprocessed again. A cache is used only if array shapes, the range of
documents and spot checks of sample lengths agree with the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.order.index_cache import Notices
from megatron_lite.data.order.sample_index import CHUNK, IndexPlan, SampleIndex

SPOT_CHECKS = 256
"""Places at which the number of tokens between two samples is recomputed from the lengths."""


def find_megatron_index(
    prefix: str,
    name: str,
    split: str,
    folder: Path | None,
    plan: IndexPlan,
    sizes: NDArray[np.int32],
    notices: Notices,
) -> SampleIndex | None:
    """Return the first usable cache of the plan's generation; None if there is none.

    Args:
        prefix: path of the dataset as given.
        name: train, valid, test, or the name of a weighted split's group.
        split: value of --split.
        folder: --data-cache-path, the folder of modern caches; None: beside the dataset.
        plan: the index that is needed.
        sizes: int32 [sequences] lengths of all sequences.
        notices: receives a warning for each stale cache, and the path of the one that is used.
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
            notices.warnings.append(f"Cannot read the index cache {paths[0]} ({error}): rebuilding the index")
            continue
        index = SampleIndex(plan, documents, shuffle, np.empty(0, dtype=np.int64), rows)
        stale = find_mismatch(index, rows, sizes)
        if not stale:
            notices.details.append(f"using Megatron's index cache {paths[0]}")
            return index
        notices.warnings.append(f"Stale index cache {paths[0]} ({stale}): rebuilding the index")
    return None


def _legacy_files(prefix: str, name: str, plan: IndexPlan) -> Iterator[tuple[Path, ...]]:
    if plan.num_samples is not None:
        stem = f"{prefix}_{name}_indexmap_{plan.num_samples}ns_{plan.seq_length}sl_{plan.seed}s"
        yield tuple(Path(f"{stem}_{part}.npy") for part in ("doc_idx", "sample_idx", "shuffle_idx"))


def _modern_files(
    prefix: str, name: str, split: str, folder: Path | None, plan: IndexPlan
) -> Iterator[tuple[Path, ...]]:
    """Yield the files of each cache whose description names this dataset.

    File names are hashes that include the tokenizer. It need not match: the order of samples does not depend on it.
    """
    cache = folder if folder is not None else Path(prefix).parent / "cache" / "GPTDataset_indices"
    wanted = {
        "class": "GPTDataset",
        "num_samples": plan.num_samples,
        "index_split": name,
        "random_seed": plan.seed,
        "sequence_length": plan.seq_length,
    }
    for description in sorted(cache.glob(f"*-GPTDataset-{name}-description.txt")):
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


def find_mismatch(index: SampleIndex, rows: NDArray[np.integer], sizes: NDArray[np.int32]) -> str:
    """Compare the arrays of a cached index with its plan.

    Shapes and the range of documents are checked completely. At SPOT_CHECKS places it is checked that samples lie
    seq_length tokens apart and that entries of the shuffle index are in range.

    Args:
        index: the index as read.
        rows: [samples + 1, 2] its sample index.
        sizes: int32 [sequences] lengths of all sequences.

    Returns:
        The first difference found; empty if there is none.
    """
    plan, documents, shuffle = index.plan, index.documents, index.shuffle
    shapes = {
        "document entries": (documents.shape, (plan.epochs * plan.num_documents,)),
        "sample rows": (rows.shape, (plan.total_samples + 1, 2)),
        "shuffled samples": (shuffle.shape, (plan.total_samples,)),
    }
    for name, (found, expected) in shapes.items():
        if found != expected:
            return f"it has {name} of shape {found}, the run needs {expected}"
    chunks = [documents[low : low + CHUNK] for low in range(0, documents.shape[0], CHUNK)]
    low, high = min(int(chunk.min()) for chunk in chunks), max(int(chunk.max()) for chunk in chunks)
    if (low, high + 1) != (plan.first, plan.last):
        return f"it covers sequences {low} to {high + 1}, the split is {plan.first} to {plan.last}"
    # So far apart that a document ends in between: only the lengths of whole documents are compared.
    apart = min(plan.total_samples, 1 + 2 * plan.tokens_per_epoch // (plan.num_documents * plan.seq_length))
    for number in np.unique(np.linspace(0, plan.total_samples - apart, SPOT_CHECKS).astype(np.int64)).tolist():
        if not 0 <= shuffle[number] < plan.total_samples:
            return f"sample {number} is number {shuffle[number]} of {plan.total_samples}"
        (position, offset), (next_position, next_offset) = rows[number].tolist(), rows[number + apart].tolist()
        if not 0 <= position <= next_position < documents.shape[0]:
            return f"sample {number} spans document entries {position} to {next_position}"
        between = int(np.sum(sizes[documents[position:next_position]], dtype=np.int64)) + next_offset - offset
        if between != apart * plan.seq_length or not 0 <= next_offset < sizes[documents[next_position]]:
            return f"samples {number} to {number + apart} are {between} tokens by the dataset's lengths"
    return ""
