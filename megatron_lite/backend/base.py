"""Backend base class: device, process groups, attention kernel, random seeds and memory of one rank; capabilities."""

from __future__ import annotations

import datetime
import hashlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_lite.backend.comparison import Comparison, Differences, compare_over_store
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.group import Group, GroupOptions, LocalGroup, Partition, new_process_group
from megatron_lite.backend.numerics import MACHINES, machine_values
from megatron_lite.backend.phases import Phases
from megatron_lite.backend.rendezvous import Rendezvous
from megatron_lite.backend.rendezvous_server import RendezvousServer
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import ConfigError, MegatronLiteError

Reading = Callable[[], list[float]]
"""Waits for values of the device that are being copied to the host, and returns them."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Capabilities of a backend, by which validation refuses an impossible job before anything is allocated."""

    dtypes: frozenset[str] = frozenset({"fp32", "bf16", "fp16"})
    fused_adam: bool = True
    compile: bool = True
    fp8: bool = True
    """Matrix products of 8-bit values, or their emulation."""
    float64: bool = True


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


def claim_device(store: Any, launch: Launch, device_id: str) -> None:
    """Record in the job's store that this rank uses a device.

    Args:
        store: of all ranks.
        launch: this rank.
        device_id: identity of the device within its host, such as its UUID; empty: nothing is recorded.

    Raises:
        ConfigError: another rank uses the device.
    """
    if not device_id:
        return
    owner = int(store.compare_set(f"device/{launch.host}/{device_id}", "", str(launch.rank)))
    if owner != launch.rank:
        raise ConfigError(
            f"Ranks {owner} and {launch.rank} on {launch.host} have the same GPU ({device_id})",
            rule="Each rank needs a GPU of its own",
            fix=f"Start at most as many ranks on a node as it has GPUs ({launch.local_world_size} were started there), "
            "or give each task its own GPU (srun --gpus-per-task=1)",
        )


