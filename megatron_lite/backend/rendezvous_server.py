"""Rendezvous server: a thread of rank 0 that registers the ranks of a job and passes the first failure on to all.

Plain sockets and one JSON object per line, instead of a TCPStore: a waiting rank stays open to signals, a rank that
dies is missed at once, a program that is not ours is told from one that is, and no part of it needs torch.

A rank sends `hello` (Member), and is answered `joined`, `failed` (Failure) or `other_job`. Then, in this order:

    complete   to rank 0     all ranks have joined
    store      from rank 0   port of the TCPStore that it has opened; passed on to all ranks
    ready      from a rank   its process group exists
    begin      to all ranks  all are ready; the watchdogs take over
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any

MAX_LINE = 1 << 20
SEND_TIMEOUT = 10.0
"""Seconds for which a rank may not read what it is sent."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank as it introduces itself."""

    job: str
    rank: int
    world_size: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job cannot begin.

    Attributes:
        rank: where it failed.
        host: of that rank.
        problem, rule, fix: the parts of the message, as in MegatronLiteError.
        printed: whether that rank prints it: not if its process is gone.
        personal: whether the rank that is told has to print it: it is no rank of this job.
    """

    rank: int
    host: str
    problem: str
    rule: str
    fix: str
    printed: bool = True
    personal: bool = False

    @property
    def text(self) -> tuple[str, str]:
        """What ranks that fail alike have in common; `fix` may list what is on a rank's disk."""
        return self.problem, self.rule


class Line:
    """A socket that carries one JSON object per line.

    Raises:
        ConnectionError: the other side is gone, or does not speak this protocol.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(SEND_TIMEOUT)
        self.socket = sock
        self.member: Member | None = None
        self._buffer = b""

    def fileno(self) -> int:
        """The socket's, for select."""
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; blocks if nothing has."""
        data = self.socket.recv(1 << 16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > MAX_LINE:
            raise ConnectionError("connection closed" if not data else "another program answers")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionError("another program answers") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("another program answers")
        return messages

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class RendezvousServer:
    """Registers the ranks of one job until it begins; afterwards only turns away those who come too late.

    Args:
        listener: a listening socket, which the server owns.
        member: rank 0, in whose process it runs.
    """

    def __init__(self, listener: socket.socket, member: Member) -> None:
        self.port: int = listener.getsockname()[1]
        self.token = uuid.uuid4().hex
        self.begun = False
        self.failure: Failure | None = None
        self._owner = member
        self._members: dict[int, Line] = {}
        self._known: dict[int, Member] = {}
        self._ready: set[int] = set()
        self._told: set[int] = set()
        _allow_files(4 * member.world_size + 512)  # this connection, and three to the store that follows
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._thread.start()

    def missing(self) -> list[int]:
        """Return the ranks that have not joined yet."""
        return sorted(set(range(self._owner.world_size)) - set(self._known))

    def wait_until_reported(self, seconds: float) -> None:
        """Return once every other rank has been told the failure, or when the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self._told - {0}) < self._owner.world_size - 1:
            time.sleep(0.01)

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._closing = True
        with contextlib.suppress(OSError):
            # Wakes the thread, which closes everything.
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(key.fileobj)  # type: ignore[arg-type]
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            self._selector.register(Line(accepted), selectors.EVENT_READ)

    def _serve(self, line: Line) -> None:
        try:
            for message in line.read():
                self._handle(line, message)
        except (OSError, TypeError, KeyError):  # gone, or not one of ours
            self._drop(line)

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line)
        line.close()
        member = line.member
        if member is None or self._members.pop(member.rank, None) is None or self.begun:
            return
        self._fail(
            Failure(
                rank=member.rank,
                host=member.host,
                problem=f"Rank {member.rank} on {member} ended before all ranks had joined",
                rule="",
                fix="See that rank's output",
                printed=False,
            )
        )

    def _handle(self, line: Line, message: dict[str, Any]) -> None:
        if "hello" in message:
            self._welcome(line, Member(**message["hello"]))
        elif "failed" in message:
            # The sender ends: it is not missed again, and not told its own failure unless another was first.
            self._fail(Failure(**message["failed"]))
        elif line.member is None:
            raise ConnectionError("not a member")
        elif "store" in message:
            self._broadcast(store=message["store"])
        elif "ready" in message:
            self._ready.add(line.member.rank)
            if len(self._ready) == self._owner.world_size and self.failure is None:
                self.begun = True
                self._broadcast(begin=True)

    def _welcome(self, line: Line, member: Member) -> None:
        if member.job != self._owner.job:
            line.send(other_job=self._owner.job)
        elif (conflict := self._conflict(member)) is not None and (self.begun or self.failure is None):
            if not self.begun:
                self._fail(conflict)
            line.send(failed=asdict(replace(conflict, personal=True)))
        elif self.failure is not None:
            self._told.add(member.rank)
            line.send(failed=asdict(self.failure))
        else:
            line.member = member
            self._members[member.rank], self._known[member.rank] = line, member
            line.send(joined=self.token)
            if len(self._known) == self._owner.world_size:
                self._members[0].send(complete=True)

    def _conflict(self, member: Member) -> Failure | None:
        """Return why `member` is not one of this job's ranks, although it says so; None: it is."""
        known = self._owner if member.rank == 0 else self._known.get(member.rank)
        if member.world_size != self._owner.world_size:
            rule = "All ranks of a job must be started with the same world size"
            problem = f"Rank {member.rank} on {member} was started with a world size of {member.world_size}, rank 0 on "
            problem += f"{self._owner} with {self._owner.world_size}"
            fix = "Start all with the same number of ranks, or give each of two jobs another MASTER_PORT"
        elif known is not None and (known.host, known.pid) != (member.host, member.pid):
            rule = "Every rank of a job is one process"
            problem = f"Rank {member.rank} was started twice: on {known} and on {member}"
            fix = "Start each rank once, end what is left of an earlier start, or give each of two jobs another "
            fix += "MASTER_PORT"
        else:
            return None
        return Failure(rank=0, host=self._owner.host, problem=problem, rule=rule, fix=fix)

    def _fail(self, failure: Failure) -> None:
        """Tell all ranks; the first failure counts."""
        if self.failure is None and not self.begun:
            self.failure = failure
            self._broadcast(failed=asdict(failure))
            self._told |= set(self._members)
        self._told.add(failure.rank)

    def _broadcast(self, **message: Any) -> None:
        for line in list(self._members.values()):
            # A rank that is gone is missed when its connection is read.
            with contextlib.suppress(OSError):
                line.send(**message)


def _allow_files(number: int) -> None:
    """Raise the process's limit of open files as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
