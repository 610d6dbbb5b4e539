"""NVMe offloading of the DeepSpeed engine: checks before the start, a run's folders, and swap files read as tensors."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import secrets
import shutil
import tempfile
import textwrap
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.backend.agreement import run_on_all_ranks
from megatron_lite.backend.environment import host_name
from megatron_lite.config.deepspeed_nvme import largest_part, locked_bytes, swapped_bytes
from megatron_lite.config.run import RunConfig
from megatron_lite.data.format import file_lock
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.formatting import format_size
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.system_errors import reason, remedy

_PREFIX = "megatron-lite-swap-"
_LOCK = "lock"
_CPU = 'write "device": "cpu" in the DeepSpeed JSON'
_BLOCK = 4096
"""Bytes of a direct write: a multiple of the sector size of any disk."""
_CAP_IPC_LOCK = 14
"""Number of the capability that frees a process from ulimit -l; capabilities(7)."""


class SwapFolders:
    """This rank's folders for swap files, one in each nvme_path, so that runs may share a disk.

    They are removed by `close`, or when the process ends. Each is locked by its process: what killed processes have
    left is removed by the next run with the same nvme_path.

    Args:
        parents: the nvme_paths.
        rank: in the world, for the folders' names.

    Raises:
        ConfigError: a parent is no folder, or DeepSpeed cannot write there.
    """

    def __init__(self, parents: Iterable[str], rank: int) -> None:
        self.paths: dict[str, str] = {}
        locks: list[_LockedFolder] = []
        self.close = weakref.finalize(self, _remove, locks, os.getpid())
        for parent in parents:
            _require_direct_io(Path(parent))
            _remove_abandoned(Path(parent))
            locks.append(_LockedFolder(Path(parent), rank))
            self.paths[parent] = str(locks[-1].path)

    def settings(self, zero: Mapping[str, Any]) -> dict[str, Any]:
        """Return the section zero_optimization with these folders."""
        found = dict(zero)
        for name in ("offload_optimizer", "offload_param"):
            section = found.get(name) or {}
            if section.get("device") == "nvme":
                found[name] = {**section, "nvme_path": self.paths[section["nvme_path"]]}
        return found


class _LockedFolder:
    """Folder with the advisory lock that shows that its process is alive."""

    def __init__(self, parent: Path, rank: int) -> None:
        hidden = Path(tempfile.mkdtemp(prefix=".megatron-lite-", dir=parent))
        self.lock = (hidden / _LOCK).open("wb")
        file_lock.acquire(self.lock, wait=True)
        # Locked before it has the name under which other processes look for abandoned folders.
        self.path = hidden.rename(parent / f"{_PREFIX}rank{rank}-{hidden.name.rpartition('-')[2]}")

    def remove(self) -> None:
        """Remove the folder with its files, and then the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()


def _remove(folders: list[_LockedFolder], owner: int) -> None:
    if os.getpid() != owner:  # a forked worker
        return
    for folder in folders:
        folder.remove()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that were killed; none on a file system without locks."""
    for path in parent.glob(f"{_PREFIX}*"):
        # In use, removed meanwhile, another user's, or on a file system without locks.
        with suppress(OSError), (path / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def _require_direct_io(parent: Path) -> None:
    """Write a block past the page cache, as DeepSpeed's operator does, which ends the process on an error."""
    file = parent / f".megatron-lite-{secrets.token_hex(8)}"  # nodes may share the folder, and number processes alike
    try:
        with mmap.mmap(-1, _BLOCK) as block:  # pages are aligned
            descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
            try:
                os.write(descriptor, block)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ConfigError(
                f"nvme_path {parent} in the DeepSpeed JSON is on a file system without direct I/O (O_DIRECT)",
                fix=f"Give a folder on a local disk (df -T {parent} shows the file system), or {_CPU}",
            ) from error
        raise ConfigError(
            f"Cannot write to nvme_path {parent} in the DeepSpeed JSON: {reason(error)}",
            fix=remedy(error, file, instead=f"give another nvme_path, or {_CPU}", writing=True),
        ) from error
    finally:
        with suppress(OSError):  # some file systems create the file before they refuse the flag
            file.unlink()


def prepare_swap(config: RunConfig, mesh: Mesh, load_operator: Callable[[], object]) -> SwapFolders | None:
    """Check that state can be swapped, and create this rank's folders; a collective call.

    Args:
        config: the run, with the vocabulary size.
        mesh: this rank's groups.
        load_operator: loads DeepSpeed's operator async_io, which is installed or built at this moment.

    Returns:
        The folders; None: nothing is offloaded to NVMe.

    Raises:
        ConfigError: a folder cannot be used or is too small, DeepSpeed's operator cannot be loaded, or buffers are too
            small or too large.
    """
    if not config.deepspeed.swaps:
        return None
    replicas = mesh.replicas.size
    needed = swapped_bytes(config, replicas)
    hosts = mesh.world.all_gather_object(host_name())
    folders = run_on_all_ranks(mesh.world, lambda: SwapFolders(needed, mesh.world.rank))
    try:
        run_on_all_ranks(mesh.world, lambda: _check(config, replicas, needed, hosts.count(host_name())))
        with mesh.backend.phases.enter("loading DeepSpeed's operator async_io"):
            run_on_all_ranks(mesh.world, lambda: _load(load_operator))
    except BaseException:
        folders.close()
        raise
    return folders


