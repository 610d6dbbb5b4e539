"""Optional libraries: whether one is installed, and process groups and variables for those that need them."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import torch.distributed as dist

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return find_spec(module) is not None


def join_as_library(backend: Backend) -> None:
    """Initialize torch.distributed where a job of one rank left it out, and set DeepSpeed's variables."""
    if not dist.is_initialized():
        assert backend.world_size == 1, "a job of several ranks has joined torch.distributed"
        kind = "cpu:gloo,cuda:nccl" if backend.device.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    os.environ["DS_ACCELERATOR"] = backend.device.type
    # Read as the number of the device; srun and mpirun do not set it.
    os.environ["LOCAL_RANK"] = str(backend.device.index or 0)


def library_group(group: Group) -> dist.ProcessGroup:
    """Return torch's group of an axis; a collective call. Axes of one rank have none of their own and get one."""
    if group.process_group is not None:
        found: dist.ProcessGroup = group.process_group
        return found
    created: dist.ProcessGroup = dist.new_group(list(group.ranks), use_local_synchronization=True)
    return created
