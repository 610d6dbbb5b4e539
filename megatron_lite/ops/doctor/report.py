"""Node check report: facts and measurements of one rank, sent to rank 0 as JSON after each step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_lite.formatting import format_short

MATRIX_PRODUCT = "matrix product"
MEMORY_COPY = "memory copy"
HOST_COPY = "host-to-device copy"
GPU_STATE, DEVICE, STORAGE, GROUPS = "nvidia-smi", "device", "write test of --save", "process groups"
"""Steps besides the speeds. From GROUPS on ranks wait for each other."""
LINK_STEP = "bandwidth of "
"""Beginning of the steps that measure a mesh axis."""
UNITS = {MATRIX_PRODUCT: "FLOP/s", MEMORY_COPY: "B/s", HOST_COPY: "B/s"}
"""Units of the speeds."""


def format_rate(value: float, unit: str) -> str:
    """Return a rate with three digits and its unit.

    >>> format_rate(2.5e9, "B/s"), format_rate(999, "B/s")
    ('2.5 GB/s', '999 B/s')
    """
    number = format_short(value)
    return f"{number.rstrip('kMGT')} {number.lstrip('0123456789.')}{unit}"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as nvidia-smi describes it.

    Attributes:
        uuid: GPU-… or MIG-….
        name: of the product.
        driver: version.
        memory_total: bytes.
        memory_free: bytes, before this job allocates any.
        ecc_errors: uncorrected errors since the last reboot; None: without ECC.
        repairs: pending or failed repairs of memory (row remapping, retired pages); empty: none.
        throttling: active reasons for which the hardware slows the clock; empty: none.
        mig: whether the GPU is partitioned (MIG).
    """

    uuid: str
    name: str
    driver: str
    memory_total: int
    memory_free: int
    ecc_errors: int | None = None
    repairs: str = ""
    throttling: str = ""
    mig: bool = False


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The folder of --save, measured by one rank of a host.

    Attributes:
        path: the folder, or the lowest existing one above it.
        write_speed: of one large file with fsync, bytes/s.
        rename_seconds: to create, rename and remove one small file.
        free, free_limit: bytes that the user may still write, and whether the file system or a quota limits them.
        inodes, inode_limit: the same of files; None: without a limit.
    """

    path: str
    write_speed: float
    rename_seconds: float
    free: int
    free_limit: str = "free"
    inodes: int | None = None
    inode_limit: str = "free"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A host, described by its first rank.

    Attributes:
        shm_total: bytes of /dev/shm.
        shm_free: bytes of /dev/shm.
        loopback: address of the host's own name, if that is a loopback address; empty: it is not.
        num_gpus: GPUs that nvidia-smi lists; None: it is not installed.
    """

    shm_total: int = 0
    shm_free: int = 0
    loopback: str = ""
    num_gpus: int | None = None


@dataclass(frozen=True, kw_only=True)
class Link:
    """Measured bandwidth of one operation over one group.

    Attributes:
        axis: tp, dp or pp of the mesh; hosts: between neighbouring hosts.
        operation: all-reduce, all-gather, send-recv.
        ranks: of the group.
        size: bytes of the message.
        bandwidth: bus bandwidth, bytes/s: what each rank sends at least, whatever the number of ranks.
    """

    axis: str
    operation: str
    ranks: tuple[int, ...]
    size: int
    bandwidth: float


@dataclass(kw_only=True)
class Report:
    """Facts and measurements of one rank.

    Attributes:
        rank, local_rank: of the job, and on its host.
        host: Slurm's name of the node, else the host name.
        versions: of programs and libraries, by name.
        device: name of the device.
        uuid: of the GPU; empty on a CPU.
        peak_flops: of the data sheet; None: unknown.
        gpu: by nvidia-smi; None: it is not installed, or the device is no GPU.
        speeds: by name, see UNITS.
        links: bandwidths of the groups of this rank.
        node: on the first rank of a host.
        storage: on the first rank of a host, with --save.
        clock_offset: seconds by which the host's clock is ahead of rank 0's.
        failures: error text by step.
        notes: what was not measured, and why.
        unmeasured: the step at which the time of the whole check was over; empty: there was enough.
        step: the last step that began.
        done: whether all steps have ended.
    """

    rank: int
    local_rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    uuid: str = ""
    peak_flops: float | None = None
    gpu: Gpu | None = None
    speeds: dict[str, float] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    node: Node | None = None
    storage: Storage | None = None
    clock_offset: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unmeasured: str = ""
    step: str = ""
    done: bool = False

    @property
    def waits(self) -> bool:
        """Return whether the current step waits for other ranks."""
        return self.step == GROUPS or self.step.startswith(LINK_STEP)

    @property
    def place(self) -> str:
        """Return the rank with host and GPU, for messages."""
        return f"{self.host} rank {self.rank}" + (f" ({self.uuid})" if self.uuid else "")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, which from_json reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Report:
        """Return the report of a JSON object.

        Raises:
            KeyError, TypeError: the object is no report.
        """
        fields = dict(content)
        for name, kind in (("gpu", Gpu), ("node", Node), ("storage", Storage)):
            if fields[name] is not None:
                fields[name] = kind(**fields[name])
        fields["links"] = [Link(**{**link, "ranks": tuple(link["ranks"])}) for link in fields["links"]]
        return cls(**fields)
