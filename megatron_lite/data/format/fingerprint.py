"""Dataset fingerprints: a content hash from samples of the .bin and .idx files, independent of their path.

The manifest of preprocessing has no part in it: it may be left behind when a dataset is moved, and it says what the
files were, not what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from megatron_lite.config.data import DataGroup, DataSource
from megatron_lite.config.run import RunConfig
from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.errors import DataError

PIECES = 16
"""Places of a file that are read, the first and the last bytes among them."""
PIECE_BYTES = 1 << 20
"""Bytes read at each: a .bin of up to 16 MiB is read whole, a longer one at 16 places."""
PIECE_LENGTHS = 1 << 12
"""Lengths read at each: all of up to 65,536 sequences."""


def lengths_fingerprint(dataset: IndexedDataset) -> str:
    """Hash of all that a sample index depends on: counts, token type, and lengths of sequences at PIECES places."""
    counts = f"{len(dataset)} {dataset.num_documents} {dataset.num_bytes} {dataset.dtype.str}"
    digest = hashlib.blake2b(counts.encode(), digest_size=12)
    for start, end in _pieces(len(dataset), PIECE_LENGTHS):
        digest.update(np.ascontiguousarray(dataset.sizes[start:end]).tobytes())
    return digest.hexdigest()


def content_fingerprint(dataset: IndexedDataset) -> str:
    """Hash of the lengths and of the tokens at PIECES places: any other text, order or tokenizer gives another one.

    A few documents exchanged for others of the same length, in a file of more than 16 MiB, may be missed.

    Raises:
        DataError: the .bin cannot be read.
    """
    digest = hashlib.blake2b(lengths_fingerprint(dataset).encode(), digest_size=12)
    path = bin_path(dataset.prefix)
    try:
        with path.open("rb") as file:
            for start, end in _pieces(dataset.num_bytes, PIECE_BYTES):
                file.seek(start)
                digest.update(file.read(end - start))
    except OSError as error:
        raise DataError(
            "A dataset's tokens can be read",
            found=f"{path}: {error.strerror}",
            fix="See whether its file system still answers, then start again from the latest checkpoint",
        ) from error
    return digest.hexdigest()


def data_fingerprints(config: RunConfig) -> dict[str, str]:
    """What the run reads, by name: one entry for each source of each set, and one for the order in which it is read.

    An entry is a weight, a range of documents and a fingerprint, followed by ` of ` and the path, which is no part of
    what identifies the source.

    Raises:
        DataError: a dataset is missing or damaged.
    """
    data = config.data
    order = [f"seed {config.runtime.seed}", f"--seq-length {config.batch.seq_length}", data.index_order, data.sampling]
    if data.sampler != "single":
        order.append(data.sampler)
    if data.sources:
        order.append(f"--split {data.split}")
    found = {"data order": ", ".join(order)}
    if data.mock:
        return {**found, "data source": "random tokens of --mock-data"}
    contents: dict[str, str] = {}
    for name, source in _sources(config):
        if source.path not in contents:
            contents[source.path] = content_fingerprint(IndexedDataset(source.path))
        found[name] = f"{_share(source)}{contents[source.path]} of {source.path}"
    return found


def _sources(config: RunConfig) -> Iterator[tuple[str, DataSource]]:
    data = config.data
    sets = {"train": data.train_groups, "valid": data.valid_groups, "test": data.test_groups}
    blends = [("source", data.sources)] + [
        (_group_name(split, group), group.sources) for split, groups in sets.items() for group in groups
    ]
    for name, sources in blends:
        for number, source in enumerate(sources, 1):
            yield f"data {name} {number}", source


def _group_name(split: str, group: DataGroup) -> str:
    return split if group.name == split else f"{split} {group.name}"


def _share(source: DataSource) -> str:
    share = "" if source.weight is None else f"weight {source.weight:g}, "
    if (source.start, source.end) != (0.0, 1.0):
        share += f"documents {source.start:g} to {source.end:g}, "
    return share


def _pieces(total: int, length: int) -> Iterator[tuple[int, int]]:
    """[start, end) of PIECES pieces of `length`, evenly spread over `total`; the whole where that is no longer."""
    if total <= PIECES * length:
        yield 0, total
        return
    for number in range(PIECES):
        start = number * (total - length) // (PIECES - 1)
        yield start, start + length
