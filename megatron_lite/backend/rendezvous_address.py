"""Rendezvous addresses: name resolution, listening sockets, and the file of file://."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

from megatron_lite.runs.atomic import replace_file

Address = tuple[str, int]

TEMPORARY = 5.0
"""Seconds for which name servers may be unavailable."""


def bind(port: int) -> socket.socket:
    """Return a socket that listens at a port of all interfaces; 0: a free one.

    Raises:
        OSError: the port is in use.
    """
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def look_up(host: str) -> list[str]:
    """Return the network addresses of a host, in the order of preference.

    Raises:
        OSError: it has none.
    """
    deadline = time.monotonic() + TEMPORARY
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in found))
        except socket.gaierror as error:
            # Name servers fail for a moment when a thousand ranks ask at once.
            if error.errno != socket.EAI_AGAIN or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def write_port(path: Path, port: int) -> None:
    """Write the port of rank 0 to a file, in one step."""
    replace_file(path, str(port).encode())


def read_port(path: Path | None) -> list[Address]:
    """Return the address of rank 0 that a file holds; empty if there is none yet."""
    with suppress(OSError, ValueError):
        return [("127.0.0.1", int(path.read_text()))] if path is not None else []
    return []
