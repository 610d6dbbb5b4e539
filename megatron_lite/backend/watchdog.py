"""Heartbeat thread: detects dead or stalled ranks, reports the first failure and aborts the job.

The ranks meet in the store through which the job came together, and in no collective, since a failed rank joins none.
Every rank leaves a sign of life there; rank 0 reads them all, and rank 1 reads rank 0's. The first failure is written
there for all to read, and ends them.
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
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass
from typing import Any

from megatron_lite.backend.environment import Launch, host_name

LONGEST_SILENCE = 30.0
"""Seconds after which a rank without a sign of life counts as dead. Python code that never lets another thread run can
be silent too, but hardly as long."""
GRACE = 5.0
"""Seconds that a rank has to end by itself once another failed."""
UNREACHABLE = 3
"""Times in a row that the store may not answer."""


@dataclass(frozen=True)
class Failure:
    """The failure that ended the job.

    Attributes:
        rank: which rank was first.
        host: where it ran; empty if nobody knows.
        text: what happened there.
        silent: others say so, since it says nothing any more.
        error: the error itself, without host, rank and phase; ranks that fail alike have the same.
    """

    rank: int
    host: str
    text: str
    silent: bool = False
    error: str = ""

    def is_printed_by(self, rank: int, local_rank: int) -> bool:
        """Whether this rank, which did not fail first, prints that the job ends: rank 0 does, or those it leaves."""
        if self.rank != 0:
            return rank == 0
        return self.silent and (rank == 1 or local_rank == 0)


@dataclass(frozen=True, kw_only=True)
class WatchdogTimeouts:
    """How long a watchdog waits, in seconds.

    Attributes:
        silence: for a sign of life.
        stall: for the main thread to get on, before all ranks show their stacks.
        interval: between two looks.
        grace: for a rank to end by itself.
    """

    silence: float
    stall: float
    interval: float
    grace: float

    @classmethod
    def from_collective_timeout(cls, timeout: float) -> WatchdogTimeouts:
        """In proportion to the time-out of collectives: stacks are shown at half of it."""
        silence = min(LONGEST_SILENCE, timeout / 4)
        return cls(
            silence=silence, stall=timeout / 2, interval=min(2.0, silence / 8), grace=min(GRACE, max(1.0, timeout / 4))
        )


class Watchdog:
    """Watches this rank's main thread, and through the store the others.

    Args:
        store: a connection of its own to the job's store (torch.distributed.Store).
        launch: this rank's place in the job.
        name: host, rank and coordinates of this rank, for messages.
        where: returns the main thread's current phase, and a value that changes when the thread makes progress.
        timeouts: how long to wait for what.
        on_abort: called with host, rank and text of the first failure before this process is ended; None: nothing is.
    """

    def __init__(
        self,
        store: Any,
        launch: Launch,
        *,
        name: str,
        where: Callable[[], tuple[str, Hashable]],
        timeouts: WatchdogTimeouts,
        on_abort: Callable[[str, int, str], None] | None = None,
    ) -> None:
        self._store = store
        self._rank = launch.rank
        self._world_size = launch.world_size
        self._local_rank = launch.local_rank
        self._host = launch.host or host_name()
        self._name = name
        self._where = where
        self._timeouts = timeouts
        self._on_abort = on_abort
        self._over = threading.Event()
        self._told = threading.Event()
        self._quiet = threading.Event()
        self._ending = False
        self._failure: Failure | None = None
        self._has_heard = False
        self._beats = 0
        self._stalls_seen = 0
        self._last_place: Hashable = None
        self._last_progress = time.monotonic()
        self._stall_told = False
        # Whom this rank listens for, and when it last heard what.
        self._watched = list(range(1, launch.world_size)) if launch.rank == 0 else [0] if launch.rank == 1 else []
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def fail(self, text: str, error: str) -> Failure:
        """Tell all ranks that this one has failed, and return the first failure. `end` must follow.

        Args:
            text: what happened, with host, rank and phase.
            error: the same without.
        """
        self._ending = True
        own = first = Failure(self._rank, self._host, text, error=error)
        self._post(own)
        with contextlib.suppress(Exception):
            first = Failure(*json.loads(self._store.get("failed")))
            self._hear()
        return first

    def end(self) -> None:
        """Leave it to the main thread to end the process, once all ranks had time to read the first failure.

        The watchdog's thread is done with the store first: a call into it does not survive Python's going down.
        """
        self._linger()
        self._over.set()
        self._quiet.wait(self._timeouts.grace)

    def first_failure(self) -> Failure | None:
        """The failure that was first, which the caller will say and end by; None: none was told in good time."""
        # A rank that was killed says nothing: it is missed only after a while, and sooner if someone lost a partner.
        self._ending = True
        with contextlib.suppress(Exception):
            self._store.set("lost", "")
        self._told.wait(self._timeouts.silence + 4 * self._timeouts.interval)
        if self._failure is not None:
            self.end()
        return self._failure

    def leave(self) -> None:
        """Ends watching: this rank is done and well."""
        self._over.set()
        self._thread.join(self._timeouts.grace)
        with contextlib.suppress(Exception):
            self._store.set(f"beat/{self._rank}", "left")
            self._store.add("left", 1)
            # Its process may hold the store: it stays until the others need it no more.
            deadline = time.monotonic() + self._timeouts.silence
            while self._rank == 0 and time.monotonic() < deadline and not self._store.check(["failed"]):
                if self._store.add("left", 0) == self._world_size:
                    break
                time.sleep(0.02)

    def _run(self) -> None:
        errors, before = 0, time.monotonic()
        while not self._over.wait(self._timeouts.interval):
            now = time.monotonic()
            if now - before > self._timeouts.silence / 2:
                self._heard.clear()  # this process was held itself, and heard nobody for that
            before = now
            try:
                self._beat()
                self._show_stacks_if_asked()
                self._look_for_stall()
                self._look_for_silence()
                self._look_for_failure()
                errors = 0
            except Exception as error:
                errors += 1
                if errors == UNREACHABLE:
                    gone = "rank 0, where the ranks meet, cannot be reached: it was killed or cut off"
                    heard, _ = self._heard.get(0, (b"left", 0.0))
                    host = "" if heard == b"left" else json.loads(heard)["host"]
                    self._failure = Failure(0, host, f"{gone} ({error})", silent=True)
            if self._failure is not None:
                self._end(self._failure)
        if self._ending:
            self._quiet.set()
            # The main thread is on its way out, and may yet hang: in a library's own farewell, for one.
            time.sleep(3 * self._timeouts.grace)
            os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        # Where it is, is what is left of a rank that was killed.
        beat = {"beat": self._beats, "host": self._host, "name": self._name, "where": self._where()[0]}
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _post(self, failure: Failure) -> None:
        with contextlib.suppress(Exception):
            if self._store.add("failures", 1) == 1:
                self._store.set("failed", json.dumps(astuple(failure)))

    def _look_for_failure(self) -> None:
        if self._store.check(["failed"]):
            self._failure = Failure(*json.loads(self._store.get("failed")))
            self._hear()

    def _hear(self) -> None:
        if not self._has_heard:
            self._has_heard = True
            self._store.add("heard", 1)

    def _end(self, failure: Failure) -> None:
        """Gives the main thread, which may hang in a collective, a moment to end by itself, then ends the process."""
        self._told.set()
        if self._over.wait(2 * self._timeouts.grace if self._ending else self._timeouts.grace):
            return
        if failure.is_printed_by(self._rank, self._local_rank):
            self._say(f"stopped in {self._where()[0]}, because another rank failed first: {failure.text}")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self._linger()
        if self._on_abort is not None:
            self._on_abort(failure.host, failure.rank, failure.text)
        os._exit(1)

    def _linger(self) -> None:
        """Keeps the store, which rank 0's process may hold, until every rank has read why the job ends."""
        deadline = time.monotonic() + self._timeouts.grace
        hearers = self._world_size - (self._failure is not None and self._failure.silent)
        with contextlib.suppress(Exception):
            while self._rank == 0 and time.monotonic() < deadline and self._store.add("heard", 0) < hearers:
                time.sleep(0.02)

    def _look_for_silence(self) -> None:
        keys = [f"beat/{rank}" for rank in self._watched]
        if not keys or not self._store.check(keys):
            return
        now = time.monotonic()
        longest = self._timeouts.silence / (3 if self._store.check(["lost"]) else 1)
        for rank, beat in zip(self._watched, self._store.multi_get(keys), strict=True):
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = beat, now
            elif beat != b"left" and now - self._heard[rank][1] > longest:
                last = json.loads(beat)
                self._post(
                    Failure(
                        rank,
                        last["host"],
                        f"{last['name']} gave no sign of life for {now - self._heard[rank][1]:.0f} s, killed or cut "
                        f"off in {last['where']}",
                        silent=True,
                    )
                )

    def _look_for_stall(self) -> None:
        words, place = self._where()
        now = time.monotonic()
        if place != self._last_place:
            self._last_place, self._last_progress, self._stall_told = place, now, False
        elif not self._stall_told and now - self._last_progress > self._timeouts.stall:
            self._stall_told = True
            text = f"{self._name} has been at the same place for {now - self._last_progress:.0f} s, in {words}"
            self._store.set(f"stall/{self._store.add('stalls', 1)}", text)

    def _show_stacks_if_asked(self) -> None:
        count = self._store.add("stalls", 0)
        if count == self._stalls_seen or not self._store.check([f"stall/{count}"]):
            return
        # Several ranks notice at about the same time: one picture does.
        self._stalls_seen = count
        self._stall_told = True
        text = self._store.get(f"stall/{count}").decode()
        stacks = ""
        with contextlib.suppress(Exception), tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        # In one write, so that those of several ranks do not mix.
        self._say(f"{text}. Python stacks of this rank, in {self._where()[0]}:\n{stacks}".rstrip())

    def _say(self, text: str) -> None:
        # Not print: the main thread may hold its lock.
        os.write(2, f"[{self._name}] {text}\n".encode())
