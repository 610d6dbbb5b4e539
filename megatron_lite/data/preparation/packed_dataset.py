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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.fingerprint import content_fingerprint
from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.loss_mask import has_mask, mask_prefix, open_mask, remove_mask
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
    mask = open_mask(data) if has_mask(data.prefix) else None
    content = [content_fingerprint(data), seq_length, eod, seed]
    content += [] if mask is None else [content_fingerprint(mask)]
    plan = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if is_complete(output, plan):
        return None
    _check_arguments(data, output, seq_length, overwrite)
    data.check()
    _check_document_ends(data, eod)
    made, rng = _count_documents(data, seq_length), np.random.RandomState(seed)
    # The manifest of the tokens, which marks the whole as complete, is written last.
    files = [] if mask is None else [_Output(mask, mask_prefix(output), 0)]
    files.append(_Output(data, output, eod))
    remove_mask(output)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(file.prefix, file.data.dtype)) for file in files]
        for window in windows(data, seq_length):
            targets, filled = lay_out(window, seq_length, rng)
            for file, writer in zip(files, writers, strict=True):
                bins = file.pack(window, targets, filled.shape[0], seq_length)
                if file.data is data:
                    _count_bins(window, targets, bins, eod, made)
                else:
                    bins.ravel()[targets] = 0  # the first token of a piece is predicted from an unrelated one
                ones = np.ones(bins.shape[0], dtype=np.int64)
                file.checksums.append((bins.nbytes, writer.add_batch(bins.ravel(), seq_length * ones, ones)))
            advance(int(window.lengths.sum()))
        manifest_path(output).unlink(missing_ok=True)
    for file, writer in zip(files, writers, strict=True):
        manifest = manifest_of(
            writer,
            file.checksums,
            tokenizer,
            flags={"packed": {"seq_length": seq_length, "seed": seed}},
            inputs=[{"path": str(bin_path(file.data.prefix)), "bytes": file.data.num_bytes}],
            plan=plan,
            report=asdict(made),
        )
        write_manifest(file.prefix, manifest)
    return made


class _Output:
    """One of the packed files, tokens or loss mask.

    Args:
        data: the file to pack.
        prefix: path of the packed file.
        padding: value that fills sequences up.
    """

    def __init__(self, data: IndexedDataset, prefix: str, padding: int) -> None:
        self.data = data
        self.prefix = prefix
        self.padding = padding
        self.checksums: list[tuple[int, int]] = []
        self._file = TokenFile(bin_path(data.prefix), data.dtype)

    def pack(
        self, window: PackingWindow, targets: NDArray[np.int64], num_bins: int, seq_length: int
    ) -> NDArray[np.generic]:
        """Return the bins of a window, [bins, seq_length]; `targets` [pieces] is the place of each piece in them."""
        values = self._file.read(window.start * self.data.dtype.itemsize, int(window.lengths.sum()))
        bins = np.full(num_bins * seq_length, self.padding, dtype=values.dtype)
        ends = np.cumsum(window.lengths)
        starts = ends - window.lengths
        for start, end, target in zip(starts.tolist(), ends.tolist(), targets.tolist(), strict=True):
            bins[target : target + end - start] = values[start:end]
        return bins.reshape(-1, seq_length)


def _count_bins(
    window: PackingWindow, targets: NDArray[np.int64], bins: NDArray[np.generic], eod: int, made: Packed
) -> None:
    """Add the statistics of a window's bins, [bins, seq_length], to `made`."""
    made.bins += bins.shape[0]
    made.padding += bins.size - int(window.lengths.sum())
    last = (targets + window.lengths - 1)[window.ends_document]
    made.unmarked += int(np.count_nonzero(bins.ravel()[last] != eod))
    made.open_ends += int(np.count_nonzero(bins[:, -1] != eod))


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
