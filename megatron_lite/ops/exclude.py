"""Exclude file: hosts on which no further job of a run is to start, with reason and expiry.

One host per line, followed by a comment; a line written by hand may be a bare host name or a Slurm node list:

    gpu017  # until 2026-11-29T23:10Z: GPU 3 (GPU-5f…): matrix product 2.4 x slower than the median
    gpu[020-023]

`megatron-lite doctor` and `--check-nodes` append to it; `slurm submit` and the chain pass its hosts to `sbatch
--exclude`. Hosts carry Slurm's names of the nodes (SLURMD_NODENAME).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from megatron_lite.backend.nodelist import expand_nodes
from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.runs.atomic import replace_file
from megatron_lite.system_errors import reason, remedy

EXCLUDE_NAME = "excluded_nodes.txt"
"""Name of the file in the --save folder of a run."""
EXCLUDE_HOURS = 72.0
"""Hours after which an entry expires: a host that is still bad is found again at the next check."""

_TIME = "%Y-%m-%dT%H:%MZ"
_UNTIL = re.compile(r"until (\S+): ?(.*)")


@dataclass(frozen=True)
class Exclusion:
    """Entry of the exclude file.

    Attributes:
        host: Slurm's name of the node.
        reason: why it is excluded; empty: unknown.
        until: UTC time at which the entry expires; None: never.
    """

    host: str
    reason: str = ""
    until: datetime | None = None


def read_exclusions(path: Path, *, now: datetime | None = None) -> tuple[Exclusion, ...]:
    """Return the entries that have not expired, one per host; of several entries of a host the last counts.

    Args:
        path: the exclude file; none means no entries.
        now: the current time; None: the clock's.

    Raises:
        ConfigError: the file cannot be read, or a line is no host name.
    """
    now = now or datetime.now(timezone.utc)
    entries: dict[str, Exclusion] = {}
    for number, line in enumerate(_lines(path), start=1):
        hosts, _, comment = line.partition("#")
        for host in _hosts(hosts, path, number):
            entry = _entry(host, comment.strip())
            entries.pop(host, None)
            if entry.until is None or entry.until > now:
                entries[host] = entry
    return tuple(entries.values())


def excluded_hosts(save: Path) -> tuple[str, ...]:
    """Return the excluded hosts of a run, from the exclude file in its --save folder.

    Raises:
        ConfigError: as read_exclusions.
    """
    return tuple(entry.host for entry in read_exclusions(save / EXCLUDE_NAME))


def exclude_option(save: Path, *, given: str = "", further: Collection[str] = ()) -> str:
    """Return the value of `sbatch --exclude` for a job of a run; empty: every node is allowed.

    sbatch uses the last --exclude only, and refuses the job for a name that is no node of the cluster: all sources are
    joined here, and unknown names left out.

    Args:
        save: the --save folder of the run.
        given: the user's own --exclude, a node list or the path of a file of hosts.
        further: hosts to exclude besides.

    Raises:
        ConfigError: as read_exclusions, or `given` is no node list.
    """
    own: list[str] = []
    if given:
        own = [entry.host for entry in read_exclusions(Path(given))] if "/" in given else expand_nodes(given)
    hosts = dict.fromkeys((*own, *further, *excluded_hosts(save)))
    if not hosts:
        return ""
    nodes = slurm.node_names()
    return ",".join(host for host in hosts if not nodes or host in nodes or host in own)


def exclude_hosts(
    path: Path, reasons: Mapping[str, str], *, hours: float = EXCLUDE_HOURS, now: datetime | None = None
) -> None:
    """Append hosts to the exclude file.

    One write call in append mode: jobs that share the file lose no line of each other.

    Args:
        path: the exclude file; it and its folder are created where missing.
        reasons: reason by host.
        hours: time until the entries expire; infinity: never.
        now: the current time; None: the clock's.

    Raises:
        OSError: the file cannot be written.
    """
    if not reasons:
        return
    now = now or datetime.now(timezone.utc)
    until = "" if hours == float("inf") else f"until {(now + timedelta(hours=hours)).strftime(_TIME)}: "
    lines = [f"{host}  # {until}{' '.join(reason.split())}\n" for host, reason in reasons.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        start = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write((start + "".join(lines)).encode())
        file.flush()
        os.fsync(file.fileno())


def record_bad_hosts(path: Path | None, reasons: Mapping[str, str], *, hours: float = EXCLUDE_HOURS) -> tuple[str, ...]:
    """Append hosts to the exclude file as exclude_hosts does, and report it on stderr; return the appended ones.

    A file that cannot be written is reported only: the reason is often the same as that of the check.
    """
    if not reasons:
        return ()
    hosts = ", ".join(reasons)
    written: tuple[str, ...] = ()
    if path is None:
        text = f"not excluded: {hosts} (no --save and no --exclude-file)"
    else:
        try:
            exclude_hosts(path, reasons, hours=hours)
            text = f"{path}: excluded {hosts} for {hours:g} hours (undo: megatron-lite doctor --forgive HOST)"
            written = tuple(reasons)
        except OSError as error:
            text = f"WARNING: cannot write {path}: {error.strerror}; not excluded: {hosts}"
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    return written


def forgive_hosts(path: Path, hosts: Collection[str]) -> tuple[str, ...]:
    """Remove hosts from the exclude file; return those that were in it.

    Raises:
        ConfigError: as read_exclusions.
        OSError: the file cannot be written; it is unchanged.
    """
    kept, removed = [], []
    for number, line in enumerate(_lines(path), start=1):
        named, hash_mark, comment = line.partition("#")
        on_line = _hosts(named, path, number)
        if not set(on_line) & set(hosts):
            kept.append(line)
            continue
        removed += [host for host in on_line if host in hosts]
        kept += [f"{host}  {hash_mark}{comment}".rstrip() for host in on_line if host not in hosts]
    if removed:
        replace_file(path, "".join(f"{line}\n" for line in kept).encode())
    return tuple(dict.fromkeys(removed))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The exclude file {path} is not UTF-8 text: {error.reason} at byte {error.start}",
            fix="Repair it: one host name or Slurm node list per line, comments after #. Without the file, no host is "
            "left out, not even those that failed a node check",
        ) from error
    except OSError as error:
        raise ConfigError(f"Cannot read the exclude file {path}: {reason(error)}", fix=remedy(error, path)) from error


def _hosts(text: str, path: Path, number: int) -> list[str]:
    try:
        if len(text.split()) > 1:
            raise ValueError("names separated by spaces")
        return expand_nodes(text.strip()) if text.strip() else []
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"Line {number} of {path} is no host name: {text.strip()!r}",
            fix="Write one host name or Slurm node list per line, such as gpu[07-09], and comments after #",
        ) from error


def _entry(host: str, comment: str) -> Exclusion:
    match = _UNTIL.fullmatch(comment)
    if match is None:
        return Exclusion(host, comment)
    try:
        until = datetime.strptime(match[1], _TIME).replace(tzinfo=timezone.utc)
    except ValueError:
        return Exclusion(host, comment)
    return Exclusion(host, match[2], until)
