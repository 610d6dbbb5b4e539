"""Node check result: findings, bad hosts, and the thresholds of the rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["problem", "warning"]
MAX_HOSTS = 8
"""Hosts that a message lists."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of the rules.

    Attributes:
        gpu_speed: smallest share of the median speed of a GPU.
        cpu_speed: the same of a CPU.
        link_speed: smallest share of the upper quartile of the bandwidths of an axis's groups.
        cpu_link_speed: the same between CPU ranks, whose cores carry the messages.
        write_speed: smallest share of the median write speed of --save.
        peak: share of the data sheet's matrix speed below which a GPU gets a warning.
        free_memory: smallest share of a GPU's memory that is free at the start.
        shm: smallest free space of /dev/shm, bytes.
        clock: largest difference of a host's clock from the median, seconds.
        rename: largest latency of a small file in --save, seconds.
        free_space: smallest free space or quota of --save, bytes.
        inodes: smallest number of files that --save must still take.
    """

    gpu_speed: float = 0.85
    cpu_speed: float = 0.5
    link_speed: float = 0.5
    cpu_link_speed: float = 0.1
    write_speed: float = 0.25
    peak: float = 0.4
    free_memory: float = 0.9
    shm: int = 2**29
    clock: float = 5.0
    rename: float = 0.25
    free_space: int = 2**30
    inodes: int = 1000


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A finding.

    Attributes:
        kind: a short name, the same for equal findings on several hosts.
        text: what was found, with host, rank and values.
        fix: what to do.
        hosts: concerned.
        severity: a warning leaves the exit code 0.
        excludes: whether the hosts are bad, and are to be excluded from further jobs.
    """

    kind: str
    text: str
    fix: str
    hosts: tuple[str, ...] = ()
    severity: Severity = "problem"
    excludes: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of a node check.

    Attributes:
        findings: problems, then warnings.
        excluded: reason by bad host.
        num_hosts, num_ranks: that took part.
        seconds: the whole check.
        first_ranks: the lowest rank of each host.
    """

    findings: tuple[Problem, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_hosts: int = 1
    num_ranks: int = 1
    seconds: float = 0.0
    first_ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Return the findings that are no warnings."""
        return tuple(finding for finding in self.findings if finding.severity == "problem")

    @property
    def summary(self) -> str:
        """Return one line: counts, and the bad hosts."""
        problems, warnings = len(self.problems), len(self.findings) - len(self.problems)
        found = f"{problems or 'no'} problem{'s' * (problems != 1)}"
        found += f", {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
        bad = f"; bad: {name_hosts(self.excluded)}" if self.excluded else ""
        return (
            f"node check of {self.num_ranks} rank{'s' * (self.num_ranks != 1)} on {self.num_hosts} "
            f"host{'s' * (self.num_hosts != 1)}: {found}{bad} ({self.seconds:.0f} s)"
        )


def name_hosts(hosts: Iterable[str]) -> str:
    """Return the names of hosts, the first ones of many."""
    names = list(dict.fromkeys(hosts))
    more = f" and {len(names) - MAX_HOSTS} more" if len(names) > MAX_HOSTS else ""
    return ", ".join(names[:MAX_HOSTS]) + more
