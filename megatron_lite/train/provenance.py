"""Provenance of a checkpoint: config and fingerprints of tokenizer, data and code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import megatron_lite
from megatron_lite.config.run import RunConfig
from megatron_lite.runs.comparison import config_as_json
from megatron_lite.runs.manifest import Provenance
from megatron_lite.schedules.data_order import DataSegment


def provenance_of(
    config: RunConfig, fingerprints: Mapping[str, str], history: tuple[DataSegment, ...] = ()
) -> Provenance:
    """The provenance of a run.

    Args:
        config: the whole of it is kept.
        fingerprints: of tokenizer and data; the code's is added.
        history: what the run reads, by segment.
    """
    code = f"megatron_lite {megatron_lite.__version__} {code_fingerprint(Path(megatron_lite.__file__).parent)}"
    return Provenance(config_as_json(config), {**fingerprints, "code": code}, data_history=history)


def code_fingerprint(package: Path) -> str:
    """Hash of a package's sources: their names and text. A version says nothing of an edited checkout."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(text)} ".encode() + text)
    return digest.hexdigest()
