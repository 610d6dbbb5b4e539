"""Dataset merging: concatenates finished datasets and their manifests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.loss_mask import SUFFIX, has_mask, mask_prefix, remove_mask
from megatron_lite.data.format.manifest import (
    DatasetManifest,
    check_files,
    manifest_of,
    manifest_path,
    read_manifest,
    require_absent,
    write_manifest,
)
from megatron_lite.errors import DataError


@dataclass
class Merged:
    """Result of a merge: counts, and warnings about differences between the inputs."""

    documents: int
    tokens: int
    warnings: list[str]


def find_prefixes(folder: Path) -> list[str]:
    """Return the datasets of a folder, sorted by name.

    Raises:
        DataError: the folder is missing, has no dataset, or has an .idx or .bin without the other file.
    """
    if not folder.is_dir():
        raise DataError(
            f"--input {folder} {'is not a directory' if folder.exists() else 'does not exist'}",
            fix="Give --input a folder with datasets, or name them: --datasets PREFIX PREFIX",
        )
    bins = {path.stem for path in folder.glob("*.bin") if not path.stem.endswith(SUFFIX)}
    indices = {path.stem for path in folder.glob("*.idx") if not path.stem.endswith(SUFFIX)}
    if single := sorted(bins ^ indices):
        raise DataError(
            f"Datasets in --input {folder} are incomplete: "
            + ", ".join(f"{name}{'.idx' if name in bins else '.bin'} is missing" for name in single[:3])
            + (f", and {len(single) - 3} more" if len(single) > 3 else ""),
            fix="Copy the missing files there, or name the datasets to merge with --datasets PREFIX PREFIX",
        )
    if not bins:
        raise DataError(
            f"--input {folder} contains no dataset (.bin and .idx files)",
            fix="Give another folder, or name the datasets to merge with --datasets PREFIX PREFIX",
        )
    return [str(folder / name) for name in sorted(bins)]


def merge_datasets(
    prefixes: Sequence[str], output: str, *, overwrite: bool = False, advance: Callable[[int], None] = lambda _: None
) -> Merged:
    """Write the documents of several datasets in order to one dataset, with a manifest if all inputs have one.

    Args:
        prefixes: paths of the inputs.
        output: path of the merged dataset.
        overwrite: replace an existing dataset.
        advance: called with the number of tokens of each input after it is written.

    Raises:
        DataError: an input is missing or damaged, they differ in token type or tokenizer, or `output` exists.
    """
    if any(Path(prefix).absolute() == Path(output).absolute() for prefix in prefixes):
        raise DataError(
            f"{output} is both an input and the output (--output-prefix) of the merge",
            fix="Give another --output-prefix",
        )
    if not overwrite:
        require_absent(output)
    _merge_masks(prefixes, output)
    warnings: list[str] = []
    manifests = _read_manifests(prefixes, warnings)
    dtype = IndexedDataset(prefixes[0]).dtype
    with IndexedDatasetWriter(output, dtype) as writer:
        for prefix in prefixes:
            before = writer.num_tokens
            writer.append(prefix)
            advance(writer.num_tokens - before)
        manifest_path(output).unlink(missing_ok=True)
    if manifests:
        merged = manifest_of(
            writer,
            [piece for manifest in manifests for piece in manifest.bin_pieces],
            _common_tokenizer(prefixes, manifests, warnings),
            flags={"merged_from": list(prefixes)} | _common_packing(prefixes, manifests, warnings),
            inputs=[source for manifest in manifests for source in manifest.inputs],
        )
        write_manifest(output, merged)
    return Merged(writer.num_documents, writer.num_tokens, warnings)


def _merge_masks(prefixes: Sequence[str], output: str) -> None:
    """Merge the loss masks of the inputs, if they have any.

    Raises:
        DataError: some of them have one, and some have none.
    """
    remove_mask(output)
    without = [prefix for prefix in prefixes if not has_mask(prefix)]
    if len(without) == len(prefixes):
        return
    if without:
        raise DataError(
            f"Cannot merge {without[0]} with datasets that mark their answers: it has no loss mask",
            fix="Merge datasets of one kind, or preprocess all of them with --input-format prompt-completion or chat",
        )
    merge_datasets([mask_prefix(prefix) for prefix in prefixes], mask_prefix(output), overwrite=True)


def _read_manifests(prefixes: Sequence[str], warnings: list[str]) -> list[DatasetManifest]:
    """Return the manifests of the inputs, compared with the sizes of their files; none if an input has none.

    Raises:
        DataError: two inputs were made with different tokenizers.
    """
    found = [(prefix, read_manifest(prefix)) for prefix in prefixes]
    known = [(prefix, manifest) for prefix, manifest in found if manifest is not None]
    for prefix, manifest in known:
        check_files(prefix, manifest, contents=False)
        first, expected = known[0]
        if manifest.tokenizer.get("fingerprint") != expected.tokenizer.get("fingerprint"):
            raise DataError(
                f"Cannot merge {prefix} and {first}, which were made with different tokenizers",
                fix="Preprocess one of them again with the tokenizer of the other",
            )
    if len(known) == len(found):
        return [manifest for _, manifest in known]
    if known:
        without = next(prefix for prefix, manifest in found if manifest is None)
        warnings.append(
            f"{without} has no manifest, therefore the merged dataset has none: training checks neither its tokenizer "
            "nor its files"
        )
    return []


def _common_tokenizer(
    prefixes: Sequence[str], manifests: Sequence[DatasetManifest], warnings: list[str]
) -> dict[str, Any]:
    """Return the tokenizer entries that are equal in all inputs."""
    first = manifests[0].tokenizer
    common = dict(first)
    for prefix, manifest in zip(prefixes[1:], manifests[1:], strict=True):
        other = manifest.tokenizer
        differ = [key for key in {**first, **other} if _entry(first, key) != _entry(other, key)]
        for key in differ:
            common.pop(key, None)
        ends = [key for key in differ if key in ("bos", "eod", "control_code")]
        if ends:
            texts = [f"{key} {_entry(first, key)} and {_entry(other, key)}" for key in ends]
            warnings.append(
                f"{prefixes[0]} and {prefix} begin or end documents with different tokens ({', '.join(texts)})"
            )
    return common


def _entry(tokenizer: dict[str, Any], key: str) -> object:
    """Return an entry of a manifest's tokenizer; older manifests do not record whether a template added `bos`."""
    has_template = tokenizer.get("type") == "HuggingFaceTokenizer"
    return tokenizer.get(key, None if key == "control_code" or (key == "bos" and not has_template) else "unknown")


def _common_packing(
    prefixes: Sequence[str], manifests: Sequence[DatasetManifest], warnings: list[str]
) -> dict[str, Any]:
    """Return the manifest's entry on packing if all inputs are packed for one sequence length."""
    lengths = [manifest.packed_length for manifest in manifests]
    if len(set(lengths)) == 1:
        return {"packed": {"seq_length": lengths[0]}} if lengths[0] else {}
    other = next(i for i, length in enumerate(lengths) if length != lengths[0])
    texts = [
        f"{prefixes[i]} is {f'packed for {lengths[i]} tokens' if lengths[i] else 'not packed'}" for i in (0, other)
    ]
    warnings.append(f"{texts[0]} and {texts[1]}: the merged dataset is treated as not packed")
    return {}
