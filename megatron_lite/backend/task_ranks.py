"""Local launcher within a Slurm task: starts one rank process for each GPU of the node and forwards signals.

For `srun --ntasks-per-node 1` and for a single machine without a launcher. Imports no torch: the starting process
only waits.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_lite
from megatron_lite.backend.environment import RANK_IN_TASK, RANKS_PER_TASK, Launch
from megatron_lite.formatting import format_count

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
"""Processors and GPUs that AMD's driver manages; only GPUs have SIMD units."""
GRACE = 60.0
"""Seconds that the other ranks have to end by themselves after one has failed: they notice a killed rank after 30 s."""
KILL_AFTER = 10.0
"""Seconds between SIGTERM and SIGKILL for ranks that did not end by themselves."""
POLL = 0.05
PR_SET_PDEATHSIG = 1


def visible_gpus(environment: Mapping[str, str] | None = None) -> int:
    """Return the number of GPUs that this process sees, without loading a driver."""
    variables = os.environ if environment is None else environment
    for name in VISIBLE:
        if name in variables:
            # CUDA ignores everything from the first invalid entry on, and a process sees one MIG instance at most.
            count = 0
            for entry in variables[name].split(","):
                if not re.fullmatch(r"\d+(\.\d+)?|GPU-.*", entry.strip()):  # of Intel: card.tile
                    return count or int(entry.strip().startswith("MIG-"))
                count += 1
            return count
    return len(list(NVIDIA_GPUS.glob("*"))) or sum(map(_has_simd, AMD_NODES.glob("*/properties")))


def _has_simd(properties: Path) -> bool:
    """Return whether a node of AMD's driver is a GPU; one that is hidden from this container cannot be read."""
    try:
        found = re.search(r"^simd_count (\d+)", properties.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return found is not None and int(found[1]) > 0


def start_ranks(command: Sequence[str], launch: Launch, count: int) -> int:
    """Run a command as `count` ranks of this task until all have ended.

    Signals to this process are forwarded to the ranks. After the failure of a rank the others end by themselves; those
    that do not are terminated.

    Args:
        command: a Python program that calls read_launch.
        launch: this task's place in the job.
        count: ranks to start.

    Returns:
        0, or the exit code of the first rank that failed; 128 + N if signal N killed it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    package = str(Path(megatron_lite.__file__).parent.parent)
    variables = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
        # The interpreter's options, such as -u, are not inherited.
        "PYTHONUNBUFFERED": "1",
        RANKS_PER_TASK: str(count),
    }
    first = launch.rank * count
    total = launch.world_size * count
    _say(launch.host, f"starting {format_count(count, 'rank')}: {first} to {first + count - 1} of {total}")
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    with _forwarding(ranks) as received:
        for index in range(count):
            ranks[first + index] = subprocess.Popen(command, env={**variables, RANK_IN_TASK: str(index)})
            for number in received:
                ranks[first + index].send_signal(number)
        return _wait(ranks, launch.host, received)


def end_with_parent() -> None:
    """Make the kernel send this rank SIGTERM, upon which it saves and stops, when the process that started it dies."""
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


@contextmanager
def _forwarding(ranks: Mapping[int, subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward signals to the ranks that run; yield the list of signals received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks.values():
            process.send_signal(number)  # does nothing if the process has been waited for

    before: dict[signal.Signals, Any] = {}
    for number in FORWARDED:
        # nohup and background jobs of a shell ignore some signals, and so do the ranks then.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Mapping[int, subprocess.Popen[bytes]], host: str, received: Sequence[int]) -> int:
    """Wait until all ranks have ended; return the exit code of the first that failed."""
    running = dict(ranks)
    code, deadline, last_resort = 0, float("inf"), signal.SIGTERM
    while running:
        for rank, process in list(running.items()):
            if (ended := process.poll()) is None:
                continue
            del running[rank]
            if ended < 0 and -ended not in received and deadline == float("inf"):
                _say(host, f"rank {rank} (process {process.pid}) was killed by {signal.Signals(-ended).name}")
            if ended and not code:
                code, deadline = ended if ended > 0 else 128 - ended, time.monotonic() + GRACE
        if running and time.monotonic() > deadline:
            names = ", ".join(map(str, running))
            _say(host, f"sending {last_resort.name} to ranks that have not ended after the failure: {names}")
            for process in running.values():
                process.send_signal(last_resort)
            deadline, last_resort = time.monotonic() + KILL_AFTER, signal.SIGKILL
        time.sleep(POLL)
    return code


def _say(host: str, text: str) -> None:
    # One write, because the ranks write to the same file.
    sys.stderr.write(f"[{host}] {text}\n")
    sys.stderr.flush()
