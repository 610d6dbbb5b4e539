"""Backend base class: device, process groups, random seed and memory statistics of one rank; capabilities."""

from __future__ import annotations

import datetime
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_lite.backend.comparison import Comparison, Verdict, compare_over_store
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.group import Group, LocalGroup, Partition, new_process_group
from megatron_lite.backend.numerics import MACHINES, machine_values
from megatron_lite.backend.rendezvous import Rendezvous
from megatron_lite.backend.rendezvous_server import RendezvousServer
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import MegatronLiteError


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can do, as data, so that validation refuses an impossible job before anything is allocated."""

    dtypes: frozenset[str] = frozenset({"fp32", "bf16", "fp16"})
    fused_adam: bool = True
    compile: bool = True
    max_world: int | None = None
    """Largest number of ranks; None: no limit."""


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, causal: bool
) -> Tensor:
    """Call torch's attention kernel, with k and v as they are; shapes as in Backend.attention."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.permute(2, 0, 1, 3)


class Backend(ABC):
    """One rank's machine: its device, its place in the job, and the way to make groups of ranks."""

    name: str
    device: torch.device

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self._store: Any = None
        self._server: RendezvousServer | None = None
        self._timeout: datetime.timedelta | None = None
        self._watches = 0
        self._comparisons = 0
        self._warnings: list[str] = []
        self._print_store: Any = None
        self._printed: Counter[str] = Counter()

    @abstractmethod
    def seed(self, value: int) -> None:
        """Seeds the generator that dropout on this device draws from. Cheap: called at every dropout site."""

    @abstractmethod
    def synchronize(self) -> None:
        """Returns once the device has done all that was asked of it."""

    @abstractmethod
    def memory_stats(self) -> dict[str, int]:
        """Bytes in use by this rank: allocated, max_allocated, reserved, max_reserved."""

    @abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """The maker's dense matrix FLOP/s for `dtype`; None where it is not known."""

    @abstractmethod
    def device_name(self) -> str:
        """The device in words."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @abstractmethod
    def to_device(self, array: np.ndarray) -> Tensor:
        """Return a tensor on the device with the array's values; on CUDA the copy may still be under way."""

    def to_host(self, values: Tensor) -> list[float]:
        """Return the values of a tensor [n] on the device; waits for the device."""
        numbers: list[float] = values.tolist()
        return numbers

    def generator(self, seed: int) -> torch.Generator | None:
        """Return a new random generator of the device; None: the device draws no values."""
        return torch.Generator(self.device).manual_seed(seed)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, causal: bool
    ) -> Tensor:
        """Return softmax(q kᵀ / √d + mask) v: q [s, b, n, d], k and v [t, b, g, d] (g divides n) -> [s, b, n, d]."""
        if q.shape[2] != k.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, dropout=dropout, causal=causal)

    def new_group(self, axis: str, partition: Partition) -> Group:
        """Makes this axis's groups; every rank calls it, in the same order, with the same partition."""
        if self.world_size == 1:
            return LocalGroup(axis, self.rank)
        return new_process_group(axis, partition, self.rank, self._group_backend(), self._timeout)

    def shutdown(self) -> None:
        """Leaves torch.distributed. Does no collective, so that a rank that failed can leave too."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._server is not None:
            self._server.close()

    def is_first_to_print(self, text: str) -> bool:
        """Whether no other rank has asked for this text as often as this one: it prints it for all."""
        if self._store is None:
            return True
        if self._print_store is None:
            self._print_store = self._store.clone()
            self._print_store.set_timeout(datetime.timedelta(seconds=10))
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._printed[key] += 1
        try:
            return bool(self._print_store.add(f"printed/{key}/{self._printed[key]}", 1) == 1)
        except RuntimeError:  # the store is gone
            return True

    def watch_store(self) -> Any:
        """A connection of its own to the store that the ranks met in, for a watchdog; None where there is one rank.

        Of its own: a store serves one caller at a time, and the main thread may wait in it. Every call gives an empty
        one; all ranks call it equally often.
        """
        if self._store is None:
            return None
        store = self._store.clone()
        store.set_timeout(datetime.timedelta(seconds=10))
        self._watches += 1
        return dist.PrefixStore(f"watch{self._watches}", store)  # type: ignore[attr-defined]

    def compare(
        self,
        comparison: Comparison,
        values: Mapping[str, str],
        *,
        details: Mapping[str, str] | None = None,
        failure: MegatronLiteError | None = None,
        checked: bool = True,
    ) -> Verdict:
        """Compare named values with the other ranks', through the store that they met in; a collective call.

        Args:
            comparison: as compare_over_store has it, as the other arguments. take_warnings has its warnings.
            values: text by name.
            details: by name, what is shown behind a value and not compared.
            failure: the error that kept this rank from having values.
            checked: whether this rank tried to have values.

        Raises:
            RankDifferenceError: values differ, or some ranks failed.
            MegatronLiteError: `failure`, where this is the only rank, or all failed with the same text.
        """
        if self._store is None:
            if failure is not None:
                raise failure
            return Verdict()
        self._comparisons += 1
        verdict = compare_over_store(
            self._store,
            self.launch,
            comparison,
            values,
            number=self._comparisons,
            details=details,
            failure=failure,
            checked=checked,
        )
        self._warnings += verdict.warnings
        return verdict

    def take_warnings(self) -> list[str]:
        """Return differences between the ranks that do not end the job, once, for the rank that reports."""
        taken, self._warnings = self._warnings, []
        return taken

    def _group_backend(self) -> str | None:
        return None

    def _join(self, parallel: ParallelConfig, backend: str, device_id: torch.device | None = None) -> None:
        """Meet the other ranks of the job, and create the world's process group.

        Args:
            parallel: the time-outs.
            backend: torch.distributed's, by kind of device.
            device_id: the device that the group is bound to; None: it is bound to none.

        Raises:
            ConfigError: the rendezvous address cannot be used.
            TrainingError: not all ranks came, or they cannot connect to each other.
        """
        launch = self.launch
        self._timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        with Rendezvous(launch, 60 * parallel.rendezvous_timeout_minutes) as meeting:
            meeting.join()
            host, port = meeting.share_store(self._open_store)
            meeting.run(lambda: self._connect(host, port))
            # Another kind of device means another transport, whose ranks would wait for each other in vain.
            self.compare(MACHINES, machine_values(self.name, self.device_name()))
            meeting.run(lambda: self._init_process_group(backend, device_id))
            meeting.finish()
        self._server = meeting.server

    def _open_store(self) -> int:
        """Open the store of the job on rank 0, and return its port."""
        assert self._timeout is not None
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=self._timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        return self._store.port

    def _connect(self, host: str, port: int) -> None:
        assert self._timeout is not None
        if self._store is None:
            self._store = dist.TCPStore(host, port, timeout=self._timeout, wait_for_workers=False)  # type: ignore[attr-defined]

    def _init_process_group(self, backend: str, device_id: torch.device | None) -> None:
        assert self._timeout is not None
        if device_id is not None:
            torch.cuda.set_device(device_id)  # of this thread
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("world", self._store),  # type: ignore[attr-defined]
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            timeout=self._timeout,
            device_id=device_id,
        )
