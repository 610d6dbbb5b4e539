"""Code version: hash of the package's sources and git revision."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import megatron_lite

PACKAGE = Path(megatron_lite.__file__).parent


def source_hashes(package: Path) -> dict[str, str]:
    """Return a short hash of each source file by its path in the package. The version is the same in edited code."""
    return {
        path.relative_to(package).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        for path in sorted(package.rglob("*.py"))
    }


def code_fingerprint(sources: Mapping[str, str], revision: str = "") -> str:
    """Return the hash of all sources, with version and revision as its name (see check_fingerprints)."""
    digest = hashlib.blake2b(json.dumps(dict(sources)).encode(), digest_size=8).hexdigest()
    return f"{digest} of megatron_lite {megatron_lite.__version__}" + (
        f" at git revision {revision}" if revision else ""
    )


def git_revision(package: Path) -> str:
    """Return the git commit that a package's folder has checked out; empty: none, or git is not installed."""
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        repository, commit = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    # An installed package may lie inside the repository of another project.
    return commit[:12] if Path(repository) == package.resolve().parent else ""
