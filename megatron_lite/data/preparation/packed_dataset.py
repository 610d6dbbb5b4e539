"""Packed dataset writer: documents packed into sequences of exactly --seq-length tokens.

Megatron's sample j is tokens [j*L, j*L + L] of the shuffled documents end to end. Where all documents have L tokens, a
sample's input is therefore one bin, in any order and any number of epochs, and nothing else has to know about packing.
Its last label alone lies beyond the bin: it is the first token of a bin that follows by chance. --eod-mask-loss leaves
it out of the loss wherever the bin ends with an end-of-document token, padding or a document's own; a bin that is a
piece from the middle of a long document keeps that one wrong label.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format import manifest as papers
from megatron_lite.data.format.fingerprint import content_fingerprint
from megatron_lite.data.format.index_format import bin_path, idx_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_lite.data.format.token_file import TokenFile
from megatron_lite.data.preparation.packing import DOCUMENTS, Window, document_ends, lay_out, windows
from megatron_lite.errors import DataError

PROBES = 256
"""Documents whose last token is looked at before the work begins."""


@dataclass
class Packed:
    """What packing made of a dataset.

    Attributes:
        documents: with at least one token.
        tokens: of the documents.
        bins: sequences written.
        padding: tokens that fill bins up.
        cut: documents longer than a sequence, which are the ones that packing cuts.
        cut_unpacked: documents that concatenation cuts on average over the orders of documents: a border lies inside
            one of n tokens with probability min(1, (n - 1) / L).
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
    """Write the documents of `data` to the dataset `output`, as sequences of `seq_length` tokens, with a manifest.

    Args:
        data: what is packed.
        output: common path of the files; they get this name when they are complete.
        seq_length: tokens of a sequence.
        tokenizer: as manifests have it; its `eod` fills sequences up.
        seed: of the order of sequences within a window.
        overwrite: whether a dataset of other content with this name may be replaced.
        advance: is told the tokens of each window when it is written.

    Returns:
        What was made; None where the same call made it before.

    Raises:
        DataError: `data` is damaged or empty or has documents without an end, or `output` exists or cannot be written.
    """
    eod = int(tokenizer["eod"])
    content = [content_fingerprint(data), seq_length, eod, seed]
    plan = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if _is_complete(output, plan):
        return None
    _refuse(data, output, seq_length, overwrite)
    data.check()
    _probe_ends(data, eod)
    made, rng, checksums = _count_documents(data, seq_length), np.random.RandomState(seed), list[tuple[int, int]]()
    file = TokenFile(bin_path(data.prefix), data.dtype)
    with IndexedDatasetWriter(output, data.dtype) as writer:
        for window in windows(data, seq_length):
            tokens = file.read(window.start * data.dtype.itemsize, int(window.lengths.sum()))
            bins = _pack_window(window, tokens, seq_length, eod, rng, made)
            writer.add_documents(bins)
            checksums.append((bins.nbytes, zlib.crc32(bins.data)))
            advance(tokens.shape[0])
        papers.manifest_path(output).unlink(missing_ok=True)
    manifest = papers.Manifest(
        dtype=writer.dtype.name,
        documents=writer.num_documents,
        sequences=writer.num_sequences,
        tokens=writer.num_tokens,
        bin_pieces=checksums,
        idx_pieces=papers.file_pieces(idx_path(output)),
        tokenizer=tokenizer,
        flags={"packed": {"seq_length": seq_length, "seed": seed}},
        inputs=[{"path": str(bin_path(data.prefix)), "bytes": data.num_bytes}],
        plan=plan,
        report=asdict(made),
    )
    papers.write_manifest(output, manifest)
    return made


def _pack_window(
    window: Window, tokens: NDArray[np.generic], seq_length: int, eod: int, rng: np.random.RandomState, made: Packed
) -> NDArray[np.generic]:
    """The bins of a window, [bins, seq_length] of the tokens' type; what they are is added to `made`."""
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
    """What the lengths of the documents say."""
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


def _probe_ends(data: IndexedDataset, eod: int) -> None:
    """Look at the last token of PROBES documents: without an end, one could not be told from the next in its bin."""
    for number in np.unique(np.linspace(0, data.num_documents - 1, PROBES).astype(np.int64)).tolist():
        tokens = data.document(number)
        if tokens.shape[0] and int(tokens[-1]) != eod:
            raise DataError(
                "Documents that are packed end with the end-of-document token",
                found=f"document {number} of {data.prefix} ends with token {tokens[-1]}, end-of-document is {eod}",
                fix="Preprocess with --append-eod, or give the tokenizer that the dataset was made with",
            )


def _is_complete(output: str, plan: str) -> bool:
    made = papers.read_manifest(output)
    if made is None or made.plan != plan:
        return False
    papers.check_files(output, made, contents=False)
    return True


def _refuse(data: IndexedDataset, output: str, seq_length: int, overwrite: bool) -> None:
    """The reasons not to begin, in the order in which a user would meet them."""
    if seq_length < 1:
        raise DataError(
            "A sequence has at least one token", found=f"--seq-length {seq_length}", fix="Give that of the model"
        )
    if Path(data.prefix).absolute() == Path(output).absolute():
        raise DataError("Packing does not write to its input", found=f"{output} is both", fix="Give another name")
    if Path(output).is_dir():
        raise DataError(
            "A dataset is named by its files' common path",
            found=f"{output} is a folder",
            fix=f"Give a name in it: {Path(output) / 'packed'}",
        )
    if not data.num_tokens:
        raise DataError(
            "A dataset that is packed has tokens", found=f"{data.prefix} has none", fix="Preprocess it again from text"
        )
    manifest = papers.read_manifest(data.prefix)
    if manifest is not None and manifest.packed_length:
        raise DataError(
            "A dataset is packed once, from whole documents",
            found=f"{data.prefix} is packed, in sequences of {manifest.packed_length}",
            fix="Pack what it was packed from, which its manifest names",
        )
    if not overwrite:
        papers.refuse_to_replace(output)
    folder = next(folder for folder in Path(output).absolute().parents if folder.is_dir())
    free, needed = shutil.disk_usage(folder).free, max(data.num_bytes, seq_length * data.dtype.itemsize)
    if free < needed:
        raise DataError(
            "A packed dataset is at least as large as what is packed, and as one sequence",
            found=f"{needed:,} bytes of tokens, {free:,} bytes are free in {folder}",
            fix="Free or ask for space, or write to another folder",
        )