class Backend(ABC):
    """Device and communication of one rank.

    Args:
        launch: rank, world size and rendezvous address.
    """

    name: str
    device: torch.device
    asynchronous = False
    """Whether the device works behind the host, which must not wait for it within an iteration."""
    vendor_kernels = False
    """Whether the kernels of apex, Transformer Engine and others run on the device (backend/kernels.py)."""
    loss_chunk = 256
    """Tokens whose logits are computed at once for the loss: as few as matrix products are efficient with."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self.phases = Phases()
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
        """Seed the generator of dropout on this device. Cheap: called at every dropout site."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""

    @abstractmethod
    def memory_stats(self) -> dict[str, int]:
        """Return bytes in use by this rank: allocated, max_allocated, reserved, max_reserved."""

    @abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the dense matrix FLOP/s for `dtype` by data sheet; None: unknown."""

    @abstractmethod
    def device_name(self) -> str:
        """Return the name of the device."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Return the capabilities of this backend."""

    @cached_property
    def sum_dtype(self) -> torch.dtype:
        """Return the dtype in which the device sums over samples and parameters: float64, or fp32 if it has none."""
        return torch.float64 if self.capabilities().float64 else torch.float32

    def host_tensor(self, array: np.ndarray) -> Tensor:
        """Return a tensor with the array's values in host memory of the kind that to_device copies without waiting."""
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a host tensor's values on the device; the copy is enqueued, not awaited."""
        return tensor.to(self.device)

    def use_in_thread(self) -> None:  # noqa: B027  (one device needs no choice)
        """Make this device the current one of the calling thread; a new thread has the machine's first device."""

    def device_uuid(self) -> str:
        """Return the identity of the device as nvidia-smi writes it; empty: it has none, and ranks may share it."""
        return ""

    def library_versions(self) -> dict[str, str]:
        """Return the versions of torch and of the libraries that this backend uses."""
        return {"torch": str(torch.__version__)}

    def read_later(self, values: Tensor) -> Reading:
        """Start to copy a tensor [n] to the host; the result waits until that is done, not for later work."""
        return values.tolist

    def mark(self) -> Any:
        """Return a time mark at the end of the device's queued work, without waiting for that work."""
        return time.perf_counter()

    def settings(self) -> list[str]:
        """Return what the backend chose for its device, for the start-up lines."""
        return []

    def record_memory_history(self, on: bool) -> bool:
        """Start or stop recording the allocator's history; return whether the device has one."""
        return False

    def dump_memory_history(self, path: Path) -> None:
        """Write a snapshot of the memory with its history, on a device that records one."""
        raise NotImplementedError

    def seconds_between(self, begin: Any, end: Any) -> float | None:
        """Return the seconds between two marks; None: the device has not reached the second one."""
        seconds: float = end - begin
        return seconds

    def generator(self, seed: int) -> torch.Generator | None:
        """Return a new random generator of the device; None: the device draws no values."""
        return torch.Generator(self.device).manual_seed(seed)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        dropout: float,
        causal: bool,
        new_shapes: bool = False,
    ) -> Tensor:
        """Return softmax(q kᵀ / √d + mask) v: q [s, b, n, d], k and v [t, b, g, d] (g divides n) -> [s, b, n, d].

        `new_shapes`: nearly every call has other sizes, so that no time must be spent on preparing for a size.
        """
        if q.shape[2] != k.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, dropout=dropout, causal=causal)

    def has_block_kernel(self, q: Tensor) -> bool:
        """Return whether attention_blocks.flash_attend_block runs for queries like `q`, without mask and dropout."""
        return False

    def has_varlen_attention(self, q: Tensor) -> bool:
        """Return whether the device has a varlen kernel for queries like `q`: of its dtype and with its channels."""
        return False

    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Return causal attention within each document, in one call; only if has_varlen_attention.

        Args:
            q: [t, n, d], the tokens of all documents one after the other.
            k: [t, g, d]; g divides n.
            v: as k.
            cu_seqlens: [documents + 1] int32, the first token of each document, then t.
            longest: tokens of the longest document, or more.

        Returns:
            [t, n, d].
        """
        raise NotImplementedError

    def new_group(self, axis: str, partition: Partition) -> Group:
        """Create the groups along an axis and return this rank's; all ranks call it in the same order."""
        if self.world_size == 1:
            return LocalGroup(axis, self.rank)
        return new_process_group(axis, partition, self.rank, self._group_options(axis))

    def shutdown(self, *, failed: bool = False) -> None:
        """Leave torch.distributed, without a collective.

        Args:
            failed: an error ends the job. NCCL's groups are then left to the end of the process: to destroy them waits
                for collectives that failed ranks will not join, and exit_status.json is not written yet.
        """
        if dist.is_initialized() and not failed:
            dist.destroy_process_group()
        if self._server is not None:
            self._server.close()

    def is_first_to_print(self, text: str) -> bool:
        """Return whether this rank is the first of all to print a text, counting repetitions of the text."""
        if self._store is None:
            return True
        if self._print_store is None:
            self._print_store = self._store.clone()
            self._print_store.set_timeout(datetime.timedelta(seconds=10))
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._printed[key] += 1
        try:
            return bool(self._print_store.add(f"printed/{key}/{self._printed[key]}", 1) == 1)
        except RuntimeError:  # the process that holds the store has ended
            return True

    def watch_store(self) -> Any:
        """Return a new connection to the job's store, for a watchdog; None: the job has one rank.

        A connection serves one caller at a time, and the main thread may wait in it. Each call returns an empty
        namespace of the store; all ranks call it equally often.
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
    ) -> Differences:
        """Compare named values over all ranks through the job's store; a collective call.

        Warnings are kept for take_warnings.

        Args:
            comparison: topic, error texts, and which values may differ.
            values: text by name.
            details: by name, text shown behind a value and not compared.
            failure: the error because of which this rank has no values.
            checked: whether this rank tried to determine values.

        Raises:
            RankDifferenceError: values differ, or some ranks failed.
            MegatronLiteError: `failure`, if this is the only rank, or all ranks failed with the same text.
        """
        if self._store is None:
            if failure is not None:
                raise failure
            return Differences()
        self._comparisons += 1
        with self.phases.enter(f"comparing {comparison.topic}"):
            differences = compare_over_store(
                self._store,
                self.launch,
                comparison,
                values,
                number=self._comparisons,
                details=details,
                failure=failure,
                checked=checked,
            )
        self._warnings += differences.warnings
        return differences

    def take_warnings(self) -> list[str]:
        """Return and clear the comparisons' warnings."""
        taken, self._warnings = self._warnings, []
        return taken

    def _group_options(self, axis: str) -> GroupOptions:
        return GroupOptions(timeout=self._timeout)

    def _join(self, parallel: ParallelConfig, backend: str, device_id: torch.device | None = None) -> None:
        """Join the other ranks of the job, and create the process group of all ranks.

        Args:
            parallel: the time-outs.
            backend: torch.distributed's backends, by kind of device.
            device_id: the device that the group is bound to; None: the group is not bound.

        Raises:
            ConfigError: the rendezvous address cannot be used.
            TrainingError: ranks are missing, or cannot connect to each other.
        """
        launch = self.launch
        self._timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        with Rendezvous(launch, 60 * parallel.rendezvous_timeout_minutes) as rendezvous:
            rendezvous.join()
            if launch.rank == 0:
                self._store = dist.TCPStore(  # type: ignore[attr-defined]
                    "127.0.0.1", 0, is_master=True, timeout=self._timeout, wait_for_workers=False
                )
            host, port = rendezvous.share_port(0 if self._store is None else self._store.port)
            rendezvous.run(lambda: self._connect(host, port))
            # Ranks with different kinds of device, hence different transports, would wait for each other forever.
            self.compare(MACHINES, machine_values(self.name, self.device_name()))
            claim_device(self._store, self.launch, self.device_uuid())
            rendezvous.run(lambda: self._init_process_group(backend, device_id))
            rendezvous.finish()
        self._server = rendezvous.server

    def _connect(self, host: str, port: int) -> None:
        assert self._timeout is not None
        if self._store is None:
            self._store = dist.TCPStore(host, port, timeout=self._timeout, wait_for_workers=False)  # type: ignore[attr-defined]

    def _init_process_group(self, backend: str, device_id: torch.device | None) -> None:
        assert self._timeout is not None
        if device_id is not None:
            torch.cuda.set_device(device_id)  # the current device is per thread
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("world", self._store),  # type: ignore[attr-defined]
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            timeout=self._timeout,
            device_id=device_id,
        )
