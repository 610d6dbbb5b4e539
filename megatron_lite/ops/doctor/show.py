"""Node check output: tables of ranks and links, findings, and one JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_lite.formatting import format_count, format_ranges, format_short, format_size
from megatron_lite.ops.doctor.measured import group_bandwidths
from megatron_lite.ops.doctor.report import HOST_COPY, MATRIX_PRODUCT, MEMORY_COPY, UNITS, Report, format_rate
from megatron_lite.ops.doctor.verdict import Problem, Verdict, name_hosts

MAX_ROWS = 64
"""Ranks up to which each has a row; of more, each host has one with its slowest values."""
MAX_ALIKE = 4
"""Findings of one kind that are shown with their text."""


def print_check(verdict: Verdict, reports: Mapping[int, Report], console: Console) -> None:
    """Print versions, tables and findings."""
    ranks = [reports[rank] for rank in sorted(reports)]
    parts: list[RenderableType] = [Text(line) for line in _version_lines(ranks)]
    parts.append(_rank_table(ranks))
    if any(report.links for report in ranks):
        parts.append(_link_table(ranks))
    parts += [Text(line) for line in _storage_lines(ranks)]
    parts += [Text(f"Note: {note}") for note in dict.fromkeys(note for report in ranks for note in report.notes)]
    parts += [Text(line, style=style) for line, style in _finding_lines(verdict.findings)]
    parts.append(Text(verdict.summary, style="bold red" if verdict.problems else "bold green"))
    console.print(Group(*parts))


def json_record(
    verdict: Verdict, reports: Mapping[int, Report], *, exclude_file: Path | None, written: Sequence[str]
) -> dict[str, Any]:
    """Return the result as a JSON object.

    Args:
        verdict: of the check.
        reports: by rank.
        exclude_file: of the bad hosts; None: there is none.
        written: hosts that were appended to it.
    """
    return {
        "good": not verdict.problems,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asdict(verdict),
        "exclude_file": None if exclude_file is None else str(exclude_file),
        "written": list(written),
        "ranks": [reports[rank].to_json() for rank in sorted(reports)],
    }


def _version_lines(ranks: Sequence[Report]) -> list[str]:
    """Return the most frequent version of each program, and the most frequent device."""
    names = dict.fromkeys(name for report in ranks for name in report.versions)
    usual = [
        f"{name} {statistics.mode(report.versions[name] for report in ranks if name in report.versions)}"
        for name in names
    ]
    devices = [report.device for report in ranks if report.device]
    return [", ".join(usual), *([statistics.mode(devices)] if devices else [])]


def _rank_table(ranks: Sequence[Report]) -> Table:
    by_host: dict[str, list[Report]] = {}
    for report in ranks:
        by_host.setdefault(report.host, []).append(report)
    rows = [[report] for report in ranks] if len(ranks) <= MAX_ROWS else list(by_host.values())
    speeds = [name for name in UNITS if any(name in report.speeds for report in ranks)]
    table = Table(box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("host")
    has_gpus = any(report.uuid for report in ranks)
    if has_gpus:
        table.add_column("GPU")
        table.add_column("memory free", justify="right")
        table.add_column("state")
    titles = {MATRIX_PRODUCT: "product", MEMORY_COPY: "copy", HOST_COPY: "from host"}
    for name in speeds:
        table.add_column(f"{titles[name]}\n{UNITS[name]}", justify="right")
    if has_clocks := len(by_host) > 1:
        table.add_column("clock\ns", justify="right")
    if has_failures := any(report.failures for report in ranks):
        table.add_column("failed")
    for row in rows:
        cells = [format_ranges([report.rank for report in row]), row[0].host]
        if has_gpus:
            cells += _gpu_cells(row)
        for name in speeds:
            measured = [report.speeds[name] for report in row if name in report.speeds]
            cells.append(format_short(min(measured)) if measured else "-")
        if has_clocks:
            cells.append(f"{row[0].clock_offset:+.2f}")
        if has_failures:
            cells.append(", ".join(dict.fromkeys(step for report in row for step in report.failures)))
        table.add_row(*cells)
    return table


def _gpu_cells(row: Sequence[Report]) -> list[str]:
    gpus = [report.gpu for report in row if report.gpu is not None]
    if not gpus:
        return [row[0].uuid if len(row) == 1 else format_count(len(row), "GPU"), "-", "-"]
    states = dict.fromkeys(
        state
        for gpu in gpus
        for state in (
            f"{gpu.ecc_errors} ECC errors" if gpu.ecc_errors else "",
            gpu.repairs,
            gpu.throttling,
            "MIG" if gpu.mig else "",
        )
        if state
    )
    emptiest = min(gpus, key=lambda gpu: gpu.memory_free)
    return [
        row[0].uuid if len(row) == 1 else format_count(len(row), "GPU"),
        f"{format_size(emptiest.memory_free)} of {format_size(emptiest.memory_total)}",
        ", ".join(states) or "good",
    ]


def _link_table(ranks: Sequence[Report]) -> Table:
    hosts = {report.rank: report.host for report in ranks}
    sizes = {(link.axis, link.operation): link.size for report in ranks for link in report.links}
    table = Table(box=None, pad_edge=False)
    for title in ("axis", "operation"):
        table.add_column(title)
    for title in ("message", "groups", "median\nB/s", "slowest\nB/s"):
        table.add_column(title, justify="right")
    table.add_column("slowest ranks")
    for (axis, operation), groups in group_bandwidths(ranks).items():
        slowest = min(groups, key=lambda group: groups[group])
        places = name_hosts(hosts.get(rank, "?") for rank in slowest)
        table.add_row(
            axis,
            operation,
            format_size(sizes[axis, operation]),
            str(len(groups)),
            format_short(statistics.median_high(groups.values())),
            format_short(groups[slowest]),
            f"{format_ranges(slowest)} ({places})",
        )
    return table


def _storage_lines(ranks: Sequence[Report]) -> list[str]:
    found = {report.host: report.storage for report in ranks if report.storage is not None}
    if not found:
        return []
    slowest = min(found, key=lambda host: found[host].write_speed)
    storage = found[slowest]
    inodes = "" if storage.inodes is None else f", {storage.inodes:,} files {storage.inode_limit}"
    shm = min((report.node.shm_free for report in ranks if report.node is not None), default=0)
    return [
        f"--save {storage.path}: writes at {format_rate(storage.write_speed, 'B/s')} ({slowest}, the slowest of "
        f"{format_count(len(found), 'host')}), {1000 * max(each.rename_seconds for each in found.values()):.2g} ms a "
        f"small file, {format_size(storage.free)} {storage.free_limit}{inodes}; /dev/shm {format_size(shm)} free"
    ]


def _finding_lines(findings: Sequence[Problem]) -> list[tuple[str, str]]:
    """Return text and style of each finding; of many of one kind, the first ones and the hosts of the others."""
    kinds: dict[str, list[Problem]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, alike in kinds.items():
        style = "red" if alike[0].severity == "problem" else "yellow"
        shown = alike if len(alike) <= MAX_ALIKE else alike[: MAX_ALIKE - 1]
        lines += [(f"{finding.severity.upper()}: {finding.text}", style) for finding in shown]
        if rest := alike[len(shown) :]:
            hosts = name_hosts(host for finding in rest for host in finding.hosts)
            lines.append((f"{alike[0].severity.upper()}: {kind}, {len(rest)} more: {hosts}", style))
        lines.append((f"  {alike[0].fix}.", ""))
    return lines
