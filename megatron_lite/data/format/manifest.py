"""Dataset manifest ({prefix}.manifest.json): how a dataset was made, with sizes and checksums of its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.data.format.index_format import bin_path, idx_path
from megatron_lite.errors import DataError
from megatron_lite.runs.atomic import replace_file

FORMAT = 1
PIECE = 1 << 22
SMALL_INDEX = 1 << 24
"""Bytes of an index that are read in a few milliseconds."""


@dataclass(frozen=True)
class Manifest:
    """A dataset's papers. Nothing in it depends on the time, the host or the number of workers."""

    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_pieces: list[tuple[int, int]]
    """(bytes, CRC-32) of consecutive pieces of the .bin: damage is found near its place, by several readers."""
    idx_pieces: list[tuple[int, int]]
    tokenizer: dict[str, Any]
    """`type`, `fingerprint` and `vocab_size`; `rules`, the hash of how text was segmented; `bos` and `eod`, the ids
    that begin and end each document, or None; of sentences the `punkt` model's hash. Older manifests lack `rules` and
    `bos`: their documents hold what the template of a HuggingFaceTokenizer added."""
    flags: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """`path` and `bytes` of each input."""
    plan: str = ""
    """Hash of everything that decides the bytes: inputs with their times of change, flags, tokenizer."""
    report: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def packed_length(self) -> int:
        """The sequence length that the dataset was packed for; 0: it was not."""
        return int(self.flags.get("packed", {}).get("seq_length", 0))


def manifest_path(prefix: str | Path) -> Path:
    """Where the manifest of the dataset `prefix` lies."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write it aside and rename it."""
    write_json(manifest_path(prefix), asdict(manifest))


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a dataset; None if it has none (both Megatrons' have none).

    Raises:
        DataError: there is one, and it cannot be read.
    """
    path = manifest_path(prefix)
    try:
        saved = json.loads(path.read_bytes())
        pieces = {name: [(int(size), int(crc)) for size, crc in saved[name]] for name in ("bin_pieces", "idx_pieces")}
        return Manifest(**{**saved, **pieces})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            "A dataset's manifest can be read",
            found=f"{path}: {type(error).__name__}: {error}",
            fix="Remove it to go without its checks, or preprocess again",
        ) from error


def refuse_to_replace(prefix: str | Path) -> None:
    """Leave alone what another command made.

    Raises:
        DataError: there is a dataset of this name, or a half of one.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if path.exists():
            raise DataError(
                "A finished dataset is not replaced without being told",
                found=f"{path} exists, made by another command or version, or from other input",
                fix="Pass --overwrite, or give another name",
            )


def check_files(prefix: str | Path, manifest: Manifest, *, contents: bool = True) -> None:
    """Compare a dataset's files with its manifest: sizes, and with `contents` every byte's checksum.

    The bytes of an index of up to SMALL_INDEX are compared always: one of another order of the same documents has the
    same size and fits the .bin, and would silently cut it at the wrong places.

    Raises:
        DataError: they differ; the message says where.
    """
    for path, pieces in ((bin_path(prefix), manifest.bin_pieces), (idx_path(prefix), manifest.idx_pieces)):
        size = path.stat().st_size if path.is_file() else -1
        if size != sum(size for size, _ in pieces):
            raise _differs(path, f"has {size} bytes, the manifest says {sum(size for size, _ in pieces)}")
        if contents or (path == idx_path(prefix) and size <= SMALL_INDEX):
            _check_contents(path, pieces)


def _check_contents(path: Path, pieces: Sequence[tuple[int, int]]) -> None:
    start = 0
    with path.open("rb") as file:
        for size, expected in pieces:
            checksum, left = 0, size
            while left:
                data = file.read(min(left, PIECE))
                if not data:
                    raise _differs(path, f"ends at byte {start + size - left}")
                checksum = zlib.crc32(data, checksum)
                left -= len(data)
            if checksum != expected:
                raise _differs(path, f"has other bytes than the manifest says between {start} and {start + size}")
            start += size


def check_manifest(prefix: str | Path, fingerprint: str) -> Manifest | None:
    """Compare a dataset with its manifest: file sizes and tokenizer.

    Args:
        prefix: common path of the dataset's files.
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
            f"{prefix} was made with {manifest.tokenizer.get('type', 'a tokenizer')} of fingerprint {made_with}, the "
            f"run's tokenizer has {fingerprint}",
            fix="Give the tokenizer files that the dataset was made with, or preprocess it again",
        )
    return manifest


def _differs(path: Path, what: str) -> DataError:
    return DataError(
        "A dataset's files are those of its manifest",
        found=f"{path} {what}",
        fix="Copy the dataset again from where it is whole, or preprocess again",
    )


def file_pieces(path: Path) -> list[tuple[int, int]]:
    """The one piece that a whole file is: its (bytes, CRC-32)."""
    checksum = size = 0
    with path.open("rb") as file:
        while data := file.read(PIECE):
            checksum = zlib.crc32(data, checksum)
            size += len(data)
    return [(size, checksum)]


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file, or none, or all of the new one."""
    replace_file(path, json.dumps(content, indent=1).encode())
