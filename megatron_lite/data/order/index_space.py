"""Memory and disk requirements of sample indices, checked before building."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.data.order.sample_index import IndexPlan
from megatron_lite.errors import DataError
from megatron_lite.formatting import format_size

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
USABLE = 0.9
"""Share of the available memory that an index may take; the rest is for everything else."""


def check_memory(plan: IndexPlan, prefix: str, shorten: str) -> None:
    """Refuse to build an index that does not fit in memory: the system would end the process without a word.

    Args:
        plan: of the index.
        prefix: the dataset's.
        shorten: the flags that make the index smaller.

    Raises:
        DataError: building it takes more memory than is available.
    """
    free = available_memory()
    if free is None or plan.build_bytes <= USABLE * free:
        return
    raise DataError(
        "The sample index must fit in memory while it is built",
        found=f"{describe_index(plan)} of {prefix}, needs {format_size(plan.build_bytes)}; {format_size(free)} "
        "available",
        fix=f"{shorten}, or use a machine with more memory{_fitting(plan, free)}",
    )


def check_disk(plan: IndexPlan, prefix: str, folder: Path, shorten: str) -> None:
    """Refuse to build an index for whose files a folder has no room; arguments as check_memory.

    Raises:
        DataError: it has less.
    """
    free, needed = shutil.disk_usage(folder).free, plan.file_bytes
    if needed > free:
        raise DataError(
            "The files of the sample index must fit on the disk",
            found=f"{describe_index(plan)} of {prefix}, needs {format_size(needed)}; {format_size(free)} free in "
            f"{folder}",
            fix=f"Give --data-cache-path a folder with room, free some, or {_uncapitalized(shorten)}",
        )


def describe_index(plan: IndexPlan) -> str:
    """An index's size in words."""
    samples = f"{plan.num_samples:,}" if plan.num_samples is not None else "all"
    epochs = "1 epoch" if plan.epochs == 1 else f"{plan.epochs:,} epochs"
    return f"the index for {samples} samples, {epochs} of {plan.num_documents:,} documents"


def available_memory() -> int | None:
    """Bytes that this process can allocate: the machine's, its control group's or ulimit's; None: unknown here."""
    return min(_limits(), default=None)


def _fitting(plan: IndexPlan, free: int) -> str:
    """How many samples fit, rounded down to two digits."""
    if plan.num_samples is None:
        return ""
    fitting = int(plan.num_samples * USABLE * free / plan.build_bytes)
    unit = 10 ** max(0, len(str(fitting)) - 2)
    return f". About {fitting // unit * unit:,} samples fit"


def _uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def _limits() -> Iterator[int]:
    for line in _lines(PROC / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = next(iter(_lines(PROC / "self" / "statm")), "0").split()[0]
        yield max(0, soft - int(used) * resource.getpagesize())
    for line in _lines(PROC / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _group(CGROUPS / path.strip("/"), CGROUPS, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = CGROUPS / "memory"
            used, files = "memory.usage_in_bytes", "total_inactive_file"
            yield from _group(top / path.strip("/"), top, "memory.limit_in_bytes", used, files)


def _group(folder: Path, top: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """What the limits of a control group and of those above it leave; cached files do not count as used."""
    for group in (folder, *(parent for parent in folder.parents if parent == top or top in parent.parents)):
        allowed, used = _number(group / limit), _number(group / usage)
        if allowed is not None and used is not None:
            stats = (line.split() for line in _lines(group / "memory.stat"))
            cached = sum(int(words[1]) for words in stats if words[0] == reclaimable)
            yield max(0, allowed - used + cached)


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system; none where there is no such file."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
