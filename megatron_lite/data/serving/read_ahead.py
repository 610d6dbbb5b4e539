"""Read-ahead of micro-batches: a thread makes those that the schedule is expected to request next.

The thread does all host work of a micro-batch (reading, masks, pinned memory). What it makes depends on the place
alone, so that a request elsewhere, after a rollback or at a new sequence length, costs time and changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Place(NamedTuple):
    """Micro-batch of a replica: samples consumed before its iteration, its index in it, and tokens per sample."""

    consumed: int
    microbatch: int
    length: int


class ReadAhead(Generic[T]):
    """Micro-batches by place, made ahead of their request.

    Args:
        make: makes the micro-batch at a place, in the thread.
        following: returns (consumed, index) of the next micro-batch of the schedule; None: there is none near.
        depth: micro-batches made ahead; 0: each is made by the caller, on request.
        begin_thread: called once in the thread.
    """

    def __init__(
        self,
        make: Callable[[Place], T],
        following: Callable[[int, int], tuple[int, int] | None],
        depth: int,
        begin_thread: Callable[[], None] | None = None,
    ) -> None:
        self._make = make
        self._following = following
        self._depth = depth
        self._ahead: OrderedDict[Place, Future[T]] = OrderedDict()
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="data", initializer=begin_thread or (lambda: None))
            if depth
            else None
        )

    def __call__(self, place: Place) -> T:
        """Return the micro-batch at a place, and let the thread make those after it.

        Raises:
            DataError: the dataset is too short, or damaged at these samples (also if the thread found it).
        """
        if self._thread is None:
            return self._make(place)
        if place not in self._ahead:
            self._drop()
        future = self._take(place) or self._thread.submit(self._make, place)
        self._make_ahead(self._thread, place)
        return future.result()

    def close(self) -> None:
        """Stop the thread; micro-batches can still be made on request."""
        self._drop()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def _make_ahead(self, thread: ThreadPoolExecutor, current: Place) -> None:
        """Submit the `depth` micro-batches after `current`, of its length, and cancel all others."""
        following: tuple[int, int] | None = current[:2]
        kept: OrderedDict[Place, Future[T]] = OrderedDict()
        for _ in range(self._depth):
            following = self._following(*following) if following is not None else None
            if following is not None:
                place = Place(*following, current.length)
                kept[place] = self._take(place) or thread.submit(self._make, place)
        self._drop()
        self._ahead = kept

    def _take(self, place: Place) -> Future[T] | None:
        return self._ahead.pop(place) if place in self._ahead else None

    def _drop(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
