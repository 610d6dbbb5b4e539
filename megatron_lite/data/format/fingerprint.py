"""Dataset fingerprints: hashes of sampled content of the .bin and .idx files, independent of their path.

The manifest of preprocessing is not used: it may be missing after a dataset was moved, and it describes the files as
they were written, which may differ from the files on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from megatron_lite.config.data import DataSource
from megatron_lite.config.run import RunConfig
from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.loss_mask import open_mask
from megatron_lite.data.format.token_file import unreadable_tokens

PIECES = 16
"""Places of a file that are read, including the first and the last bytes."""
PIECE_BYTES = 1 << 20
"""Bytes read at each place: a .bin of up to 16 MiB is read completely."""
PIECE_LENGTHS = 1 << 12
"""Lengths read at each place: up to 65,536 sequences are read completely."""


def lengths_fingerprint(dataset: IndexedDataset) -> str:
    """Return a hash of the input of a sample index: counts, token type, and sequence lengths at PIECES places."""
    counts = f"{len(dataset)} {dataset.num_documents} {dataset.num_bytes} {dataset.dtype.str}"
    digest = hashlib.blake2b(counts.encode(), digest_size=12)
    for start, end in _pieces(len(dataset), PIECE_LENGTHS):
        digest.update(np.ascontiguousarray(dataset.sizes[start:end]).tobytes())
    return digest.hexdigest()


def content_fingerprint(dataset: IndexedDataset) -> str:
    """Return a hash of the lengths and of the tokens at PIECES places; it changes with text, order and tokenizer.

    In a file of more than 16 MiB, a few documents replaced by others of the same length may go undetected.

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
        raise unreadable_tokens(str(path), error) from error
    return digest.hexdigest()


def data_fingerprints(config: RunConfig) -> dict[str, str]:
    """Return the fingerprints of a run's data by name: one entry per source of each set, and one for the data order.

    An entry is a weight, a range of documents and a fingerprint, followed by ` of ` and the path. The path is
    informative and is not compared.

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
            opened = IndexedDataset(source.path)
            contents[source.path] = content_fingerprint(opened)
            if config.tuning.answer_loss:
                contents[source.path] += f", loss mask {content_fingerprint(open_mask(opened))}"
        share = "" if source.weight is None else f"weight {source.weight:g}, "
        if (source.start, source.end) != (0.0, 1.0):
            share += f"documents {source.start:g} to {source.end:g}, "
        found[name] = f"{share}{contents[source.path]} of {source.path}"
    return found


def _sources(config: RunConfig) -> Iterator[tuple[str, DataSource]]:
    """Yield each source with the name of its fingerprint."""
    data = config.data
    blends = [("source", data.sources)]
    for split, groups in (("train", data.train_groups), ("valid", data.valid_groups), ("test", data.test_groups)):
        blends += [(split if group.name == split else f"{split} {group.name}", group.sources) for group in groups]
    for name, sources in blends:
        for number, source in enumerate(sources, 1):
            yield f"data {name} {number}", source


def _pieces(total: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of PIECES evenly spaced pieces of `length` elements, or of all elements if there are fewer."""
    if total <= PIECES * length:
        yield 0, total
        return
    for number in range(PIECES):
        start = number * (total - length) // (PIECES - 1)
        yield start, start + length