def _check(config: RunConfig, replicas: int, needed: Mapping[str, int], ranks: int) -> None:
    """Check sizes, where `ranks` share this host's disks."""
    largest, name = largest_part(config, replicas)
    size = config.deepspeed.zero.get("offload_param", {}).get("buffer_size", largest)
    if config.deepspeed.offload_device("param") == "nvme" and size < largest:
        raise ConfigError(
            f"offload_param.buffer_size in the DeepSpeed JSON is {size:,} elements, and a rank's part of {name} has "
            f"{largest:,}",
            fix=f'Write "buffer_size": {largest} or more, or remove the entry',
        )
    for paths in _by_device(needed).values():
        total, free = ranks * sum(needed[path] for path in paths), shutil.disk_usage(paths[0]).free
        if total > free:
            raise ConfigError(
                f"Swap files take about {format_size(total)} on {host_name()}, and nvme_path {paths[0]} has "
                f"{format_size(free)} free",
                rule="DeepSpeed does not notice that a disk is full",
                fix=f"Free space there (df -h {paths[0]}), use more nodes, or {_CPU}",
            )
    locked = locked_bytes(config, replicas)
    limit = _lock_limit()
    if limit is not None and locked > limit:
        raise ConfigError(
            f"DeepSpeed's swap buffers take {format_size(locked)} of locked memory, and this process may lock "
            f"{format_size(limit)} (ulimit -l)",
            fix="Raise the limit (ulimit -l unlimited; in a container --ulimit memlock=-1), or reduce buffer_size and "
            "buffer_count of offload_param and sub_group_size in the DeepSpeed JSON",
        )


def _by_device(paths: Iterable[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in paths:
        found.setdefault(Path(path).stat().st_dev, []).append(path)
    return found


def _lock_limit() -> int | None:
    """Return the bytes that this process may lock in memory; None: any number. The soft limit is raised to the hard."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    capabilities = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if capabilities >> _CAP_IPC_LOCK & 1:
        return None
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return None if hard == resource.RLIM_INFINITY else hard


def _load(load_operator: Callable[[], object]) -> None:
    try:
        load_operator()
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"DeepSpeed's operator async_io, by which state is offloaded to NVMe, cannot be loaded: "
            f"{textwrap.shorten(text, 200, placeholder='...')}",
            fix="Install libaio's headers (apt-get install libaio-dev, or dnf install libaio-devel), a C++ compiler "
            "and ninja (pip install ninja), by which it is built at the first start, or build it in advance with "
            f"DS_BUILD_AIO=1 (docs/deepspeed.md), or {_CPU}",
        ) from error


@contextmanager
def explain_missing_buffers() -> Iterator[None]:
    """Raise the error for parameters that are gathered at once and do not fit into the swap buffers."""
    try:
        yield
    except AssertionError as error:
        if not str(error).startswith(("Not enough buffers", "No buffer", "No swap buffers")):
            raise
        raise TrainingError(
            f"DeepSpeed has too few swap buffers for the parameters that it gathers at once: {error}",
            fix="Remove stage3_prefetch_bucket_size and stage3_max_reuse_distance from zero_optimization in the "
            "DeepSpeed JSON, or give offload_param a larger buffer_count",
        ) from error


class SwapFiles:
    """Tensors that DeepSpeed keeps in swap files between steps, mapped into memory.

    The pages of a file follow what DeepSpeed wrote to it past the page cache, and its next read follows what was
    written here: Linux flushes and drops the pages of a file around direct I/O (open(2)).

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._swapper = getattr(zero, "optimizer_swapper", None)
        self._mapped: set[str] = set()

    def state(self, flat: Tensor, tensor: Tensor) -> Tensor:
        """Return the values [n] of a partition or of one of its moments.

        Args:
            flat: the main parameters of the partition.
            tensor: the main parameters or a moment.
        """
        info = self._info(flat)
        if info is None:
            return tensor
        path = next(context.swap_path for context in info.tensors if context.compute_tensor is tensor)
        return self._map(path, info.numel(), torch.float32)

    def shard(self, param: Any) -> Tensor:
        """Return this rank's part [n] of a parameter that is partitioned."""
        shard: Tensor = param.ds_tensor
        if shard.final_location != "nvme":  # type: ignore[attr-defined]
            return shard
        path = param.nvme_swapper.get_path(param, must_exist=True)
        return self._map(path, shard.ds_numel, param.dtype)  # type: ignore[attr-defined]

    @contextmanager
    def in_memory(self, flat: Tensor) -> Iterator[None]:
        """Read a partition within the context, and write it at its end, with moments that were created."""
        if self._info(flat) is None:
            yield
            return
        number = next(i for i, other in enumerate(self._zero.fp32_partitioned_groups_flat) if other is flat)
        self._zero._optimizer_states_and_gradient_swap_in(number)
        yield
        self._zero._optimizer_states_and_gradient_swap_out(number)

    def flush(self) -> None:
        """Write to the disk what was written to tensors returned before."""
        for path in self._mapped:
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _info(self, flat: Tensor) -> Any:
        """Return DeepSpeed's record of a partition; None: it is in memory, as small ones are."""
        return None if self._swapper is None else self._swapper.swap_params_info.get(vars(flat)["ds_id"])

    def _map(self, path: str, numel: int, dtype: torch.dtype) -> Tensor:
        _require_size(path, numel * dtype.itemsize)
        self._mapped.add(path)
        return torch.from_file(path, shared=True, size=numel, dtype=dtype)


def _require_size(path: str, size: int) -> None:
    found = Path(path).stat().st_size
    if found < size:
        raise TrainingError(
            f"The swap file {path} has {found:,} bytes instead of {size:,}: its disk is full",
            fix=f"Free space there (df -h {Path(path).parent}) and start the run again",
        )
