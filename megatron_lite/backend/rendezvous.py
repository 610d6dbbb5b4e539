"""Rendezvous client: joins the other ranks of a job at rank 0's server, and reports missing ranks.

All waiting is done in Python, and calls into C++ in a thread, so that signals are handled at once.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lite.backend.environment import Launch, host_name
from megatron_lite.backend.interruptible import first_line, run_interruptibly
from megatron_lite.backend.rendezvous_server import (
    OTHER_ADDRESS,
    Address,
    Connection,
    Member,
    RendezvousServer,
    StartFailure,
    bind,
    look_up,
    read_port,
    write_port,
)
from megatron_lite.errors import ConfigError, FailedRank, MegatronLiteError, TrainingError
from megatron_lite.formatting import format_ranges

FIRST_NOTICE = 10.0
"""Seconds after which a waiting rank prints the missing ranks; each further interval is twice as long."""
CONNECT_TIMEOUT = 5.0
"""Seconds to wait for a connection, and for an answer to `hello`."""
SEARCH_SECONDS = 10.0
"""Seconds for which a rank that cannot start searches for rank 0, before it prints its error on its own."""
REPORT_SECONDS = 30.0
"""Seconds for which a rank waits to report a failure to ranks that are still starting: importing torch takes long."""


class RankFailedError(TrainingError):
    """Another rank failed before the job began, or the rendezvous failed."""

    def __init__(self, failure: StartFailure, problem: str) -> None:
        super().__init__(problem, rule=failure.rule, fix=failure.fix)
        self.failure = failure


class Rendezvous:
    """Context manager for the start of a job of several ranks: an error inside it ends all ranks that wait.

    Call join, share_port, run and finish, in this order.

    Args:
        launch: this rank's place in the job, and the rendezvous address.
        seconds: longest wait for all ranks.
    """

    def __init__(self, launch: Launch, seconds: float) -> None:
        self.server: RendezvousServer | None = None
        self._launch = launch
        self._seconds = seconds
        self._host = launch.host or host_name()
        self._member = Member(
            job=launch.job, rank=launch.rank, world_size=launch.world_size, host=self._host, pid=os.getpid()
        )
        scheme, _, self._address = launch.init_method.partition("://")
        self._file = Path(self._address) if scheme == "file" else None
        self._reason = "no answer"
        self._connection: Connection | None = None
        self._messages: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self._notice = FIRST_NOTICE

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._connection is not None and not isinstance(error, RankFailedError):
            with suppress(OSError):
                self._connection.send(failed=asdict(self._describe(error)))
                self._connection.socket.settimeout(1.0)
                self._connection.read()  # the server has sent it to all ranks
        if isinstance(error, MegatronLiteError):
            error.shared = True
        if self.server is not None and isinstance(error, RankFailedError):
            # Ranks that are still starting would search for rank 0 until their time-out.
            self.server.wait_until_reported(REPORT_SECONDS)
        if self._connection is not None:
            self._connection.close()
        if self.server is not None and error is not None:
            self.server.close()

    def join(self) -> None:
        """Wait until all ranks have joined.

        Raises:
            ConfigError: the address is unknown or is not rank 0's, or the port is in use.
            TrainingError: a rank is missing after the time-out, or a rank failed.
        """
        self._find(self._listen() if self._launch.rank == 0 else self._resolve())
        if self._launch.rank == 0:
            self._expect("complete")

    def share_port(self, port: int) -> Address:
        """Return address and port of the job's store on rank 0.

        Args:
            port: of the store, on rank 0; ignored on the other ranks.
        """
        assert self._connection is not None
        if self._launch.rank == 0:
            self._connection.send(store=port)
        return self._connection.socket.getpeername()[0], self._expect("store")["store"]

    def run(self, call: Callable[[], None]) -> None:
        """Run a function that connects this rank to the others, in a thread.

        Raises:
            TrainingError: the function failed or took too long, or another rank failed meanwhile.
        """
        try:
            run_interruptibly(call, seconds=self._seconds, poll=self._poll_failure)
            return
        except (RuntimeError, ValueError, OSError) as error:
            cause = error
        # The cause may be another rank's failure: wait for the server's message.
        self._wait_readable(1.0)
        self._poll_failure()
        raise TrainingError(
            f"Rank {self._launch.rank} of {self._launch.world_size} on {self._host} cannot connect to the other ranks: "
            f"{first_line(cause)}",
            fix="Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface between the nodes (ip address "
            "lists "
            "them), and open the ports above 1024 between the nodes",
        ) from cause

    def finish(self) -> None:
        """Wait until all ranks have created their process groups."""
        assert self._connection is not None
        self._connection.send(ready=True)
        self._deadline = time.monotonic() + self._seconds
        self._expect("begin")

    def report_failure(self, error: Exception) -> None:
        """Report to the waiting ranks that this one cannot start; silence the error if another rank prints the same.

        Raises:
            MegatronLiteError: rank 0 cannot be reached.
        """
        own = first = self._describe(error)
        addresses = self._listen() if self._launch.rank == 0 else self._resolve()
        try:
            self._find(addresses)
            assert self._connection is not None
            self._connection.send(failed=asdict(own))
            self._expect("failed")
        except RankFailedError as failed:
            first = failed.failure
        if isinstance(error, MegatronLiteError):
            error.silent = first.printed and first.rank != own.rank and first.text == own.text

    def wait_until_reported(self) -> None:
        """On rank 0, wait until the failure was sent to all ranks, at most REPORT_SECONDS."""
        if self.server is not None:
            self.server.wait_until_reported(REPORT_SECONDS)

    def _describe(self, error: BaseException) -> StartFailure:
        if isinstance(error, MegatronLiteError):
            problem, rule, fix = error.problem, error.rule, error.fix
        else:
            rule = ""
            problem = "Stopped by a signal" if isinstance(error, KeyboardInterrupt) else first_line(error)
            fix = "Read the output of that rank"
        return StartFailure(rank=self._launch.rank, host=self._host, problem=problem, rule=rule, fix=fix)

    def _resolve(self) -> list[Address]:
        """Return the addresses at which rank 0 may listen, by port; empty for file://."""
        if self._file is not None:
            return []
        host, _, ports = self._address.rpartition(":")
        try:
            found = run_interruptibly(lambda: look_up(host.strip("[]")))
        except OSError as failure:
            error = ConfigError(
                f"The host name MASTER_ADDR={host} cannot be resolved on {self._host} ({failure.strerror})",
                fix="Set MASTER_ADDR to the name or IP address of the host of rank 0, as this host knows it (getent "
                "hosts NAME)",
            )
            # Every rank has this error: one of those that a launcher has started on this node prints it.
            error.silent = self._launch.local_rank != 0 and bool(self._launch.job)
            raise error from failure
        return [(address, int(port)) for port in ports.split(",") for address in found]

    def _listen(self) -> list[Address]:
        """Start the server of rank 0 at the first free port; return the addresses at which it must be reachable."""
        if self._file is not None:
            self.server = RendezvousServer(bind(0), self._member)
            write_port(self._file, self.server.port)
            return [("127.0.0.1", self.server.port)]
        addresses = self._resolve()
        host, _, ports = self._address.rpartition(":")
        for port in dict.fromkeys(port for _, port in addresses):
            here = [address for address in addresses if address[1] == port]
            with suppress(OSError):
                self.server = RendezvousServer(bind(port), self._member)
                self._address = f"{host}:{port}"
                return here
            # The port may be held by another process with rank 0 of this job: the answer says so.
            self._ask_all(here)
        raise ConfigError(
            f"The rendezvous port {ports} is in use on {self._host} ({self._reason})",
            fix="Set MASTER_PORT to a free port, the same for all ranks, or end the program that uses it",
        )

    def _find(self, addresses: Sequence[Address]) -> None:
        """Connect to the server of rank 0."""
        pause = 0.005
        while not self._ask_all(addresses or read_port(self._file)):
            if self.server is not None:
                raise ConfigError(
                    f"MASTER_ADDR={self._address.rpartition(':')[0]} is not the host of rank 0, which runs on "
                    f"{self._host}: "
                    f"connecting to {self._address} failed ({self._reason})",
                    fix=f"Set MASTER_ADDR={self._host}",
                )
            if time.monotonic() > self._deadline:
                error = TrainingError(
                    f"Rendezvous timed out after {self._seconds:g} s: rank {self._launch.rank} of "
                    f"{self._launch.world_size} on {self._host} did not find rank 0 at {self._address} "
                    f"({self._reason})",
                    fix=OTHER_ADDRESS
                    if self._reason.startswith("another ")
                    else "Read the output of rank 0; make sure that MASTER_ADDR and MASTER_PORT are the host and port "
                    "of rank 0 of this job; raise --rendezvous-timeout-minutes if nodes start slowly",
                )
                error.silent = not self._prints_without_rank0()
                raise error
            if self._prints_without_rank0():
                self._print_waiting(f"rank 0 at {self._address} ({self._reason})")
            time.sleep(pause)
            pause = min(0.5, pause * 1.5)
        # Rank 0 times out first, because its error names the missing ranks.
        self._deadline = time.monotonic() + self._seconds + (0.0 if self.server else 30.0)

    def _ask_all(self, addresses: Sequence[Address]) -> bool:
        return any(self._ask(address) for address in addresses)

    def _ask(self, address: Address) -> bool:
        """Connect to one address, and join if the server of this job listens there.

        Raises:
            RankFailedError: the job has failed, or this process is refused as a rank.
        """
        connection, answer, self._messages = None, dict[str, Any](), []
        try:
            connection = Connection(socket.create_connection(address, CONNECT_TIMEOUT))
            connection.socket.settimeout(CONNECT_TIMEOUT)
            connection.send(hello=asdict(self._member))
            while not self._messages:
                self._messages = connection.read()
            answer = self._messages.pop(0)
        except TimeoutError:
            self._reason = "no connection" if connection is None else "another program listens there"
        except OSError as error:
            self._reason = "another program listens there" if connection is not None else error.strerror or str(error)
        if "failed" in answer:
            raise self._failed(StartFailure(**answer["failed"]))
        if "other_job" in answer:
            self._reason = f"another job uses the address: {answer['other_job'] or 'without an identity'}"
        if connection is not None and "joined" in answer:
            if self.server is None or answer["joined"] == self.server.token:
                if self._file is None:
                    self._address = f"{self._address.rpartition(':')[0]}:{address[1]}"
                self._connection = connection
                return True
            self._reason = "another rank 0 of the same job"
        if connection is not None:
            connection.close()
        return False

    def _expect(self, name: str) -> dict[str, Any]:
        """Wait for a message with the key `name`, and return it."""
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if "failed" in message:
                    raise self._failed(StartFailure(**message["failed"]))
                if name in message:
                    return message
            if time.monotonic() > self._deadline:
                raise self._timed_out()
            if self.server is not None and (missing := self.server.missing()):
                count = f"{len(missing)} of {self._launch.world_size} ranks"
                self._print_waiting(f"{count} at {self._address} (missing: {format_ranges(missing)})")
            left = self._deadline - time.monotonic()
            self._wait_readable(max(0.0, min(1.0, left, self._notice_due() or 1.0)))

    def _poll_failure(self) -> None:
        self._wait_readable(0.0)
        for message in self._messages:
            if "failed" in message:
                raise self._failed(StartFailure(**message["failed"]))

    def _wait_readable(self, seconds: float) -> None:
        """Read the messages that arrive within `seconds`."""
        assert self._connection is not None
        if not select.select([self._connection], [], [], seconds)[0]:
            return
        try:
            self._messages += self._connection.read()
            return
        except OSError:
            pass
        raise self._failed(
            StartFailure(
                rank=0,
                host="",
                problem=f"Rank 0 at {self._address} ended before all ranks had joined",
                rule="",
                fix="Read the output of rank 0",
                printed=False,
            )
        )

    def _failed(self, failure: StartFailure) -> RankFailedError:
        """Return the error for a failure received from the server.

        Rank 0 prints it; if rank 0 has ended, the ranks of _prints_without_rank0 do.
        """
        rank, own = self._launch.rank, failure.refused or failure.rank == self._launch.rank
        problem = failure.problem
        if failure.printed and not own:
            problem = f"Rank {failure.rank} on {failure.host} failed: {problem}"
        error = RankFailedError(failure, problem)
        error.shared = True
        has_ended = failure.rank == 0 and not failure.printed
        error.silent = not (own or (self._prints_without_rank0() if has_ended else rank == 0))
        if not own:
            error.__cause__ = FailedRank(failure.host, failure.rank)
        return error

    def _prints_without_rank0(self) -> bool:
        """Return whether this rank prints errors that every rank has because rank 0 has ended."""
        return self._launch.rank == 1 or self._launch.local_rank == 0

    def _timed_out(self) -> TrainingError:
        missing = self.server.missing() if self.server is not None else []
        if self.server is None:
            found = f"rank {self._launch.rank} on {self._host} received no message from rank 0 at {self._address}"
        elif missing:
            found = f"{self._launch.world_size - len(missing)} of {self._launch.world_size} ranks joined at "
            found += f"{self._address}; missing: rank{'s' * (len(missing) > 1)} {format_ranges(missing)}"
        else:
            found = f"all ranks joined at {self._address}, but some cannot connect to the others"
        output = f"rank{'s' * (len(missing) > 1)} {format_ranges(missing)}" if missing else "all ranks"
        return TrainingError(
            f"Rendezvous timed out after {self._seconds:g} s: {found}",
            fix=f"Read the output of {output}, or raise --rendezvous-timeout-minutes if nodes start slowly",
        )

    def _notice_due(self) -> float:
        return max(0.0, self._began + self._notice - time.monotonic())

    def _print_waiting(self, missing: str) -> None:
        if not self._notice_due():
            self._notice *= 2
            sys.stderr.write(f"[{self._host} rank {self._launch.rank}] waiting for {missing}\n")
            sys.stderr.flush()
