"""Node check rules for measurements: flags slow devices and links, wrong clocks and an unusable --save folder.

A speed is compared with the upper median of the ranks with the same device: at most half of them can be outliers, and
of two the faster one is the reference. Slow ranks without a GPU get warnings only: other processes may use the cores,
memory and disk of their host, and training there is slow, not wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megatron_lite.formatting import format_ranges, format_size
from megatron_lite.ops.doctor.report import MATRIX_PRODUCT, UNITS, Report, format_rate
from megatron_lite.ops.doctor.verdict import Problem, Thresholds, name_hosts


def model_of(report: Report) -> str:
    """Return the model of a device without the number of CPU threads."""
    return report.device.partition(" (")[0]


def slow_devices(ranks: Sequence[Report], limits: Thresholds) -> Iterator[Problem]:
    """Name ranks that are slower than the upper median of ranks with the same device."""
    for name, unit in UNITS.items():
        alike: dict[str, list[Report]] = {}
        for report in ranks:
            if name in report.speeds:
                alike.setdefault(model_of(report), []).append(report)
        for reports in alike.values():
            usual = statistics.median_high(report.speeds[name] for report in reports)
            for report in reports:
                speed, gpu = report.speeds[name], bool(report.uuid)
                limit = limits.gpu_speed if gpu else limits.cpu_speed
                if speed >= limit * usual:
                    continue
                yield Problem(
                    kind=f"slow {name}",
                    text=f"{report.place}: {name} at {format_rate(speed, unit)}, {speed / usual:.2f} of the median "
                    f"{format_rate(usual, unit)} (at least {limit:g})",
                    fix="Report the node: check its clocks, cooling and power (nvidia-smi -q -d PERFORMANCE)"
                    if gpu
                    else "End other processes on this host, or check its clock frequency",
                    hosts=(report.host,),
                    severity="problem" if gpu else "warning",
                    excludes=gpu,
                )
    for report in ranks:
        if report.peak_flops and report.speeds.get(MATRIX_PRODUCT, report.peak_flops) < limits.peak * report.peak_flops:
            share = report.speeds[MATRIX_PRODUCT] / report.peak_flops
            yield Problem(
                kind="slow devices",
                text=f"{report.place}: {MATRIX_PRODUCT} at {share:.0%} of the data sheet's speed",
                fix="Check clocks and power limit of the GPU (nvidia-smi -q -d CLOCK,POWER)",
                hosts=(report.host,),
                severity="warning",
            )


def slow_storage(ranks: Sequence[Report], limits: Thresholds) -> Iterator[Problem]:
    """Name hosts that write slowly to --save, and a lack of space or files there."""
    found = [(report, report.storage) for report in ranks if report.storage is not None]
    if not found:
        return
    usual = statistics.median_high(storage.write_speed for _, storage in found)
    for report, storage in found:
        if storage.write_speed < limits.write_speed * usual:
            yield Problem(
                kind="slow --save",
                text=f"{report.host}: writes to --save at {format_rate(storage.write_speed, 'B/s')}, "
                f"{storage.write_speed / usual:.2f} of the median {format_rate(usual, 'B/s')} (at least "
                f"{limits.write_speed:g})",
                fix="Report the node: check its mount of the file system",
                hosts=(report.host,),
                severity="problem" if report.uuid else "warning",
                excludes=bool(report.uuid),
            )
        if storage.rename_seconds > limits.rename:
            yield Problem(
                kind="slow small files",
                text=f"{report.host}: a small file in --save takes {1000 * storage.rename_seconds:.0f} ms (at most "
                f"{1000 * limits.rename:.0f})",
                fix="Expect slow starts and saves, or use another file system for --save",
                hosts=(report.host,),
                severity="warning",
            )
    report, storage = found[0]
    left = []
    if storage.free < limits.free_space:
        least = format_size(limits.free_space)
        left.append(f"{format_size(storage.free)} {storage.free_limit} (at least {least})")
    if storage.inodes is not None and storage.inodes < limits.inodes:
        left.append(f"{storage.inodes:,} files {storage.inode_limit} (at least {limits.inodes:,})")
    if left:
        yield Problem(
            kind="full --save",
            text=f"{storage.path} has {' and '.join(left)}",
            fix="Remove files there, ask for a larger quota, or give --save another folder",
            hosts=(report.host,),
        )


def wrong_clocks(ranks: Sequence[Report], limits: Thresholds) -> Iterator[Problem]:
    """Name hosts whose clock differs from the lower median of all hosts."""
    offsets = {report.host: report.clock_offset for report in reversed(ranks)}
    if len(offsets) < 2:
        return
    usual = statistics.median_low(offsets.values())
    for host, offset in offsets.items():
        if abs(offset - usual) > limits.clock:
            direction = "ahead of" if offset > usual else "behind"
            yield Problem(
                kind="clock",
                text=f"{host}: its clock is {abs(offset - usual):.1f} s {direction} the others (at most "
                f"{limits.clock:g})",
                fix="Report the node: time synchronization (chrony, ntpd) does not run there; locks of run folders "
                "and file times depend on it",
                hosts=(host,),
            )


def slow_links(ranks: Sequence[Report], limits: Thresholds) -> Iterator[Problem]:
    """Name groups that are slower than the upper quartile of their axis; a host whose links are all slow is bad."""
    hosts = {report.rank: report.host for report in ranks}
    gpus = any(report.uuid for report in ranks)
    share = limits.link_speed if gpus else limits.cpu_link_speed
    for (axis, operation), groups in group_bandwidths(ranks).items():
        # One bad host slows two of three links between three hosts.
        usual = sorted(groups.values())[math.ceil(0.75 * len(groups)) - 1]
        slow = [group for group, bandwidth in groups.items() if bandwidth < share * usual]
        at = {group: tuple(dict.fromkeys(hosts.get(rank, "?") for rank in group)) for group in groups}
        for group in slow:
            guilty = tuple(host for host in at[group] if _is_guilty(host, at, slow))
            yield Problem(
                kind=f"slow {axis} links",
                text=f"ranks {format_ranges(group)} ({name_hosts(at[group])}): {operation} over {axis} at "
                f"{format_rate(groups[group], 'B/s')}, {groups[group] / usual:.2f} of the upper quartile "
                f"{format_rate(usual, 'B/s')} (at least {share:g})",
                fix="Report the node: check its network or NVLink (nvidia-smi nvlink -s, ibstat)",
                hosts=guilty or at[group],
                severity="problem" if gpus else "warning",
                excludes=gpus and bool(guilty),
            )


def _is_guilty(host: str, at: Mapping[tuple[int, ...], tuple[str, ...]], slow: Sequence[tuple[int, ...]]) -> bool:
    """Return whether all groups with a host are slow, and they tell it from the other hosts of these groups."""
    own = [group for group in at if host in at[group]]
    apart = len({at[group] for group in own}) > 1 or at[own[0]] == (host,)
    return apart and set(own) <= set(slow)


def group_bandwidths(ranks: Iterable[Report]) -> dict[tuple[str, str], dict[tuple[int, ...], float]]:
    """Return the bandwidth of each group by axis and operation: the lowest that one of its ranks measured."""
    found: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
    for report in ranks:
        for link in report.links:
            groups = found.setdefault((link.axis, link.operation), {})
            groups[link.ranks] = min(link.bandwidth, groups.get(link.ranks, float("inf")))
    return found
