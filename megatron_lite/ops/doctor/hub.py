"""Report collection of a node check: TCP connections of all ranks to rank 0, without torch.

The ranks need no process group: a rank that is missing, hangs or ends is named, and the reports of the others are
kept. Messages are JSON objects, one per line, as in backend/rendezvous_server.py, whose address the hub uses until
the training job needs it.

    hello    from a rank      Member
    joined   to the rank      then `ping`, answered by `pong` with the rank's clock, several times
    start    to all ranks     all have joined, or the time to join is over
    report   from a rank      after each step
    verdict  to all ranks     all reports are complete, or the time is over
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.rendezvous_server import (
    OTHER_ADDRESS,
    OTHER_PROGRAM,
    Connection,
    ConnectionServer,
    Member,
    allow_files,
    bind,
    look_up,
    read_port,
    write_port,
)
from megatron_lite.errors import TrainingError
from megatron_lite.formatting import format_ranges
from megatron_lite.ops.doctor.report import Report

PINGS = 5
"""Clock comparisons of a rank; the one with the shortest round trip counts."""
CONNECT_SECONDS = 5.0
GRACE = 15.0
"""Seconds for which a rank waits for rank 0 longer than rank 0 waits for it."""
NUM_PORTS = 4
"""Free ports that rank 0 offers for the process groups."""

Clock = Callable[[], float]


def _identity(launch: Launch) -> str:
    return f"{launch.job} node check"


class Hub(ConnectionServer):
    """Server of rank 0; a context manager.

    Args:
        launch: of rank 0.
        clock: rank 0's clock, in seconds.

    Raises:
        TrainingError: no port of the job can be bound.
    """

    def __init__(self, launch: Launch, *, clock: Clock = time.time) -> None:
        self._job = _identity(launch)
        self._world_size = launch.world_size
        self._clock = clock
        self._changed = threading.Condition()
        self._members: dict[int, Connection] = {}
        self._round_trips: dict[int, float] = {}
        self._sent: dict[int, tuple[int, float, float]] = {}
        self.hosts: dict[int, str] = {}
        self.offsets: dict[int, float] = {}
        self.reports: dict[int, Report] = {}
        self.lost: set[int] = set()
        allow_files(launch.world_size + 512)
        super().__init__(_listen(launch), "node check")

    def wait_joined(self, deadline: float) -> list[int]:
        """Wait for all ranks; return those that are missing at the deadline (time.monotonic())."""
        self._wait(lambda: len(self.hosts) == self._world_size, deadline)
        return sorted(set(range(self._world_size)) - set(self.hosts))

    def wait_reports(self, deadline: float) -> None:
        """Wait until the reports of all ranks that joined are complete, or until the deadline."""
        self._wait(lambda: all(rank in self.lost or self._is_done(rank) for rank in self.hosts), deadline)

    def broadcast(self, **message: Any) -> None:
        """Send a message to all ranks that joined."""
        for connection in list(self._members.values()):
            with suppress(OSError):
                connection.send(**message)

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_done(self, rank: int) -> bool:
        return rank in self.reports and self.reports[rank].done

    def _wait(self, condition: Callable[[], bool], deadline: float) -> None:
        with self._changed:
            while not condition() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))

    def _dropped(self, member: Member) -> None:
        with self._changed:
            self._members.pop(member.rank, None)
            self.lost.add(member.rank)
            self._changed.notify_all()

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        if "hello" in message:
            self._welcome(connection, Member(**message["hello"]))
        elif connection.member is None:
            raise ConnectionError("no hello before")
        elif "pong" in message:
            self._compare_clocks(connection, connection.member.rank, float(message["pong"]))
        elif "report" in message:
            report = Report.from_json(message["report"])
            report.clock_offset = self.offsets.get(report.rank, 0.0)
            with self._changed:
                self.reports[connection.member.rank] = report
                self._changed.notify_all()

    def _welcome(self, connection: Connection, member: Member) -> None:
        if member.job != self._job:
            connection.send(other_job=self._job)
        elif member.world_size != self._world_size or member.rank in self.hosts:
            connection.send(refused=f"rank {member.rank} of {member.world_size} was started twice or in another job")
        else:
            connection.member = member
            self._members[member.rank] = connection
            connection.send(joined=True)
            self._ping(connection, member.rank, 0)

    def _ping(self, connection: Connection, rank: int, number: int) -> None:
        self._sent[rank] = number, time.monotonic(), self._clock()
        connection.send(ping=number)

    def _compare_clocks(self, connection: Connection, rank: int, its_clock: float) -> None:
        number, began, sent = self._sent[rank]
        received, round_trip = self._clock(), time.monotonic() - began
        if round_trip < self._round_trips.get(rank, float("inf")):
            self._round_trips[rank] = round_trip
            self.offsets[rank] = its_clock - (sent + received) / 2
        if number + 1 < PINGS:
            self._ping(connection, rank, number + 1)
            return
        assert connection.member is not None
        with self._changed:
            self.hosts[rank] = connection.member.host
            self._changed.notify_all()


class Spoke:
    """Connection of one rank to the hub; a context manager.

    Args:
        launch: of this rank.
        deadline: time.monotonic() up to which the hub is searched.
        port: of the hub in this process; None: rank 0 is another process.
        clock: this rank's clock, in seconds.

    Raises:
        TrainingError: the hub is not reached before the deadline.
    """

    def __init__(self, launch: Launch, deadline: float, *, port: int | None = None, clock: Clock = time.time) -> None:
        self._launch = launch
        self._clock = clock
        self._messages: list[dict[str, Any]] = []
        self._refused = False
        self._reason = "no answer"
        self._connection = self._connect(deadline, port)

    @property
    def address(self) -> str:
        """Return the address at which this rank reaches rank 0."""
        return str(self._connection.socket.getpeername()[0])

    def send(self, report: Report) -> None:
        """Send the report as it is now; without effect if rank 0 has ended, which `expect` raises."""
        with suppress(OSError):
            self._connection.send(report=report.to_json())

    def expect(self, name: str, deadline: float) -> Any:
        """Wait for a message and return its content; answers pings meanwhile.

        Raises:
            TrainingError: rank 0 has ended, or does not answer before the deadline.
        """
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if name in message:
                    return message[name]
                if "ping" in message:
                    self._connection.send(pong=self._clock())
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._failure("did not answer in time")
            self._connection.socket.settimeout(min(left, 1.0))
            try:
                self._messages += self._connection.read()
            except TimeoutError:
                continue
            except OSError as error:
                raise self._failure("ended") from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Spoke:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failure(self, what: str) -> TrainingError:
        error = TrainingError(
            f"The node check of rank {self._launch.rank} on {self._launch.host} stopped: rank 0 {what}",
            fix="See the output of rank 0",
        )
        error.shared, error.silent = True, self._launch.local_rank != 0
        return error

    def _connect(self, deadline: float, port: int | None) -> Connection:
        pause = 0.01
        while True:
            for address in [("127.0.0.1", port)] if port is not None else self._addresses():
                if (connection := self._ask(address)) is not None:
                    return connection
            if time.monotonic() > deadline:
                error = TrainingError(
                    f"Rank {self._launch.rank} on {self._launch.host} does not reach rank 0 at "
                    f"{self._launch.init_method} ({self._reason})",
                    fix="Start every rank of the check once, with an address of its own (MASTER_PORT, --rdzv-id)"
                    if self._refused
                    else OTHER_ADDRESS
                    if self._reason == OTHER_PROGRAM
                    else "Check the network interface of this host and the firewall, or raise --timeout if rank 0 "
                    "starts late",
                )
                error.shared, error.silent = True, self._launch.local_rank != 0
                raise error
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def _addresses(self) -> list[tuple[str, int]]:
        scheme, _, place = self._launch.init_method.partition("://")
        if scheme == "file":
            return read_port(_port_file(place))
        host, _, ports = place.rpartition(":")
        try:
            return [(found, int(port)) for port in ports.split(",") for found in look_up(host.strip("[]"))]
        except OSError as error:
            self._reason = f"{host} cannot be resolved: {error.strerror}"
            return []

    def _ask(self, address: tuple[str, int]) -> Connection | None:
        launch = self._launch
        member = Member(
            job=_identity(launch), rank=launch.rank, world_size=launch.world_size, host=launch.host, pid=os.getpid()
        )
        connection = None
        try:
            connection = Connection(socket.create_connection(address, CONNECT_SECONDS))
            connection.socket.settimeout(CONNECT_SECONDS)
            connection.send(hello=asdict(member))
            while not self._messages:
                self._messages = connection.read()
            answer = self._messages.pop(0)
            if "joined" in answer:
                return connection
            self._refused = True
            self._reason = answer.get("refused") or "another job uses the address"
        except OSError as error:
            self._reason = error.strerror or str(error) or type(error).__name__
        self._messages = []
        if connection is not None:
            connection.close()
        return None


def free_ports() -> list[int]:
    """Return ports that are free on this host."""
    sockets = [bind(0) for _ in range(NUM_PORTS)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _port_file(place: str) -> Path:
    return Path(f"{place}.check")


def _listen(launch: Launch) -> socket.socket:
    scheme, _, place = launch.init_method.partition("://")
    if scheme == "file":
        listener = bind(0)
        write_port(_port_file(place), listener.getsockname()[1])
        return listener
    ports = place.rpartition(":")[2].split(",")
    for port in ports:
        with suppress(OSError):
            return bind(int(port))
    listed = format_ranges(sorted(map(int, ports)))
    subject = f"ports {listed} of rank 0 are" if len(ports) > 1 else f"port {listed} of rank 0 is"
    raise TrainingError(
        f"The {subject} in use on {launch.host}",
        fix="Set MASTER_PORT to a free port, the same for all ranks",
    )
