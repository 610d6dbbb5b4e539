"""The gradients' reduction over the replicas, bucket by bucket, while backward is still running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_lite.backend.group import Group, Work
from megatron_lite.parallel.flat_layout import Bucket


class GradientReduction:
    """Knows, within an iteration, which bucket still lacks gradients, which is next, and what is under way.

    Every replica must start the same collectives in the same order, whatever it ran backward for. So the order is
    fixed: that in which a backward pass completes the buckets. A replica that runs no backward starts them all at once.

    Args:
        buckets: with the flat fp32 gradients that they are ranges of, in the order in which backward completes them.
        dp: the replicas.
        scatter: each replica gets its slice's sums only, in place (ZeRO-1).
        passes: by name, backward passes per micro-batch that reach a parameter, where it is not one.
        overlap: whether buckets may start before finish.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[Bucket, Tensor]],
        *,
        dp: Group,
        scatter: bool,
        passes: Mapping[str, int],
        overlap: bool,
    ) -> None:
        self.overlap = overlap
        self._dp, self._scatter = dp, scatter
        self._buckets = tuple(buckets)
        self._bucket_of = {
            id(slot.parameter.param): number
            for number, (bucket, _) in enumerate(self._buckets)
            for slot in bucket.slots
        }
        self._per_backward = [
            sum(passes.get(slot.parameter.name, 1) for slot in bucket.slots) for bucket, _ in self._buckets
        ]
        self._missing: list[int] | None = None
        self._works: list[Work | None] = []

    def begin(self, backwards: int) -> None:
        """Expects each parameter's gradient from `backwards` micro-batches."""
        assert not self._works, "the last iteration's reduction was never finished"
        if self.overlap:
            self._missing = [backwards * count for count in self._per_backward]
            self._start_complete()

    def arrived(self, param: Tensor) -> None:
        """Counts one backward pass's gradient of one parameter."""
        if self._missing is None:
            return
        number = self._bucket_of[id(param)]
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "more backward passes than announced: this gradient is already being reduced"
        if self._missing[number] == 0:
            self._start_complete()

    def finish(self) -> None:
        """Starts what could not start yet, and waits for all."""
        if self._dp.size > 1:
            while len(self._works) < len(self._buckets):
                self._start_next()
            wait_all(self._works)
        self._works, self._missing = [], None

    def _start_complete(self) -> None:
        assert self._missing is not None
        while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket, flat = self._buckets[len(self._works)]
        gradients = flat[bucket.start : bucket.stop]
        if self._scatter:
            own = bucket.slice_of(self._dp.rank, self._dp.size)
            work = self._dp.reduce_scatter_(flat[own.start : own.stop], gradients, async_op=True)
        else:
            work = self._dp.all_reduce_(gradients, async_op=True)
        self._works.append(work)


def wait_all(works: Sequence[Work | None]) -> None:
    """Waits for collectives; None stands for one that is done."""
    for work in works:
        if work is not None:
            work.wait()
