"""Rendezvous server: a thread of rank 0 that registers the ranks of a job and sends the first failure to all.

Plain sockets and one JSON object per line instead of a TCPStore: a waiting rank handles signals, the end of a rank is
noticed at once, other programs at the port are recognized, and torch is not needed.

A rank sends `hello` (Member); the answer is `joined`, `failed` (StartFailure) or `other_job`. Then, in this order:

    complete   to rank 0     all ranks have joined
    store      from rank 0   port of the job's TCPStore; sent on to all ranks
    ready      from a rank   the rank's process group exists
    begin      to all ranks  all ranks are ready; watchdogs detect later failures
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lite.runs.atomic import replace_file

OTHER_PROGRAM = "another program answers"
"""Reason of a failed connection: what listens at the address is no server of a job."""

OTHER_ADDRESS = (
    "Set MASTER_PORT to a free port of the host of rank 0, the same for all ranks, and MASTER_ADDR to that host"
)
"""Fix where something else listens at the address."""

MAX_LINE = 1 << 20
SEND_TIMEOUT = 10.0
"""Seconds after which sending to a rank that does not read fails."""
NAME_SERVER_SECONDS = 5.0
"""Seconds for which name servers may be unavailable."""

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Member:
    """Identity of one rank's process, as sent in `hello`."""

    job: str
    rank: int
    world_size: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


@dataclass(frozen=True, kw_only=True)
class StartFailure:
    """Error because of which a job cannot begin.

    Attributes:
        rank: the rank that failed.
        host: of that rank.
        problem, rule, fix: the parts of the message, as in MegatronLiteError.
        printed: whether that rank prints the error; False: its process has ended.
        refused: whether the receiver is refused as a rank of the job, and prints the error itself.
    """

    rank: int
    host: str
    problem: str
    rule: str
    fix: str
    printed: bool = True
    refused: bool = False

    @property
    def text(self) -> tuple[str, str]:
        """Return the part of the error that is equal on ranks with the same error; `fix` may list local files."""
        return self.problem, self.rule


class Connection:
    """Socket that carries one JSON object per line.

    Raises:
        ConnectionError: the other side has closed the connection, or is another program.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(SEND_TIMEOUT)
        self.socket = sock
        self.member: Member | None = None
        self._buffer = b""

    def fileno(self) -> int:
        """Return the socket's file descriptor, for select."""
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; wait for data if there are none."""
        data = self.socket.recv(1 << 16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > MAX_LINE:
            raise ConnectionError("connection closed" if not data else OTHER_PROGRAM)
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionError(OTHER_PROGRAM) from error
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError(OTHER_PROGRAM)
        return messages

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class ConnectionServer(ABC):
    """Thread that accepts connections and handles their messages.

    Args:
        listener: a listening socket, which the server closes.
        name: of the thread, which starts at once: a subclass sets its own state first.
    """

    def __init__(self, listener: socket.socket, name: str) -> None:
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, end the thread and close all connections, so that the port can be bound again."""
        self._closing = True
        with suppress(OSError):
            # Wakes the thread, which closes all connections.
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        self._thread.join(2.0)

    @abstractmethod
    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        """Handle one message; an OSError, TypeError, KeyError or ValueError closes the connection."""

    @abstractmethod
    def _dropped(self, member: Member) -> None:
        """Handle the end of a rank's connection."""

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(1.0):
                if key.fileobj is self._listener:
                    with suppress(OSError):
                        accepted, _ = self._listener.accept()
                        self._selector.register(Connection(accepted), selectors.EVENT_READ)
                else:
                    self._serve(key.fileobj)  # type: ignore[arg-type]
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self, connection: Connection) -> None:
        try:
            for message in connection.read():
                self._handle(connection, message)
        except (OSError, TypeError, KeyError, ValueError):  # closed, or not a rank
            self._selector.unregister(connection)
            connection.close()
            if connection.member is not None:
                self._dropped(connection.member)


