"""Host facts without torch: Python and code version, /dev/shm, resolution of the host's own name."""

from __future__ import annotations

import ipaddress
import platform
import shutil
import socket
from pathlib import Path

from megatron_lite.ops.doctor.report import Node
from megatron_lite.runs.code_version import PACKAGE, code_fingerprint, git_revision, source_hashes


def program_versions() -> dict[str, str]:
    """Return the versions of Python and of this package with its git revision."""
    digest, _, name = code_fingerprint(source_hashes(PACKAGE), git_revision(PACKAGE)).partition(" of ")
    return {"python": platform.python_version(), "megatron_lite": f"{name.removeprefix('megatron_lite ')} ({digest})"}


def node_facts(num_gpus: int | None, *, shm: Path = Path("/dev/shm")) -> Node:
    """Return the facts of this host."""
    usage = shutil.disk_usage(shm) if shm.is_dir() else None
    return Node(
        shm_total=usage.total if usage else 0,
        shm_free=usage.free if usage else 0,
        loopback=loopback_address(socket.gethostname()),
        num_gpus=num_gpus,
    )


def loopback_address(host: str) -> str:
    """Return the address of a host name if it is a loopback address; empty: it is not, or the name is unknown.

    Debian's /etc/hosts maps the own name to 127.0.1.1: gloo and NCCL then offer an address that no other host reaches.
    """
    try:
        found = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    address = str(found[0][4][0])
    return address if ipaddress.ip_address(address).is_loopback else ""
