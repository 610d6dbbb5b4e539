"""Dataset merging: concatenates finished datasets and their manifests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.data.format import manifest as papers
from megatron_lite.data.format.index_format import idx_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_lite.errors import DataError

LOG = logging.getLogger(__name__)


def find_prefixes(folder: Path) -> list[str]:
    """The datasets of a folder, sorted by name.

    Raises:
        DataError: it is no folder, or has none, or an .idx or .bin stands alone.
    """
    if not folder.is_dir():
        raise DataError(
            "--input of a merge is a folder", found=f"{folder} is not", fix="Give the folder, or --datasets PREFIX …"
        )
    bins = {path.stem for path in folder.glob("*.bin")}
    indices = {path.stem for path in folder.glob("*.idx")}
    alone = sorted(bins ^ indices)
    if alone or not bins:
        raise DataError(
            "A folder to merge holds pairs of .bin and .idx",
            found=f"{folder} has only one half of {', '.join(alone[:3])}" if alone else f"{folder} has none",
            fix="Complete the pairs, or name what is to be merged with --datasets",
        )
    return [str(folder / name) for name in sorted(bins)]


def merge_datasets(
    prefixes: Sequence[str], output: str, *, overwrite: bool = False, advance: Callable[[int], None] = lambda _: None
) -> tuple[int, int]:
    """Write the documents of `prefixes` in order to `output`; returns its documents and tokens.

    Args:
        prefixes: what is merged.
        output: where it goes.
        overwrite: whether a dataset of this name may be replaced.
        advance: is told the tokens of each input when they are written.

    Raises:
        DataError: an input is missing or damaged, they differ in token type or tokenizer, or `output` exists.
    """
    if any(Path(prefix).absolute() == Path(output).absolute() for prefix in prefixes):
        raise DataError(
            "A merge does not write to its own input", found=f"{output} is both", fix="Give another --output-prefix"
        )
    if not overwrite:
        papers.refuse_to_replace(output)
    manifests = _manifests(prefixes)
    dtype = IndexedDataset(prefixes[0]).dtype
    with IndexedDatasetWriter(output, dtype) as writer:
        for prefix in prefixes:
            before = writer.num_tokens
            writer.append(prefix)
            advance(writer.num_tokens - before)
        papers.manifest_path(output).unlink(missing_ok=True)
    if manifests:
        merged = papers.Manifest(
            dtype=writer.dtype.name,
            documents=writer.num_documents,
            sequences=writer.num_sequences,
            tokens=writer.num_tokens,
            bin_pieces=[piece for manifest in manifests for piece in manifest.bin_pieces],
            idx_pieces=papers.file_pieces(idx_path(output)),
            tokenizer=_common_tokenizer(prefixes, manifests),
            flags={"merged_from": list(prefixes)} | _packing(prefixes, manifests),
            inputs=[source for manifest in manifests for source in manifest.inputs],
        )
        papers.write_manifest(output, merged)
    return writer.num_documents, writer.num_tokens


def _common_tokenizer(prefixes: Sequence[str], manifests: Sequence[papers.Manifest]) -> dict[str, Any]:
    """What the merged manifest says of the tokenizer: the entries on which all inputs agree."""
    first = manifests[0].tokenizer
    common = dict(first)
    for prefix, manifest in zip(prefixes[1:], manifests[1:], strict=True):
        other = manifest.tokenizer
        differ = [key for key in {**first, **other} if _entry(first, key) != _entry(other, key)]
        for key in differ:
            common.pop(key, None)
        if {"bos", "eod"} & set(differ):
            what = ", ".join(
                f"{key} {_entry(first, key)} and {_entry(other, key)}" for key in differ if key in ("bos", "eod")
            )
            LOG.warning("%s and %s begin or end documents with different tokens (%s)", prefixes[0], prefix, what)
    return common


def _entry(tokenizer: dict[str, Any], key: str) -> object:
    """What a manifest says of its tokenizer; an older one does not say whether a template added `bos`."""
    templates = tokenizer.get("type") == "HuggingFaceTokenizer"
    return tokenizer.get(key, "unknown" if key != "bos" or templates else None)


def _packing(prefixes: Sequence[str], manifests: Sequence[papers.Manifest]) -> dict[str, Any]:
    """What the manifest says of packing: the length that all inputs are packed for, if they are."""
    lengths = [manifest.packed_length for manifest in manifests]
    if len(set(lengths)) == 1:
        return {"packed": {"seq_length": lengths[0]}} if lengths[0] else {}
    odd = next(i for i, length in enumerate(lengths) if length != lengths[0])
    what = [f"{prefixes[i]} is {f'packed for {lengths[i]} tokens' if lengths[i] else 'not packed'}" for i in (0, odd)]
    LOG.warning("%s and %s: the merged dataset is read as one that is not packed", *what)
    return {}


def _manifests(prefixes: Sequence[str]) -> list[papers.Manifest]:
    """The inputs' manifests, checked against their files' sizes; none if any input has none.

    Raises:
        DataError: two inputs were made with different tokenizers.
    """
    found = [(prefix, papers.read_manifest(prefix)) for prefix in prefixes]
    known = [(prefix, manifest) for prefix, manifest in found if manifest is not None]
    for prefix, manifest in known:
        papers.check_files(prefix, manifest, contents=False)
        first, expected = known[0]
        if manifest.tokenizer.get("fingerprint") != expected.tokenizer.get("fingerprint"):
            raise DataError(
                "Datasets that are merged were made with one tokenizer",
                found=f"{prefix} and {first} were made with different ones",
                fix="Preprocess one of them again with the other's tokenizer",
            )
    if len(known) == len(found):
        return [manifest for _, manifest in known]
    if known:
        LOG.warning(
            "%s has no manifest, and so the merged dataset has none: training checks neither tokenizer nor files",
            next(prefix for prefix, manifest in found if manifest is None),
        )
    return []
