"""Hardware table: peak FLOP/s, memory, bandwidths and power of accelerators, from vendor data sheets.

Peaks are dense (without sparsity). Bandwidths count one direction. The network is that of the vendor's reference system
(DGX, HGX, TPU pod), as bandwidth of one device; `--network-gbit` of `megatron-lite plan` replaces it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_lite.errors import ConfigError

GIB = 2**30
RUNTIME_BYTES = 3 * GIB // 2
"""Memory that a process takes beside its tensors: context of the driver, workspaces of cuBLAS, buffers of NCCL."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Data sheet of one device, as one rank uses it.

    Attributes:
        name: value of --gpu.
        device: words that the driver's name of the device contains.
        tflops: dense TFLOP/s of 16-bit matrix products with fp32 sums.
        fp8_tflops: the same of 8-bit products; 0: none.
        tf32_tflops: the same of TF32 products; 0: none.
        fp32_tflops: of fp32 without matrix units.
        bf16: whether 16-bit products take bf16, and not fp16 only.
        memory_gib: memory that the driver reports.
        memory_gbps: bandwidth of that memory in GB/s.
        link_gbps: bandwidth to another device of the node in GB/s (NVLink, xGMI, ICI, PCIe).
        network_gbps: bandwidth to devices of other nodes in GB/s.
        processors: multiprocessors, over which the tiles of a matrix product are distributed.
        watts: power limit of the board.
        per_node: devices of a node.
        kernel_seconds: time between two kernels: launch, first loads and last stores.
    """

    name: str
    device: str
    tflops: float
    fp8_tflops: float = 0.0
    tf32_tflops: float = 0.0
    fp32_tflops: float
    bf16: bool = True
    memory_gib: float
    memory_gbps: float
    link_gbps: float
    network_gbps: float
    processors: int
    watts: float
    per_node: int = 8
    kernel_seconds: float = 4e-6

    @property
    def family(self) -> str:
        """Name without the size of the memory or the form of the board, in capitals: A100, RTX-4090."""
        return str(re.findall("^(?:[a-z]+-)?[^-]+", self.name)[0]).upper()

    @property
    def memory(self) -> int:
        """Bytes of memory; 0: unknown."""
        return int(self.memory_gib * GIB)

    @property
    def available(self) -> int:
        """Bytes of memory for tensors; 0: unknown."""
        return max(0, self.memory - RUNTIME_BYTES)

    def peak(self, dtype: str, *, tf32: bool = False) -> float:
        """Return the FLOP/s of matrix products in fp32, bf16, fp16 or fp8; 0: the device has no such products."""
        if dtype == "fp32":
            return 1e12 * (self.tf32_tflops if tf32 and self.tf32_tflops else self.fp32_tflops)
        if dtype == "fp8":
            return 1e12 * self.fp8_tflops
        return 1e12 * (self.tflops if self.bf16 or dtype == "fp16" else 0.0)

    def rate(self, dtype: str, *, tf32: bool = False) -> float:
        """Return the FLOP/s at which products in a dtype run: those of fp32 if the device has no units for them."""
        return self.peak(dtype, tf32=tf32) or self.peak("fp32")


PCIE3, PCIE4, PCIE5 = 16.0, 32.0, 64.0
"""GB/s of 16 lanes in one direction."""
ETHERNET_100 = 12.5
"""GB/s of a 100 Gbit/s port, assumed for cards without a reference system."""

# The first entry whose words the driver's name of a device has is that device.
ACCELERATORS = (
    Accelerator(
        name="b300", device="B300", tflops=2250, fp8_tflops=4500, tf32_tflops=1100, fp32_tflops=75, memory_gib=268,
        memory_gbps=8000, link_gbps=900, network_gbps=100, processors=148, watts=1100,
    ),
    Accelerator(
        name="gb200", device="GB200", tflops=2500, fp8_tflops=5000, tf32_tflops=1250, fp32_tflops=80, memory_gib=184,
        memory_gbps=8000, link_gbps=900, network_gbps=50, processors=148, watts=1200, per_node=4,
    ),
    Accelerator(
        name="b200", device="B200", tflops=2250, fp8_tflops=4500, tf32_tflops=1100, fp32_tflops=75, memory_gib=178,
        memory_gbps=7700, link_gbps=900, network_gbps=50, processors=148, watts=1000,
    ),
    Accelerator(
        name="h200", device="H200", tflops=989, fp8_tflops=1979, tf32_tflops=495, fp32_tflops=67, memory_gib=139.8,
        memory_gbps=4800, link_gbps=450, network_gbps=50, processors=132, watts=700,
    ),
    Accelerator(
        name="gh200", device="GH200", tflops=989, fp8_tflops=1979, tf32_tflops=495, fp32_tflops=67, memory_gib=94.5,
        memory_gbps=4000, link_gbps=450, network_gbps=25, processors=132, watts=700, per_node=4,
    ),
    Accelerator(
        name="h100-pcie", device="H100 PCIe", tflops=756, fp8_tflops=1513, tf32_tflops=378, fp32_tflops=51,
        memory_gib=79.1, memory_gbps=2000, link_gbps=PCIE5, network_gbps=25, processors=114, watts=350,
    ),
    Accelerator(
        name="h100-nvl", device="H100 NVL", tflops=835, fp8_tflops=1671, tf32_tflops=418, fp32_tflops=60,
        memory_gib=93.1, memory_gbps=3938, link_gbps=PCIE5, network_gbps=25, processors=132, watts=400,
    ),
    Accelerator(
        name="h100-80gb", device="H100", tflops=989, fp8_tflops=1979, tf32_tflops=495, fp32_tflops=67, memory_gib=79.1,
        memory_gbps=3350, link_gbps=450, network_gbps=50, processors=132, watts=700,
    ),
    Accelerator(
        name="l40s", device="L40S", tflops=362, fp8_tflops=733, tf32_tflops=183, fp32_tflops=91.6, memory_gib=44.4,
        memory_gbps=864, link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=142, watts=350,
    ),
    Accelerator(
        name="l40", device="L40", tflops=181, fp8_tflops=362, tf32_tflops=90.5, fp32_tflops=90.5, memory_gib=44.4,
        memory_gbps=864, link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=142, watts=300,
    ),
    Accelerator(
        name="l4", device="L4", tflops=121, fp8_tflops=242, tf32_tflops=60, fp32_tflops=30.3, memory_gib=22.0,
        memory_gbps=300, link_gbps=PCIE4 / 2, network_gbps=ETHERNET_100, processors=58, watts=72,
    ),
    Accelerator(
        name="a100-40gb", device="A100 40GB", tflops=312, tf32_tflops=156, fp32_tflops=19.5, memory_gib=39.4,
        memory_gbps=1555, link_gbps=300, network_gbps=25, processors=108, watts=400,
    ),
    Accelerator(
        name="a100-80gb", device="A100", tflops=312, tf32_tflops=156, fp32_tflops=19.5, memory_gib=79.2,
        memory_gbps=2039, link_gbps=300, network_gbps=25, processors=108, watts=400,
    ),
    Accelerator(
        name="a800-80gb", device="A800", tflops=312, tf32_tflops=156, fp32_tflops=19.5, memory_gib=79.2,
        memory_gbps=2039, link_gbps=200, network_gbps=25, processors=108, watts=400,
    ),
    Accelerator(
        name="a40", device="A40", tflops=150, tf32_tflops=75, fp32_tflops=37.4, memory_gib=44.4, memory_gbps=696,
        link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=84, watts=300,
    ),
    Accelerator(
        name="a30", device="A30", tflops=165, tf32_tflops=82, fp32_tflops=10.3, memory_gib=23.5, memory_gbps=933,
        link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=56, watts=165,
    ),
    Accelerator(
        name="a10", device="A10", tflops=125, tf32_tflops=62.5, fp32_tflops=31.2, memory_gib=22.0, memory_gbps=600,
        link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=72, watts=150,
    ),
    Accelerator(
        name="rtx-4090", device="RTX 4090", tflops=165, fp8_tflops=330, tf32_tflops=82.6, fp32_tflops=82.6,
        memory_gib=23.6, memory_gbps=1008, link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=128, watts=450,
    ),
    Accelerator(
        name="rtx-3090", device="RTX 3090", tflops=71, tf32_tflops=35.6, fp32_tflops=35.6, memory_gib=23.6,
        memory_gbps=936, link_gbps=PCIE4, network_gbps=ETHERNET_100, processors=82, watts=350,
    ),
    Accelerator(
        name="v100-16gb", device="V100 16GB", tflops=125, fp32_tflops=15.7, bf16=False, memory_gib=15.8,
        memory_gbps=900, link_gbps=150, network_gbps=6.25, processors=80, watts=300,
    ),
    Accelerator(
        name="v100-32gb", device="V100", tflops=125, fp32_tflops=15.7, bf16=False, memory_gib=31.7, memory_gbps=900,
        link_gbps=150, network_gbps=6.25, processors=80, watts=300,
    ),
    Accelerator(
        name="t4", device="T4", tflops=65, fp32_tflops=8.1, bf16=False, memory_gib=14.6, memory_gbps=320,
        link_gbps=PCIE3, network_gbps=ETHERNET_100, processors=40, watts=70,
    ),
    # One of the two dies of a card, which is one device to PyTorch.
    Accelerator(
        name="mi250", device="MI250", tflops=181, fp32_tflops=45.3, memory_gib=64, memory_gbps=1638, link_gbps=100,
        network_gbps=12.5, processors=104, watts=280,
    ),
    Accelerator(
        name="mi250x", device="MI250X", tflops=191.5, fp32_tflops=47.9, memory_gib=64, memory_gbps=1638, link_gbps=100,
        network_gbps=12.5, processors=110, watts=280,
    ),
    Accelerator(
        name="mi300a", device="MI300A", tflops=980.6, fp8_tflops=1961, tf32_tflops=490, fp32_tflops=122.6,
        memory_gib=128, memory_gbps=5300, link_gbps=384, network_gbps=25, processors=228, watts=550, per_node=4,
    ),
    Accelerator(
        name="mi300x", device="MI300X", tflops=1307, fp8_tflops=2615, tf32_tflops=654, fp32_tflops=163.4,
        memory_gib=192, memory_gbps=5300, link_gbps=448, network_gbps=50, processors=304, watts=750,
    ),
    # Chips of a pod are a torus: links and network are both the two links of one axis. v2, v3: a core, half of a chip.
    Accelerator(
        name="tpu-v2", device="TPU v2", tflops=22.5, fp32_tflops=4, memory_gib=8, memory_gbps=350, link_gbps=60,
        network_gbps=60, processors=1, watts=140, kernel_seconds=1e-6,
    ),
    Accelerator(
        name="tpu-v3", device="TPU v3", tflops=61.5, fp32_tflops=10, memory_gib=16, memory_gbps=450, link_gbps=70,
        network_gbps=70, processors=1, watts=131, kernel_seconds=1e-6,
    ),
    Accelerator(
        name="tpu-v4", device="TPU v4", tflops=275, fp32_tflops=45, memory_gib=32, memory_gbps=1200, link_gbps=100,
        network_gbps=100, processors=1, watts=192, per_node=4, kernel_seconds=1e-6,
    ),
    Accelerator(
        name="tpu-v5e", device="TPU v5e", tflops=197, fp32_tflops=32, memory_gib=16, memory_gbps=819, link_gbps=100,
        network_gbps=100, processors=1, watts=170, kernel_seconds=1e-6,
    ),
    Accelerator(
        name="tpu-v5p", device="TPU v5p", tflops=459, fp32_tflops=76, memory_gib=95, memory_gbps=2765, link_gbps=200,
        network_gbps=200, processors=1, watts=350, per_node=4, kernel_seconds=1e-6,
    ),
    Accelerator(
        name="tpu-v6e", device="TPU v6e", tflops=918, fp32_tflops=153, memory_gib=32, memory_gbps=1640, link_gbps=180,
        network_gbps=180, processors=1, watts=300, kernel_seconds=1e-6,
    ),
    # No data sheet: a starting point for --calibrate. One rank is one or two cores of a server.
    Accelerator(
        name="cpu", device="no data sheet", tflops=0.15, fp32_tflops=0.15, memory_gib=0, memory_gbps=12, link_gbps=4,
        network_gbps=1.25, processors=1, watts=50, kernel_seconds=15e-6,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Efficiency:
    """Attained shares of the data sheet's rates: the constants of the time estimate, the same for all devices.

    Attributes:
        matmul: large matrix products, without the losses of tiles and waves. An H200 reaches 620 to 770 of its 989
            TFLOP/s, by shape, at its power limit.
        attention: fused attention, on the FLOPs that it computes (Dao 2023, arXiv:2307.08691, fig. 5 to 7).
        memory: elementwise kernels, of the memory bandwidth.
        optimizer: the update of the parameters, likewise.
        link: collectives within a node (bus bandwidth of nccl-tests).
        network: collectives and messages between nodes.
        message_seconds: latency of a collective or message.
    """

    matmul: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    optimizer: float = 0.8
    link: float = 0.75
    network: float = 0.75
    message_seconds: float = 15e-6


@dataclass(frozen=True)
class Hardware:
    """Machine that a plan is for.

    Attributes:
        device: its data sheet.
        per_node: devices of a node.
        efficiency: attained shares of its rates.
    """

    device: Accelerator
    per_node: int
    efficiency: Efficiency = field(default_factory=Efficiency)

    @cached_property
    def memory_rate(self) -> float:
        """Attained bytes per second of elementwise kernels."""
        return self.device.memory_gbps * 1e9 * self.efficiency.memory

    @cached_property
    def optimizer_rate(self) -> float:
        """Attained bytes per second of the update of the parameters."""
        return self.device.memory_gbps * 1e9 * self.efficiency.optimizer

    @cached_property
    def link_rate(self) -> float:
        """Attained bytes per second between two devices of a node."""
        return self.device.link_gbps * 1e9 * self.efficiency.link

    @cached_property
    def network_rate(self) -> float:
        """Attained bytes per second of one device to other nodes."""
        return self.device.network_gbps * 1e9 * self.efficiency.network


def hardware(name: str, *, per_node: int = 0, network_gbit: float = 0.0) -> Hardware:
    """Return the machine of a --gpu name.

    Args:
        name: of the table.
        per_node: devices of a node; 0: those of the reference system.
        network_gbit: Gbit/s of one device to other nodes; 0: those of the reference system.

    Raises:
        ConfigError: the table has no such device.
    """
    device = accelerator(name)
    if network_gbit:
        device = replace(device, network_gbps=network_gbit / 8)
    return Hardware(device, per_node or device.per_node)


def accelerator(name: str) -> Accelerator:
    """Return the entry of a --gpu name.

    Raises:
        ConfigError: the table has no such device.
    """
    known = {entry.name: entry for entry in ACCELERATORS}
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return known[wanted]
    # h100 is the last of its variants in the table, the common one.
    if variants := [entry for entry in known if entry.startswith(f"{wanted}-") and wanted[-1].isdigit()]:
        return known[variants[-1]]
    nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    raise ConfigError(
        f"--gpu {name} is unknown",
        fix=(f"Use --gpu {nearest[0]}; all names: " if nearest else "Use one of ") + ", ".join(sorted(known)),
    )


def device_of(driver_name: str) -> Accelerator | None:
    """Return the entry of a device by the name that the driver or the backend gives it; None: the table has none.

    All words of an entry must be in the name: "L4" is not in "NVIDIA L40", nor "A40" in "NVIDIA RTX A4000".
    """
    words = set(driver_name.replace("-", " ").replace("v5litepod", "v5e").split())
    return next((entry for entry in ACCELERATORS if words.issuperset(entry.device.split())), None)


def device_of_resource(text: str) -> Accelerator | None:
    """Return the entry of the first device that a Slurm resource names, such as gpu:a100:8; None: it names none."""
    # Resources leave out the x of MI250X, and add letters of their own: v100s.
    entries = {entry.family.lower().removesuffix("x"): entry for entry in ACCELERATORS if entry.name != "cpu"}
    patterns = {name.replace("-", "[-_]?"): entry for name, entry in entries.items()}
    return next(
        (entry for name, entry in patterns.items() if re.search(rf"(?<![a-z0-9]){name}(?![0-9])", text.lower())), None
    )
