"""Packed dataset writer: documents packed into sequences of exactly --seq-length tokens.

Megatron's sample j is tokens [j*L, j*L + L] of the concatenated shuffled documents. If all documents have L tokens, the
input of a sample is one bin, in any order and any number of epochs, so training needs no code for packed data. Only the
last label is the first token of the next bin, which is unrelated. --eod-mask-loss removes it from the loss if the bin
ends with an end-of-document token (padding, or the end of a document); a bin from the middle of a long document keeps
this one wrong label.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.fingerprint import content_fingerprint
from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.manifest import (
    DatasetManifest,
    is_complete,
    manifest_of,
    manifest_path,
    read_manifest,
    require_absent,
    write_manifest,
)
from megatron_lite.data.format.token_file import TokenFile
from megatron_lite.data.preparation.packing import DOCUMENTS, PackingWindow, document_ends, lay_out, windows
from megatron_lite.errors import DataError
from megatron_lite.formatting import format_size

PROBES = 256
"""Documents whose last token is checked before packing begins."""


@dataclass
class Packed:
    """Statistics of a packed dataset.

    Attributes:
        documents: documents with at least one token.
        tokens: tokens of these documents.
        bins: sequences written.
        padding: tokens of padding.
        cut: documents longer than a sequence, the only ones that packing cuts.
        cut_unpacked: expected number of documents that concatenation cuts, averaged over the orders of documents: a
            boundary lies inside a document of n tokens with probability min(1, (n - 1) / L).
        open_ends: bins whose last token is not the end-of-document token.
        unmarked: documents that do not end with the end-of-document token.
    """

    documents: int = 0
    tokens: int = 0
    bins: int = 0
    padding: int = 0
    cut: int = 0
    cut_unpacked: float = 0.0
    open_ends: int = 0
    unmarked: int = 0


def pack_dataset(
    data: IndexedDataset,
    output: str,
    seq_length: int,
    tokenizer: dict[str, Any],
    *,
    seed: int = 1234,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Packed | None:
    """Pack the documents of `data` into sequences of `seq_length` tokens and write them to the dataset `output`.

    Args:
        data: the dataset to pack.
        output: path of the packed dataset.
        seq_length: tokens of a sequence.
        tokenizer: `tokenizer` entry of a manifest; its `eod` is the padding token.
        seed: seed of the order of sequences within a window.
        overwrite: replace a dataset of other content with this name.
        advance: called with the number of tokens of each window after it is written.

    Returns:
        Statistics; None if the same call has already made the dataset.

    Raises:
        DataError: `data` is damaged or empty or has documents without an end, or `output` exists or cannot be written.
    """
    eod = int(tokenizer["eod"])
    content = [content_fingerprint(data), seq_length, eod, seed]
    plan = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if is_complete(output, plan):
        return None
    _check_arguments(data, output, seq_length, overwrite)
    data.check()
    _check_document_ends(data, eod)
    made, rng, checksums = _count_documents(data, seq_length), np.random.RandomState(seed), list[tuple[int, int]]()
    file = TokenFile(bin_path(data.prefix), data.dtype)
    with IndexedDatasetWriter(output, data.dtype) as writer:
        for window in windows(data, seq_length):
            tokens = file.read(window.start * data.dtype.itemsize, int(window.lengths.sum()))
            bins = _pack_window(window, tokens, seq_length, eod, rng, made)
            ones = np.ones(bins.shape[0], dtype=np.int64)
            checksums.append((bins.nbytes, writer.add_batch(bins.ravel(), seq_length * ones, ones)))
            advance(tokens.shape[0])
        manifest_path(output).unlink(missing_ok=True)
    manifest = manifest_of(
        writer,
        checksums,
        tokenizer,
        flags={"packed": {"seq_length": seq_length, "seed": seed}},
        inputs=[{"path": str(bin_path(data.prefix)), "bytes": data.num_bytes}],
        plan=plan,
        report=asdict(made),
    )
    write_manifest(output, manifest)
    return made


def _pack_window(
    window: PackingWindow,
    tokens: NDArray[np.generic],
    seq_length: int,
    eod: int,
    rng: np.random.RandomState,
    made: Packed,
) -> NDArray[np.generic]:
    """Return the bins of a window, [bins, seq_length], and add their statistics to `made`."""
    targets, filled = lay_out(window, seq_length, rng)
    bins = np.full(filled.shape[0] * seq_length, eod, dtype=tokens.dtype)
    ends = np.cumsum(window.lengths)
    starts = ends - window.lengths
    for start, end, target in zip(starts.tolist(), ends.tolist(), targets.tolist(), strict=True):
        bins[target : target + end - start] = tokens[start:end]
    made.bins += filled.shape[0]
    made.padding += bins.shape[0] - tokens.shape[0]
    made.unmarked += int(np.count_nonzero(tokens[ends[window.ends_document] - 1] != eod))
    bins = bins.reshape(-1, seq_length)
    made.open_ends += int(np.count_nonzero(bins[:, -1] != eod))
    return bins


def _count_documents(data: IndexedDataset, seq_length: int) -> Packed:
    """Return the statistics that follow from the lengths of the documents."""
    made = Packed(tokens=data.num_tokens)
    start = 0
    for first in range(0, data.num_documents, DOCUMENTS):
        ends = document_ends(data, first, min(data.num_documents, first + DOCUMENTS))
        lengths = np.diff(ends, prepend=start)
        lengths, start = lengths[lengths > 0], int(ends[-1])
        made.documents += lengths.shape[0]
        made.cut += int(np.count_nonzero(lengths > seq_length))
        made.cut_unpacked += float(np.minimum(1.0, (lengths - 1) / seq_length).sum())
    return made


def _check_document_ends(data: IndexedDataset, eod: int) -> None:
    """Check that PROBES documents end with the end-of-document token, which separates documents within a bin."""
    for number in np.unique(np.linspace(0, data.num_documents - 1, PROBES).astype(np.int64)).tolist():
        tokens = data.document(number)
        if tokens.shape[0] and int(tokens[-1]) != eod:
            raise DataError(
                f"Cannot pack {data.prefix}: document {number:,} ends with token {tokens[-1]} instead of the "
                "tokenizer's "
                f"end-of-document token {eod}",
                fix="Preprocess the corpus with --append-eod, or give the tokenizer that the dataset was made with",
            )


def _original(manifest: DatasetManifest) -> str:
    """Return the prefix of the dataset that was packed, as its manifest has it."""
    paths = [str(source["path"]).removesuffix(".bin") for source in manifest.inputs if "path" in source]
    return ", ".join(paths) or "its manifest does not name it"


def _check_arguments(data: IndexedDataset, output: str, seq_length: int, overwrite: bool) -> None:
    """Check everything that can be checked before reading the tokens.

    Raises:
        DataError: the dataset cannot be packed into `output`.
    """
    if seq_length < 1:
        raise DataError(
            f"Cannot pack documents into sequences of {seq_length} tokens (--seq-length {seq_length})",
            fix="Give the --seq-length of the model to be trained",
        )
    if Path(data.prefix).absolute() == Path(output).absolute():
        raise DataError(f"{output} is both the input and the output of packing", fix="Give another output prefix")
    if Path(output).is_dir():
        raise DataError(
            f"The output {output} is a folder, not the common prefix of a .bin and an .idx file",
            fix=f"Give a prefix inside that folder, for example {Path(output) / 'packed'}",
        )
    if not data.num_tokens:
        raise DataError(
            f"The dataset {data.prefix} contains no tokens to pack",
            fix="Give another dataset, or preprocess a corpus with text",
        )
    manifest = read_manifest(data.prefix)
    if manifest is not None and manifest.packed_length:
        raise DataError(
            f"{data.prefix} is already packed, in sequences of {manifest.packed_length} tokens",
            fix=f"Pack the original dataset instead: {_original(manifest)}",
        )
    if not overwrite:
        require_absent(output)
    folder = next(folder for folder in Path(output).absolute().parents if folder.is_dir())
    free, needed = shutil.disk_usage(folder).free, max(data.num_bytes, seq_length * data.dtype.itemsize)
    if free < needed:
        raise DataError(
            f"The packed dataset needs at least {format_size(needed)}, and {format_size(free)} are free on the disk of "
            f'"{folder}"',
            fix="Free space there, or give an output prefix on another disk",
        )
