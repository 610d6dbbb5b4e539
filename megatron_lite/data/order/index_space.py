"""Check of free memory and disk space for a sample index, made before the index is built."""

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
"""Share of the available memory that building an index may take."""
MANY_EPOCHS = 1000
"""Epochs that no run makes of the right dataset."""


def check_memory(plan: IndexPlan, prefix: str, shorten: str) -> None:
    """Check that an index fits in memory while it is built; otherwise the kernel would kill the process.

    Args:
        plan: the index.
        prefix: path of the dataset.
        shorten: the flags that make the index smaller.

    Raises:
        DataError: building the index takes more memory than is available.
    """
    free = available_memory()
    if free is None or plan.build_bytes <= USABLE * free:
        return
    raise DataError(
        f'Cannot build {describe_index(plan)} of "{prefix}": it takes '
        f"{format_size(plan.build_bytes)} of memory, and {format_size(free)} are free",
        fix=f"{_question(plan, prefix)}{shorten}{_fitting(plan, free)}; or use a machine with more memory",
    )


def check_disk(plan: IndexPlan, prefix: str, folder: Path, shorten: str) -> None:
    """Check that the files of an index fit on the disk of `folder`; other arguments as in check_memory.

    Raises:
        DataError: the disk has less free space.
    """
    free, needed = shutil.disk_usage(folder).free, plan.file_bytes
    if needed > free:
        raise DataError(
            f'Cannot write {describe_index(plan)} of "{prefix}": its files take {format_size(needed)}, '
            f'and {format_size(free)} are free on the disk of "{folder}"',
            fix=f"{_question(plan, prefix)}Give --data-cache-path a folder with enough space, free disk space, or "
            f"{shorten[:1].lower()}{shorten[1:]}",
        )


def describe_index(plan: IndexPlan) -> str:
    """Return the samples, epochs and documents of an index as text."""
    samples = f"{plan.num_samples:,}" if plan.num_samples is not None else "all"
    epochs = "1 epoch" if plan.epochs == 1 else f"{plan.epochs:,} epochs"
    return f"the sample index for {samples} samples, {epochs} of {plan.num_documents:,} documents"


def available_memory() -> int | None:
    """Return the bytes that this process can allocate: least limit of machine, cgroups and ulimit; None: unknown."""
    return min(_limits(), default=None)


def _fitting(plan: IndexPlan, free: int) -> str:
    """Return the number of samples that fit, rounded down to two digits, after a comma; empty: unknown."""
    if plan.num_samples is None:
        return ""
    fitting = int(plan.num_samples * USABLE * free / plan.build_bytes)
    unit = 10 ** max(0, len(str(fitting)) - 2)
    fitting = fitting // unit * unit
    return f": about {fitting:,} samples fit, {100 * fitting / plan.num_samples:.2g} % of those requested"


def _question(plan: IndexPlan, prefix: str) -> str:
    """Return a sentence on the likely mistake, a wrong dataset, if each document is read very often."""
    many = plan.epochs >= MANY_EPOCHS
    return f'Check that "{prefix}" is the intended dataset, which is small for this run. ' if many else ""


def _limits() -> Iterator[int]:
    """Yield the bytes that each limit leaves: physical memory, ulimit -v, cgroups of version 1 and 2."""
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
    """Yield the bytes left by the limits of a cgroup and of its parents; cached files do not count as used."""
    for group in (folder, *(parent for parent in folder.parents if parent == top or top in parent.parents)):
        allowed, used = _number(group / limit), _number(group / usage)
        if allowed is not None and used is not None:
            stats = (line.split() for line in _lines(group / "memory.stat"))
            cached = sum(int(value) for name, value in stats if name == reclaimable)
            yield max(0, allowed - used + cached)


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    """Return the lines of a file under /proc or /sys; none if it does not exist."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
