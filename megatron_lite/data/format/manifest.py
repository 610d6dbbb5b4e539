"""Dataset manifest ({prefix}.manifest.json): how a dataset was made, with sizes and checksums of its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.data.format.index_format import bin_path, idx_path
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.errors import DataError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.system_errors import reason, remedy

FORMAT = 1
_SHOWN = len("sha256:") + 12
"""Characters of a fingerprint in errors."""
READ_BYTES = 1 << 22
SMALL_INDEX = 1 << 24
"""Bytes of an index that is read in a few milliseconds; up to this size, its checksum is always compared."""


@dataclass(frozen=True)
class DatasetManifest:
    """Origin and checksums of a dataset. The content is independent of time, host and number of workers."""

    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_pieces: list[tuple[int, int]]
    """(bytes, CRC-32) of consecutive pieces of the .bin, which locate damage within the file."""
    idx_pieces: list[tuple[int, int]]
    tokenizer: dict[str, Any]
    """`type`, `fingerprint` and `vocab_size`; `rules`, the hash of the segmentation rules; `bos` and `eod`, the ids
    that begin and end each document, or None; for sentences, the hash of the `punkt` model. Older manifests have no
    `rules` and `bos`: their documents contain the tokens that the template of a HuggingFaceTokenizer added."""
    flags: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """`path` and `bytes` of each input."""
    plan: str = ""
    """Hash of everything that the dataset's bytes depend on: inputs with modification times, flags, tokenizer."""
    report: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def packed_length(self) -> int:
        """Sequence length that the dataset was packed for; 0: it is not packed."""
        return int(self.flags.get("packed", {}).get("seq_length", 0))


def manifest_path(prefix: str | Path) -> Path:
    """Return the path of the manifest of the dataset `prefix`."""
    return Path(f"{prefix}.manifest.json")


def manifest_of(
    writer: IndexedDatasetWriter,
    bin_pieces: list[tuple[int, int]],
    tokenizer: dict[str, Any],
    *,
    flags: dict[str, Any],
    inputs: list[dict[str, Any]],
    plan: str = "",
    report: dict[str, Any] | None = None,
) -> DatasetManifest:
    """Return the manifest of a dataset that `writer` has finished; see DatasetManifest for the other arguments."""
    return DatasetManifest(
        dtype=writer.dtype.name,
        documents=writer.num_documents,
        sequences=writer.num_sequences,
        tokens=writer.num_tokens,
        bin_pieces=bin_pieces,
        idx_pieces=[writer.index_piece],
        tokenizer=tokenizer,
        flags=flags,
        inputs=inputs,
        plan=plan,
        report=report or {},
    )


def write_manifest(prefix: str | Path, manifest: DatasetManifest) -> None:
    """Write a manifest atomically."""
    replace_file(manifest_path(prefix), json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(prefix: str | Path) -> DatasetManifest | None:
    """Return the manifest of a dataset; None if it has none (Megatron writes none).

    Raises:
        DataError: the manifest cannot be read.
    """
    path = manifest_path(prefix)
    try:
        saved = json.loads(path.read_bytes())
        pieces = {name: [(int(size), int(crc)) for size, crc in saved[name]] for name in ("bin_pieces", "idx_pieces")}
        return DatasetManifest(**{**saved, **pieces})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"Cannot read the dataset manifest {path}: {reason(error)}", fix=remedy(error, path)) from error
    except (ValueError, TypeError, KeyError) as error:
        problem = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"The dataset manifest {path} is damaged: {problem}",
            fix=f"Delete {path} to use the dataset without its checksums and tokenizer check, or preprocess the corpus "
            "again",
        ) from error


def is_complete(prefix: str | Path, plan: str) -> bool:
    """Return whether the dataset `prefix` was made with this plan.

    Raises:
        DataError: it was, but its files have other sizes by now.
    """
    manifest = read_manifest(prefix)
    if manifest is None or manifest.plan != plan:
        return False
    check_files(prefix, manifest, contents=False)
    return True


def require_absent(prefix: str | Path) -> None:
    """Check that no dataset has this name, so that none is overwritten.

    Raises:
        DataError: one of its files exists.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if path.exists():
            raise DataError(
                f"Refusing to overwrite {path}, which was made by another command or version, or from other input",
                fix="Pass --overwrite to replace it, or give another output prefix",
            )


def check_files(prefix: str | Path, manifest: DatasetManifest, *, contents: bool = True) -> None:
    """Compare a dataset's files with its manifest.

    The content of an index of up to SMALL_INDEX bytes is always compared: an index for another order of the same
    documents has the same size and matches the .bin, but would split it at the wrong tokens.

    Args:
        prefix: path of the dataset.
        manifest: its manifest.
        contents: compare the checksums of all bytes, in addition to the sizes.

    Raises:
        DataError: a file differs; the message names the place.
    """
    for path, pieces in ((bin_path(prefix), manifest.bin_pieces), (idx_path(prefix), manifest.idx_pieces)):
        size, expected = (path.stat().st_size if path.is_file() else -1), sum(size for size, _ in pieces)
        if size != expected:
            raise _mismatch(path, f"it has {size} bytes, the manifest says {expected}")
        if contents or (path == idx_path(prefix) and size <= SMALL_INDEX):
            _check_contents(path, pieces)


def _check_contents(path: Path, pieces: Sequence[tuple[int, int]]) -> None:
    start = 0
    with path.open("rb") as file:
        for size, expected in pieces:
            checksum, left = 0, size
            while left:
                data = file.read(min(left, READ_BYTES))
                if not data:
                    raise _mismatch(path, f"it ends at byte {start + size - left}")
                checksum = zlib.crc32(data, checksum)
                left -= len(data)
            if checksum != expected:
                raise _mismatch(path, f"the checksum of bytes {start} to {start + size} does not match")
            start += size


def check_manifest(prefix: str | Path, fingerprint: str) -> DatasetManifest | None:
    """Compare a dataset with its manifest: file sizes and tokenizer.

    Args:
        prefix: path of the dataset.
        fingerprint: fingerprint of the run's tokenizer; "": not compared.

    Returns:
        The manifest; None if the dataset has none.

    Raises:
        DataError: the files or the tokenizer differ.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return None
    check_files(prefix, manifest, contents=False)
    made_with = str(manifest.tokenizer.get("fingerprint", ""))
    if fingerprint and made_with and made_with != fingerprint:
        raise DataError(
            f"The dataset {prefix} was made with another vocabulary than that of this command's tokenizer: a "
            f"{manifest.tokenizer.get('type', 'tokenizer')} of {manifest.tokenizer.get('vocab_size', 0):,} tokens with "
            f"the fingerprint {made_with[:_SHOWN]}… ({manifest_path(prefix)}), which here is {fingerprint[:_SHOWN]}…",
            fix="Give the tokenizer with which the dataset was made (--tokenizer-model, or --vocab-file and "
            "--merge-file), or preprocess the corpus again with this one",
        )
    return manifest


def _mismatch(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} does not match its manifest: {problem}",
        fix="Copy the dataset again from an intact copy, or preprocess the corpus again",
    )
