"""Converter of Megatron's older "lazy" and "cached" datasets (magic TNTIDX).

Layout, little-endian: magic of 8 bytes, u64 version, u64 type code, u64 bytes of a token, u64 N arrays, u64 S sizes,
u64 D entries of the document index; then int64 dim_offsets[N + 1], data_offsets[N + 1] in tokens, sizes[S],
document_index[D].
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megatron_lite.data.format.index_format import LEGACY_MAGIC, REBUILD, TOKEN_TYPES, bin_path, idx_path, missing_file
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.errors import DataError

HEADER = struct.Struct("<8sQQQQQQ")


def convert_older(prefix: str | Path, output: str | Path) -> int:
    """Write the older dataset `prefix` as a memory-mapped dataset `output`.

    Returns:
        The number of documents.

    Raises:
        DataError: the dataset is not of the older format, or damaged, or `output` cannot be written.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise missing_file(prefix, path)
    content = idx_path(prefix).read_bytes()
    if not content.startswith(LEGACY_MAGIC) or len(content) < HEADER.size:
        raise _not_convertible(prefix, "its index does not begin with TNTIDX and a header")
    _, version, code, itemsize, num_arrays, num_sizes, num_documents = HEADER.unpack_from(content)
    entries = 2 * (num_arrays + 1) + num_sizes + num_documents
    if version != 1 or code not in TOKEN_TYPES:
        unknown = f"version {version}" if version != 1 else f"type code {code}"
        raise _not_convertible(prefix, f"its header has the unknown {unknown}")
    if itemsize != TOKEN_TYPES[code].itemsize:
        expected_size = TOKEN_TYPES[code].itemsize
        raise _not_convertible(
            prefix, f"its header states {itemsize} bytes a token, and its token type {code} has {expected_size}"
        )
    if len(content) != (expected := HEADER.size + 8 * entries):
        raise _not_convertible(prefix, f"its index has {len(content):,} bytes instead of {expected:,} by its header")
    if num_sizes != num_arrays or num_documents < 1:
        raise _not_convertible(
            prefix, f"its header states {num_arrays} arrays, {num_sizes} sizes and {num_documents} document entries"
        )
    arrays = np.frombuffer(content, dtype="<i8", offset=HEADER.size)
    offsets = arrays[num_arrays + 1 : 2 * (num_arrays + 1)]
    documents = arrays[2 * (num_arrays + 1) + num_sizes :]
    tokens = bin_path(prefix).stat().st_size // itemsize
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise _not_convertible(prefix, f"its arrays end at token {offsets[-1]} of {tokens}")
    if documents[0] != 0 or documents[-1] != num_arrays or (np.diff(documents) < 0).any():
        raise _not_convertible(prefix, f"its documents end at array {documents[-1]} of {num_arrays}")
    with IndexedDatasetWriter(output, TOKEN_TYPES[code]) as writer, bin_path(prefix).open("rb") as file:
        for first, last in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
            for length in np.diff(offsets[first : last + 1]).tolist():
                writer.add_sequence(np.frombuffer(file.read(length * itemsize), dtype=TOKEN_TYPES[code]))
            writer.end_document()
        return writer.num_documents


def _not_convertible(prefix: str | Path, problem: str) -> DataError:
    return DataError(f"Cannot convert the dataset {prefix} of the older format (TNTIDX): {problem}", fix=REBUILD)