class RendezvousServer(ConnectionServer):
    """Registers the ranks of one job until it begins, and refuses every later process.

    Args:
        listener: a listening socket, which the server closes.
        member: rank 0, in whose process the server runs.
    """

    def __init__(self, listener: socket.socket, member: Member) -> None:
        self.token = uuid.uuid4().hex
        self.begun = False
        self.failure: StartFailure | None = None
        self._owner = member
        self._members: dict[int, Connection] = {}
        self._known: dict[int, Member] = {}
        self._ready: set[int] = set()
        self._informed: set[int] = set()
        allow_files(4 * member.world_size + 512)  # one connection here, and three to the store
        super().__init__(listener, "rendezvous")

    def missing(self) -> list[int]:
        """Return the ranks that have not joined yet."""
        return sorted(set(range(self._owner.world_size)) - set(self._known))

    def wait_until_reported(self, seconds: float) -> None:
        """Return once the failure was sent to every other rank, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self._informed - {0}) < self._owner.world_size - 1:
            time.sleep(0.01)

    def _dropped(self, member: Member) -> None:
        if self._members.pop(member.rank, None) is None or self.begun:
            return
        self._fail(
            StartFailure(
                rank=member.rank,
                host=member.host,
                problem=f"Rank {member.rank} on {member} ended before all ranks had joined",
                rule="",
                fix=f"Read the output of rank {member.rank}",
                printed=False,
            )
        )

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        if "hello" in message:
            self._welcome(connection, Member(**message["hello"]))
        elif "failed" in message:
            # The sender ends, so it counts as informed.
            self._fail(StartFailure(**message["failed"]))
        elif connection.member is None:
            raise ConnectionError("no hello before")
        elif "store" in message:
            self._broadcast(store=message["store"])
        elif "ready" in message:
            self._ready.add(connection.member.rank)
            if len(self._ready) == self._owner.world_size and self.failure is None:
                self.begun = True
                self._broadcast(begin=True)

    def _welcome(self, connection: Connection, member: Member) -> None:
        if member.job != self._owner.job:
            connection.send(other_job=self._owner.job)
        elif (conflict := self._conflict(member)) is not None and (self.begun or self.failure is None):
            if not self.begun:
                self._fail(conflict)
            connection.send(failed=asdict(replace(conflict, refused=True)))
        elif self.failure is not None:
            self._informed.add(member.rank)
            connection.send(failed=asdict(self.failure))
        else:
            connection.member = member
            self._members[member.rank], self._known[member.rank] = connection, member
            connection.send(joined=self.token)
            if len(self._known) == self._owner.world_size:
                self._members[0].send(complete=True)

    def _conflict(self, member: Member) -> StartFailure | None:
        """Return why a process cannot be a rank of this job; None: it can."""
        known = self._owner if member.rank == 0 else self._known.get(member.rank)
        if member.world_size != self._owner.world_size:
            rule = "All ranks of a job must be started with the same world size"
            problem = f"Rank {member.rank} on {member} was started with a world size of {member.world_size}, rank 0 on "
            problem += f"{self._owner} with {self._owner.world_size}"
            fix = (
                "Start all ranks with the same world size (--ranks-per-task N, or one task for each GPU, if nodes have "
                "different numbers of GPUs); if these are two jobs, give each another MASTER_PORT"
            )
        elif known is not None and (known.host, known.pid) != (member.host, member.pid):
            rule = "Every rank of a job is one process"
            problem = f"Rank {member.rank} was started twice: on {known} and on {member}"
            fix = (
                "Start each rank once, and end processes of an earlier start; if these are two jobs, give each another "
            )
            fix += "MASTER_PORT"
        else:
            return None
        return StartFailure(rank=0, host=self._owner.host, problem=problem, rule=rule, fix=fix)

    def _fail(self, failure: StartFailure) -> None:
        """Send the job's first failure to all ranks; later ones are ignored."""
        if self.failure is None and not self.begun:
            self.failure = failure
            self._broadcast(failed=asdict(failure))
            self._informed |= set(self._members)
        self._informed.add(failure.rank)

    def _broadcast(self, **message: Any) -> None:
        for connection in list(self._members.values()):
            # A closed connection is noticed when it is read.
            with suppress(OSError):
                connection.send(**message)


def allow_files(number: int) -> None:
    """Raise the process's limit of open files to `number`, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def bind(port: int) -> socket.socket:
    """Return a socket that listens at a port of all interfaces; 0: any free port.

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
        OSError: the host is unknown.
    """
    deadline = time.monotonic() + NAME_SERVER_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in found))
        except socket.gaierror as error:
            # Name servers fail temporarily when a thousand ranks ask at once.
            if error.errno != socket.EAI_AGAIN or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def write_port(path: Path, port: int) -> None:
    """Write the port of rank 0 to a file, atomically."""
    replace_file(path, str(port).encode())


def read_port(path: Path | None) -> list[Address]:
    """Return the address of rank 0 from a file; empty: the file does not exist yet."""
    with suppress(OSError, ValueError):
        return [("127.0.0.1", int(path.read_text(encoding="utf-8")))] if path is not None else []
    return []
