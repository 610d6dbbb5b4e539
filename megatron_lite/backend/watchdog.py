"""Heartbeat thread: detects dead or stalled ranks, reports the first failure and aborts the job.

Ranks communicate through the job's store, because a failed rank joins no collective. Every rank writes heartbeats
there; rank 0 reads those of all ranks, and rank 1 reads rank 0's. The first failure is written to the store, where
every rank reads it and ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from megatron_lite.backend.environment import Launch, host_name
from megatron_lite.backend.phases import Phases

HEARTBEAT_TIMEOUT = 30.0
"""Seconds after which a rank without a heartbeat counts as dead. Code that holds the GIL also delays heartbeats, but
hardly ever for as long."""
GRACE = 5.0
"""Seconds in which a rank must end by itself after another rank has failed."""
MAX_STORE_ERRORS = 3
"""Errors of the store in a row after which rank 0 counts as dead."""


@dataclass(frozen=True)
class Failure:
    """The first failure of a job.

    Attributes:
        rank: the rank that failed.
        host: of the rank; empty: unknown.
        text: the error, with host, rank and phase.
        lost: whether the rank was found dead by another one, so that it prints nothing itself.
        error: the error without host, rank and phase; equal on ranks with the same error.
    """

    rank: int
    host: str
    text: str
    lost: bool = False
    error: str = ""

    def is_printed_by(self, rank: int, local_rank: int) -> bool:
        """Return whether a rank that did not fail first prints why the job ends.

        Rank 0 prints it; if rank 0 was lost, rank 1 and the first rank of each node do.
        """
        if self.rank != 0:
            return rank == 0
        return self.lost and (rank == 1 or local_rank == 0)


@dataclass(frozen=True, kw_only=True)
class WatchdogTimeouts:
    """Time-outs of a watchdog, in seconds.

    Attributes:
        heartbeat: without a heartbeat, after which a rank counts as dead.
        stall: without progress of a main thread, after which all ranks print their stacks.
        interval: between two heartbeats.
        grace: in which a rank must end by itself.
    """

    heartbeat: float
    stall: float
    interval: float
    grace: float

    @classmethod
    def from_collective_timeout(cls, timeout: float) -> WatchdogTimeouts:
        """Return time-outs in proportion to that of collectives: stacks are printed after half of it."""
        heartbeat = min(HEARTBEAT_TIMEOUT, timeout / 4)
        return cls(
            heartbeat=heartbeat,
            stall=timeout / 2,
            interval=min(2.0, heartbeat / 8),
            grace=min(GRACE, max(1.0, timeout / 4)),
        )


class Watchdog:
    """Thread that sends this rank's heartbeats, checks the other ranks', and aborts the process on a failure.

    Args:
        store: a connection to the job's store (torch.distributed.Store) that no other thread uses.
        launch: this rank's place in the job.
        name: host, rank and coordinates of this rank, for messages.
        phases: current phases of the main thread.
        timeouts: of heartbeats, stalls and aborts.
        on_abort: called with host, rank and text of the first failure before the process is aborted.
    """

    def __init__(
        self,
        store: Any,
        launch: Launch,
        *,
        name: str,
        phases: Phases,
        timeouts: WatchdogTimeouts,
        on_abort: Callable[[str, int, str], None] | None = None,
    ) -> None:
        self._store = store
        self._rank = launch.rank
        self._world_size = launch.world_size
        self._local_rank = launch.local_rank
        self._host = launch.host or host_name()
        self._name = name
        self._phases = phases
        self._timeouts = timeouts
        self._on_abort = on_abort
        self._stopped = threading.Event()  # the thread checks no longer
        self._failure_found = threading.Event()
        self._store_released = threading.Event()  # the thread uses the store no longer
        self._ending = False  # the main thread is ending the process
        self._failure: Failure | None = None
        self._failed_first = False
        self._acknowledged = False
        self._beats = 0
        self._stalls_printed = 0
        self._last_position: Hashable = None
        self._last_progress = time.monotonic()
        self._stall_reported = False
        # Ranks whose heartbeats this one checks, with the last one read and its time.
        self._watched = list(range(1, launch.world_size)) if launch.rank == 0 else [0] if launch.rank == 1 else []
        self._last_beats: dict[int, tuple[bytes, float]] = {}
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def fail(self, text: str, error: str) -> Failure:
        """Report to all ranks that this one has failed, and return the job's first failure. Call `end` afterwards.

        Args:
            text: the error, with host, rank and phase.
            error: the error without host, rank and phase.
        """
        self._ending = True
        own = first = Failure(self._rank, self._host, text, error=error)
        self._post(own)
        with contextlib.suppress(Exception):
            first = Failure(*json.loads(self._store.get("failed")))
            self._acknowledge()
        self._failed_first = first.rank == self._rank
        return first

    def end(self) -> None:
        """Return once all ranks have read the first failure, and leave it to the main thread to end the process.

        The thread stops using the store first: a call into the store crashes during Python's finalization.
        """
        self._linger()
        self._stopped.set()
        self._store_released.wait(self._timeouts.grace)

    def first_failure(self) -> Failure | None:
        """Wait for the first failure of another rank and return it; None: no failure was reported in time.

        Called when a collective fails. The caller ends the process with this failure.
        """
        # A killed rank reports nothing; once a peer is lost, missing heartbeats count after a third of the time.
        self._ending = True
        with contextlib.suppress(Exception):
            self._store.set("lost", "")
        self._failure_found.wait(self._timeouts.heartbeat + 4 * self._timeouts.interval)
        if self._failure is not None:
            self.end()
        return self._failure

    def leave(self) -> None:
        """Stop the thread: this rank has finished without failure."""
        self._stopped.set()
        self._thread.join(self._timeouts.grace)
        with contextlib.suppress(Exception):
            self._store.set(f"beat/{self._rank}", "left")
            self._store.add("left", 1)
            # Rank 0's process may hold the store: it waits until the other ranks have left.
            deadline = time.monotonic() + self._timeouts.heartbeat
            while self._rank == 0 and time.monotonic() < deadline and not self._store.check(["failed"]):
                if self._store.add("left", 0) == self._world_size:
                    break
                time.sleep(0.02)

    def _run(self) -> None:
        errors, before = 0, time.monotonic()
        while not self._stopped.wait(self._timeouts.interval):
            now = time.monotonic()
            if now - before > self._timeouts.heartbeat / 2:
                self._last_beats.clear()  # this process was suspended itself, and read no heartbeats
            before = now
            try:
                self._beat()
                self._print_stacks_if_stalled()
                self._check_progress()
                self._check_heartbeats()
                self._check_failure()
                errors = 0
            except Exception as error:
                errors += 1
                if errors == MAX_STORE_ERRORS:
                    problem = "rank 0, which holds the job's store, cannot be reached: it was killed or disconnected"
                    beat, _ = self._last_beats.get(0, (b"left", 0.0))
                    host = "" if beat == b"left" else json.loads(beat)["host"]
                    self._failure = Failure(0, host, f"{problem} ({error})", lost=True)
            if self._failure is not None:
                self._end(self._failure)
        if self._ending:
            self._store_released.set()
            # The main thread is ending the process, and may still hang, for example in a library's exit handler.
            time.sleep(3 * self._timeouts.grace)
            os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        # With the phase, which is all that is known of a rank that is killed.
        beat = {"beat": self._beats, "host": self._host, "name": self._name, "phase": str(self._phases)}
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _post(self, failure: Failure) -> None:
        with contextlib.suppress(Exception):
            if self._store.add("failures", 1) == 1:
                self._store.set("failed", json.dumps(astuple(failure)))

    def _check_failure(self) -> None:
        if self._store.check(["failed"]):
            self._failure = Failure(*json.loads(self._store.get("failed")))
            self._acknowledge()

    def _acknowledge(self) -> None:
        """Count this rank, once, among those that have read the first failure."""
        if not self._acknowledged:
            self._acknowledged = True
            self._store.add("read", 1)

    def _end(self, failure: Failure) -> None:
        """Give the main thread, which may hang in a collective, time to end the process, then abort it."""
        self._failure_found.set()
        if self._stopped.wait(2 * self._timeouts.grace if self._ending else self._timeouts.grace):
            return
        if failure.is_printed_by(self._rank, self._local_rank):
            self._print(f"stopped in {self._phases}, because another rank failed first: {failure.text}")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self._linger()
        if self._on_abort is not None:
            self._on_abort(failure.host, failure.rank, failure.text)
        os._exit(1)

    def _linger(self) -> None:
        """On rank 0 and the rank that failed first, wait until every rank has read the failure.

        Rank 0's process may hold the store. The end of the failed rank makes NCCL abort its peers' processes, before
        these have received the description of the failure.
        """
        if self._rank != 0 and not self._failed_first:
            return
        deadline = time.monotonic() + self._timeouts.grace
        readers = self._world_size - (self._failure is not None and self._failure.lost)
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline and self._store.add("read", 0) < readers:
                time.sleep(0.02)
            if self._rank == 0:
                time.sleep(0.1)  # the failed rank reads the count, too, and prints a stack if the store has closed

    def _check_heartbeats(self) -> None:
        keys = [f"beat/{rank}" for rank in self._watched]
        if not keys or not self._store.check(keys):
            return
        now = time.monotonic()
        longest = self._timeouts.heartbeat / (3 if self._store.check(["lost"]) else 1)
        for rank, beat in zip(self._watched, self._store.multi_get(keys), strict=True):
            if rank not in self._last_beats or self._last_beats[rank][0] != beat:
                self._last_beats[rank] = beat, now
            elif beat != b"left" and now - self._last_beats[rank][1] > longest:
                last = json.loads(beat)
                self._post(
                    Failure(
                        rank,
                        last["host"],
                        f"{last['name']} was killed or disconnected: it has sent no heartbeat for "
                        f"{now - self._last_beats[rank][1]:.0f} s. The phase that it sent last: {last['phase']}",
                        lost=True,
                    )
                )

    def _check_progress(self) -> None:
        phase = str(self._phases)
        position = phase, *_main_thread_position()
        now = time.monotonic()
        if position != self._last_position:
            self._last_position, self._last_progress, self._stall_reported = position, now, False
        elif not self._stall_reported and now - self._last_progress > self._timeouts.stall:
            self._stall_reported = True
            text = f"{self._name} has made no progress for {now - self._last_progress:.0f} s, in {phase}"
            self._store.set(f"stall/{self._store.add('stalls', 1)}", text)

    def _print_stacks_if_stalled(self) -> None:
        count = self._store.add("stalls", 0)
        if count == self._stalls_printed or not self._store.check([f"stall/{count}"]):
            return
        # Several ranks report a stall at about the same time: stacks are printed once.
        self._stalls_printed = count
        self._stall_reported = True
        text = self._store.get(f"stall/{count}").decode()
        stacks = ""
        with contextlib.suppress(Exception), tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        # In one write, so that the output of several ranks does not mix.
        self._print(f"{text}. Python stacks of this rank, in {self._phases}:\n{stacks}".rstrip())

    def _print(self, text: str) -> None:
        # Without sys.stderr, whose lock the main thread may hold.
        os.write(2, f"[{self._name}] {text}\n".encode())


def _main_thread_position() -> Iterator[tuple[int, int]]:
    """Yield (frame, instruction) of every function on the main thread's stack: the values change with any progress."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield id(frame), frame.f_lasti
        frame = frame.f_back
