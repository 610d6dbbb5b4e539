"""Several finished datasets end to end as one, with a manifest if all of them have one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.data.index_format import bin_path, idx_path
from megatron_lite.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_lite.data.preprocess import manifest as papers
from megatron_lite.errors import DataError


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


def merge_datasets(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> tuple[int, int]:
    """Write the documents of `prefixes` in order to `output`; returns its documents and tokens.

    Raises:
        DataError: an input is missing or damaged, they differ in token type or tokenizer, or `output` exists.
    """
    if any(Path(prefix).absolute() == Path(output).absolute() for prefix in prefixes):
        raise DataError(
            "A merge does not write to its own input", found=f"{output} is both", fix="Give another --output-prefix"
        )
    existing = [path for path in (bin_path(output), idx_path(output)) if path.exists()]
    if existing and not overwrite:
        raise DataError(
            "A finished dataset is not replaced without being told",
            found=f"{existing[0]} exists",
            fix="Pass --overwrite, or give another --output-prefix",
        )
    manifests = _manifests(prefixes)
    dtype = IndexedDataset(prefixes[0]).dtype
    with contextlib.suppress(FileNotFoundError):
        papers.manifest_path(output).unlink()
    with IndexedDatasetWriter(output, dtype) as writer:
        for prefix in prefixes:
            writer.append(prefix)
    if manifests:
        merged = papers.Manifest(
            dtype=writer.dtype.name,
            documents=writer.num_documents,
            sequences=writer.num_sequences,
            tokens=writer.num_tokens,
            bin_pieces=[piece for manifest in manifests for piece in manifest.bin_pieces],
            idx_pieces=papers.file_pieces(idx_path(output)),
            tokenizer=manifests[0].tokenizer,
            flags={"merged_from": list(prefixes)},
            inputs=[source for manifest in manifests for source in manifest.inputs],
        )
        papers.write_manifest(output, merged)
    return writer.num_documents, writer.num_tokens


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
    return [manifest for _, manifest in known] if len(known) == len(found) else []
