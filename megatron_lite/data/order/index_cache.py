"""Sample-index cache in megatron_lite's own format: written once per node, memory-mapped afterwards.

Only indices that take about a second to build are written; smaller ones are built by each process and leave no files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.file_lock import acquire
from megatron_lite.data.format.fingerprint import lengths_fingerprint
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.index_space import check_disk, check_memory
from megatron_lite.data.order.sample_index import IndexPlan, SampleIndex, build_index

WORTH_KEEPING = 1 << 22
"""Entries of document and shuffle index together from which an index is written to disk (about a second to build)."""

FORMAT = 1
"""Version of the files; part of their folder's name."""


@dataclass
class Notices:
    """Messages collected while datasets are opened and indices are built; the caller decides where they are printed.

    Attributes:
        warnings: stale or damaged caches, sets left without documents, packing that does not match the flags.
        details: caches that were used, and the time that each build took.
    """

    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


def cached_index(
    plan: IndexPlan,
    dataset: IndexedDataset,
    folder: Path | None,
    notices: Notices,
    shorten: str = "Ask for fewer samples",
) -> SampleIndex:
    """Return the index of a plan, read from the cache or built; a large one is written to the cache.

    Of several processes on a node that need the same index, one builds it while the others wait for its lock. If the
    folder cannot be written to, a warning is added and every process builds the index at every start.

    Args:
        plan: the index to return.
        dataset: the dataset whose lengths it needs.
        folder: --data-cache-path; None: `cache/` beside the dataset.
        notices: receives warnings and details.
        shorten: the flags that make the index smaller, for the error message.

    Raises:
        DataError: the dataset is damaged, or the index does not fit in memory or on the disk.
    """
    if not is_kept(plan):
        return build_index(plan, dataset.sizes, dataset.prefix)
    content = json.dumps([FORMAT, asdict(plan), lengths_fingerprint(dataset)])
    key = hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
    path = index_folder(dataset, folder) / f"index-{key}"
    found = read_index(plan, path, notices)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            acquire(stack.enter_context(path.with_name(f"{path.name}.lock").open("a")), wait=True)
        except OSError as error:
            notices.warnings.append(
                f"Cannot write the sample index to {path.parent} ({error}): it is built at every start"
            )
            check_memory(plan, dataset.prefix, shorten)
            return build_index(plan, dataset.sizes, dataset.prefix)
        found = read_index(plan, path, notices)
        if found is not None:
            return found
        # After the lock is taken: by then the memory of another process that built an index on this node is free.
        check_memory(plan, dataset.prefix, shorten)
        check_disk(plan, dataset.prefix, path.parent, shorten)
        started = time.monotonic()
        index = build_index(plan, dataset.sizes, dataset.prefix)
        built = time.monotonic()
        write_index(index, path, notices)
        notices.details.append(
            f"sample index: built in {built - started:.1f} s, written in {time.monotonic() - built:.1f} s"
        )
        # The mapped index is shared with the node's other processes, and frees the memory that it was built in.
        return read_index(plan, path, notices) or index


def is_kept(plan: IndexPlan) -> bool:
    """Return whether an index is large enough to be written to the cache."""
    return plan.epochs * plan.num_documents + plan.total_samples >= WORTH_KEEPING


def index_folder(dataset: IndexedDataset, folder: Path | None) -> Path:
    """Return the folder of a dataset's cached indices: --data-cache-path, or `cache/` beside the dataset."""
    return folder if folder is not None else Path(dataset.prefix).parent / "cache"


def read_index(plan: IndexPlan, path: Path, notices: Notices) -> SampleIndex | None:
    """Map the index in folder `path` that `write_index` wrote; None if it is missing or damaged."""
    try:
        documents, shuffle, starts = (
            np.load(path / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            for part in ("documents", "shuffle", "starts")
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notices.warnings.append(f"Cannot read the sample index in {path} ({error}): rebuilding it")
        return None
    if documents.shape != (plan.epochs * plan.num_documents,) or shuffle.shape != (plan.total_samples,):
        notices.warnings.append(f"The sample index in {path} is damaged: rebuilding it")
        return None
    notices.details.append(f"using the sample index in {path}")
    return SampleIndex(plan, documents, shuffle, np.array(starts))


def write_index(index: SampleIndex, path: Path, notices: Notices) -> None:
    """Write an index to a temporary folder and rename it to `path`; if that fails, add a warning and leave no files."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        for left_behind in path.parent.glob(f"{path.name}.{socket.gethostname()}.*.tmp"):
            shutil.rmtree(left_behind, ignore_errors=True)
        partial.mkdir()
        arrays: dict[str, NDArray[np.integer]] = {
            "documents": index.documents,
            "shuffle": index.shuffle,
            "starts": index.starts,
        }
        for part, values in arrays.items():
            np.save(partial / f"{part}.npy", values)
        (partial / "plan.json").write_text(json.dumps(asdict(index.plan), indent=1), encoding="utf-8")
        if path.is_dir():
            shutil.rmtree(path)
        partial.rename(path)
    except OSError as error:
        # Another node that shares the folder may have written it first; its files are identical.
        if not (path / "plan.json").is_file():
            notices.warnings.append(f"Cannot write the sample index to {path} ({error})")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
