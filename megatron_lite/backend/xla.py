"""XLA backend: all devices of a job as one global device, by torch_xla's SPMD mode (TPUs, or CPU threads)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lite.backend.base import Backend, Capabilities
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.explicit_attention import explicit_attention
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.xla import device_count_errors
from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.formatting import format_count
from megatron_lite.planner.hardware import device_of
from megatron_lite.system_errors import reason

Spec = tuple[str | None, ...]
"""Axis of the device mesh, dp or tp, that each dim of a tensor is split over; None: it is not split."""

DEFAULT_CACHE = "~/.cache/megatron_lite/xla"


@dataclass(frozen=True)
class LocalShard:
    """Part of a partitioned tensor on one device of this host.

    Attributes:
        offset: of the part in the tensor.
        data: on the host, without padding.
        first: no other device, of any host, holds the same part and counts before this one.
    """

    offset: tuple[int, ...]
    data: Tensor
    first: bool


class XlaBackend(Backend):
    """Backend of one host and its XLA devices.

    Tensors are global: an operation on them runs on all devices of the job, each on the parts that the marks of `place`
    and `mark` give it. A process is one host; the launcher's ranks are hosts, and connect through gloo.

    Args:
        runtime: folder of the compilation cache.
        parallel: the mesh's sizes, in devices.
        launch: this host's place in the job.

    Raises:
        ConfigError: torch_xla is not installed, or its devices are not those of the configuration.
    """

    name = "xla"
    asynchronous = True

    def __init__(self, runtime: RuntimeConfig, parallel: ParallelConfig, launch: Launch) -> None:
        super().__init__(launch)
        # Each compilation would print a warning that XLA's partitioner is to be replaced.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            import torch_xla
            from torch_xla import runtime as xr
            from torch_xla.core import xla_model as xm
            from torch_xla.debug import metrics
            from torch_xla.distributed import spmd
        except ImportError as error:
            raise ConfigError(
                f"--device xla (or tpu) needs torch_xla, which cannot be imported ({error})",
                fix=f"{install_extra('xla')}, with the version of PyTorch that torch_xla is built for (docs/tpu.md)",
            ) from error
        self._xla, self._xm, self._spmd, self._metrics = torch_xla, xm, spmd, metrics
        if not xr.is_spmd():
            xr.use_spmd()
        self.kind: str = xr.device_type() or "CPU"
        self._cache = "off"
        if self.kind == "CPU":
            self._cache = "off, because XLA's CPU client cannot read compiled graphs"
        elif runtime.xla_cache != "off":
            self._cache = cache_folder(runtime.xla_cache)
            if not torch_xla._XLAC._xla_computation_cache_is_initialized():
                xr.initialize_cache(self._cache)
        self.device = torch_xla.device()
        # Products of fp32 tensors would be computed in bf16 on a TPU.
        torch_xla._XLAC._xla_set_mat_mul_precision("highest")
        count, hosts = xr.global_runtime_device_count(), xr.process_count()
        self._check_devices(parallel, count, hosts)
        if launch.world_size > 1:
            self._join(parallel, "gloo")
        self._hosts = self.new_group("world", (tuple(range(hosts)),))
        # The devices of a host hold neighbouring rows of the mesh, so that the host reads the samples of these alone.
        own = [int(name.rpartition(":")[2]) for name in torch_xla._XLAC._xla_get_runtime_devices()]
        devices = [device for devices in self._hosts.all_gather_object(own) for device in devices]
        dp, tp = count // parallel.tp, parallel.tp
        self._mesh = spmd.Mesh(np.array(devices), (dp, tp), ("dp", "tp"))
        self.loss_chunk = 4096 * dp

    def _check_devices(self, parallel: ParallelConfig, count: int, hosts: int) -> None:
        """Compare the runtime's devices and hosts with the configuration.

        Raises:
            ConfigError: they differ.
        """
        if hosts != self.launch.world_size:
            raise ConfigError(
                f"The XLA runtime spans {format_count(hosts, 'host')}, but {self.launch.launcher} started "
                f"{format_count(self.launch.world_size, 'rank')}",
                rule="Each host runs one process, which drives all its devices",
                fix=f"Start one process on each host, with RANK, WORLD_SIZE={hosts}, MASTER_ADDR and MASTER_PORT set, "
                "as examples/tpu/run_on_host.sh does",
            )
        for error in device_count_errors(parallel, count, hosts, self.kind):
            raise error

    def seed(self, value: int) -> None:
        """Seed the devices' generator; the seed is an input of the graph, not a constant."""
        self._xm.set_rng_state(value, str(self.device))

    def synchronize(self) -> None:
        """Wait until the devices have finished all graphs that were started."""
        self._xm.wait_device_ops()

    def memory_stats(self) -> dict[str, int]:
        """Return nothing: the global device reports no memory."""
        return {}

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the FLOP/s of a chip (v2, v3: core) in bf16; None: unknown device, or another dtype."""
        if dtype != torch.bfloat16:
            return None
        device = device_of(self.device_name())
        return None if device is None else device.peak("bf16")

    def device_name(self) -> str:
        """Return the kind of the devices, for a TPU with its generation."""
        accelerator = self._accelerator()
        return f"XLA {self.kind}" + (f" {accelerator}" if accelerator else "")

    def library_versions(self) -> dict[str, str]:
        """Return the versions of torch and torch_xla."""
        return {**super().library_versions(), "torch_xla": str(self._xla.__version__)}

    def settings(self) -> list[str]:
        """Return the mesh, the number of hosts and the folder of the compilation cache."""
        dp, tp = self._mesh.mesh_shape
        hosts = f" on {format_count(self._hosts.size, 'host')}" if self._hosts.size > 1 else ""
        return [f"SPMD over {dp} x {tp} devices (data x tensor){hosts}", f"compilation cache {self._cache}"]

    def capabilities(self) -> Capabilities:
        """Return the capabilities: bf16 and fp32, compiled by XLA alone."""
        return Capabilities(dtypes=frozenset({"fp32", "bf16"}), fused_adam=False, compile=False, fp8=False)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a batch whose rows are split over dp, given this host's rows."""
        rows = tensor.shape[0]
        if self._hosts.size > 1:
            # Only the rows of this host's devices are copied to them: the others may have any value.
            padded = tensor.new_zeros((rows * self._hosts.size, *tensor.shape[1:]))
            padded[rows * self.rank : rows * (self.rank + 1)] = tensor
            tensor = padded
        return self.place(tensor, ("dp", *(None for _ in tensor.shape[1:])))

    def place(self, tensor: Tensor, spec: Spec) -> Tensor:
        """Return a host tensor's values on the devices, split as in `spec`; of other hosts' parts no value is read."""
        return self.partition(tensor.to(self.device), spec)

    def partition(self, tensor: Tensor, spec: Spec) -> Tensor:
        """Mark how a tensor of the device is split; XLA derives the rest of the graph from such marks."""
        self._spmd.mark_sharding(tensor, self._mesh, spec)
        return tensor

    def partition_with_gradient(self, tensor: Tensor, spec: Spec) -> Tensor:
        """Return an activation that is split as in `spec`, as is its gradient."""
        marked: Tensor = _Partition.apply(tensor, lambda x: self.partition(x, spec))
        return marked

    def axis_size(self, axis: str) -> int:
        """Return the size of an axis of the device mesh."""
        return int(self._mesh.shape()[axis])

    def run_graph(self) -> None:
        """Compile all operations since the last call into one graph, unless it is cached, and start it."""
        self._xla.sync()

    def compilations(self) -> Compilations:
        """Return the number of graphs that were compiled, or read from the cache on disk, so far."""
        count, cached = (self._metrics.counter_value(name) or 0 for name in ("UncachedCompile", "PersistentCacheHit"))
        return Compilations(count, cached)

    def local_shards(self, tensor: Tensor) -> list[LocalShard]:
        """Return the different parts of a partitioned tensor on this host, in host memory."""
        shards: dict[tuple[int, ...], LocalShard] = {}
        native = self._xla._XLAC
        places = native._get_local_shard_replica_and_indices([tensor])[0]
        for (data, _), (replica, indices) in zip(native._get_local_shards([tensor])[0], places, strict=True):
            ranges = [slice(0, length) for length in tensor.shape] if indices is Ellipsis else indices
            offset = tuple(part.start for part in ranges)
            shape = tuple(part.stop - part.start for part in ranges)
            first = replica == 0
            if offset not in shards or first:
                shards[offset] = LocalShard(offset, data[tuple(slice(0, length) for length in shape)], first)
        return list(shards.values())

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
        """Return attention by products, so that samples and heads stay split over the mesh."""
        return explicit_attention(q, k, v, mask, dropout=dropout, causal=causal)

    def _accelerator(self) -> str:
        """Return the TPU's generation and size as its host knows it, such as v4-32; empty: it does not."""
        name = os.environ.get("TPU_ACCELERATOR_TYPE", "")
        return name if self.kind == "TPU" else ""


@dataclass(frozen=True)
class Compilations:
    """Compilations of a job so far.

    Attributes:
        count: graphs, those from the cache included.
        cached: of them from the cache on disk.
    """

    count: int
    cached: int


def cache_folder(given: str) -> str:
    """Create the folder of the compilation cache, and return its path.

    Raises:
        ConfigError: it cannot be written to.
    """
    path = Path(given or DEFAULT_CACHE).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the compilation cache {path} (--xla-cache-path): {reason(error)}",
            fix="Give --xla-cache-path a folder that can be written to, or use --xla-cache-path off",
        ) from error
    return str(path)


def checkpoint_with_barrier(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run `function` again in backward, behind a barrier without which XLA would merge the two runs."""
    from torch_xla.utils.checkpoint import checkpoint

    if torch.is_grad_enabled() and not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        # The function's parameters get gradients only if backward reaches its result through an argument.
        args = (args[0].detach().requires_grad_(), *args[1:])
    result: Tensor = checkpoint(function, *args, preserve_rng_state=False)
    return result


class _Partition(torch.autograd.Function):
    """Identity that marks how an activation and its gradient are split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, partition: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.partition = partition
        return partition(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.partition(gradient.clone()), None
