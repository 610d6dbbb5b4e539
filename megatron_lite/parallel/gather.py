"""ZeRO-1's second half: every replica gets the parameters that the others have stepped, while forward already runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_lite.backend.group import Group, Work
from megatron_lite.parallel.flat_layout import Bucket
from megatron_lite.parallel.reduction import wait_all


class ParameterGather:
    """Starts one all-gather for each bucket, in the order in which forward needs them, and knows who waits for which.

    Args:
        buckets: with the flat parameters that they are ranges of, in the order in which backward completes them.
        dp: the replicas; each holds its own slice of every bucket.
    """

    def __init__(self, buckets: Sequence[tuple[Bucket, Tensor]], dp: Group) -> None:
        self._buckets = list(reversed(buckets))
        self._dp = dp
        self._overlapped: set[int] = set()
        self._works: dict[int, Work | None] = {}

    def overlap_with(self, units: Iterable[nn.Module]) -> None:
        """Lets each unit's forward wait for its own parameters; start waits only for those of no unit."""
        bucket_of = {
            id(slot.parameter.param): number
            for number, (bucket, _) in enumerate(self._buckets)
            for slot in bucket.slots
        }
        covered: set[int] = set()
        for unit in units:
            params = [id(param) for param in unit.parameters()]
            covered.update(params)
            unit.register_forward_pre_hook(self._waiter(sorted({bucket_of[param] for param in params})))
        self._overlapped = {
            number
            for number, (bucket, _) in enumerate(self._buckets)
            if all(id(slot.parameter.param) in covered for slot in bucket.slots)
        }

    def start(self) -> None:
        """Starts all gathers and waits for those that no unit will wait for."""
        self.finish()
        # What is waited for here goes first: a network that works in order would keep us until the last.
        for number in sorted(range(len(self._buckets)), key=lambda number: number in self._overlapped):
            bucket, flat = self._buckets[number]
            own = bucket.slice_of(self._dp.rank, self._dp.size)
            whole = flat[bucket.start : bucket.stop]
            self._works[number] = self._dp.all_gather_(whole, flat[own.start : own.stop], async_op=True)
        self._wait([number for number in self._works if number not in self._overlapped])

    def finish(self) -> None:
        """Waits for all gathers."""
        self._wait(list(self._works))

    def _wait(self, numbers: Sequence[int]) -> None:
        wait_all([self._works.pop(number) for number in numbers if number in self._works])

    def _waiter(self, numbers: Sequence[int]) -> Callable[[nn.Module, Any], None]:
        def wait(module: nn.Module, args: Any) -> None:
            if self._works:
                self._wait(numbers)

        return wait
