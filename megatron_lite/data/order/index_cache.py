"""Sample-index cache on disk: built once per node, memory-mapped afterwards.

Only what takes time to build is kept; a small index is built anew by each process in a moment, and leaves no files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.file_lock import acquire
from megatron_lite.data.format.fingerprint import lengths_fingerprint
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.index_space import check_disk, check_memory
from megatron_lite.data.order.sample_index import IndexPlan, SampleIndex, build_index

LOG = logging.getLogger(__name__)

WORTH_KEEPING = 1 << 22
"""Entries of document and shuffle index together from which an index goes to disk (about a second to build)."""

FORMAT = 1
"""Counted up whenever the files' meaning changes; it is part of their folder's name."""


def cached_index(
    plan: IndexPlan, dataset: IndexedDataset, folder: Path | None, shorten: str = "Ask for fewer samples"
) -> SampleIndex:
    """Return the index of a plan: from disk if it is there, else built, and written if that is worth it.

    Of several processes on a node that need the same one, one builds it while the others wait for its lock. A folder
    that cannot be written to costs a warning and a build at every start.

    Args:
        plan: what the index is made from.
        dataset: whose lengths it needs.
        folder: --data-cache-path; None: `cache/` beside the dataset.
        shorten: the flags that make the index smaller, for the error.

    Raises:
        DataError: the dataset is damaged, or the index does not fit in memory or on the disk.
    """
    if not is_kept(plan):
        return build_index(plan, dataset.sizes)
    place = index_folder(dataset, folder) / f"index-{_key(plan, dataset)}"
    found = read_index(plan, place)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            acquire(stack.enter_context(place.with_name(f"{place.name}.lock").open("a")), wait=True)
        except OSError as error:
            LOG.warning("the sample index cannot be kept in %s (%s): it is built at every start", place.parent, error)
            check_memory(plan, dataset.prefix, shorten)
            return build_index(plan, dataset.sizes)
        found = read_index(plan, place)
        if found is not None:
            return found
        # Under the lock: memory that another process of the node builds in is free again by now.
        check_memory(plan, dataset.prefix, shorten)
        check_disk(plan, dataset.prefix, place.parent, shorten)
        began = time.monotonic()
        index = build_index(plan, dataset.sizes)
        built = time.monotonic()
        write_index(index, place)
        LOG.info("sample index: built in %.1f s, written in %.1f s", built - began, time.monotonic() - built)
        # Mapped, it is shared with the node's other processes, and the memory that it was built in is given back.
        return read_index(plan, place) or index


def is_kept(plan: IndexPlan) -> bool:
    """Whether an index is worth files of its own."""
    return plan.epochs * plan.num_documents + plan.total_samples >= WORTH_KEEPING


def index_folder(dataset: IndexedDataset, folder: Path | None) -> Path:
    """The folder of a dataset's indices: --data-cache-path, or `cache/` beside it."""
    return folder if folder is not None else Path(dataset.prefix).parent / "cache"


def read_index(plan: IndexPlan, place: Path) -> SampleIndex | None:
    """Map an index that `write_index` wrote; None if there is none, or a damaged one."""
    try:
        documents, shuffle, starts = (
            np.load(place / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            for part in ("documents", "shuffle", "starts")
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        LOG.warning("the sample index in %s cannot be read (%s): building it anew", place, error)
        return None
    if documents.shape != (plan.epochs * plan.num_documents,) or shuffle.shape != (plan.total_samples,):
        LOG.warning("the sample index in %s is damaged: building it anew", place)
        return None
    LOG.info("using the sample index in %s", place)
    return SampleIndex(plan, documents, shuffle, np.array(starts))


def write_index(index: SampleIndex, place: Path) -> None:
    """Write an index to a folder beside `place` and rename it; a failure leaves nothing but a warning."""
    partial = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        for left_behind in place.parent.glob(f"{place.name}.{socket.gethostname()}.*.tmp"):
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
        if place.is_dir():
            shutil.rmtree(place)
        partial.rename(place)
    except OSError as error:
        # Another node that shares the folder may have been first: its files are the same.
        if not (place / "plan.json").is_file():
            LOG.warning("the sample index could not be written to %s (%s)", place, error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _key(plan: IndexPlan, dataset: IndexedDataset) -> str:
    """Hash of the plan and of the dataset's content, as far as the index depends on it: its lengths."""
    content = json.dumps([FORMAT, asdict(plan), lengths_fingerprint(dataset)])
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
