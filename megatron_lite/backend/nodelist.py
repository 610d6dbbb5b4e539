"""Parser of Slurm node lists and task counts: expands `gpu[07-09,12],head` and `2(x3),1`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from megatron_lite.errors import ConfigError

_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_nodes(nodelist: str, variable: str = "") -> list[str]:
    """Return the host names of a Slurm node list, in Slurm's order: the leftmost bracket varies slowest.

    Args:
        nodelist: the text.
        variable: the environment variable that holds it, for the error; empty: the user has written it.

    Raises:
        ConfigError: the text is not a node list.
    """
    try:
        return [name for group in _groups(nodelist) for name in _expand_group(group)]
    except ValueError as error:
        raise ConfigError(
            f"{variable}={nodelist!r} is no Slurm node list" if variable else f"{nodelist!r} is no Slurm node list",
            rule="It must consist of host names with ranges in brackets, such as gpu[07-09],head",
            fix="Start the job with srun, which sets SLURM_STEP_NODELIST"
            if variable
            else "Close each bracket, and separate names by commas without spaces",
        ) from error


def expand_counts(counts: str) -> list[int]:
    """Return one number per node for `2(x3),1`: [2, 2, 2, 1].

    Raises:
        ConfigError: the text is not a list of counts.
    """
    numbers: list[int] = []
    for part in counts.split(","):
        match = _COUNT.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"The environment variable SLURM_STEP_TASKS_PER_NODE is {counts!r} instead of a list such as 2(x3),1",
                fix="Start the job with srun, which sets this variable",
            )
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def ranks_by_node(world_size: int, environment: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return the number of ranks that each node of the Slurm step, or of the allocation, is to have.

    Args:
        world_size: of the job; another number of tasks means that each task starts the same number of ranks.
        environment: variables of a rank; None: the process's own.

    Returns:
        Ranks by node; empty: not under Slurm, or the numbers do not fit.
    """
    variables = os.environ if environment is None else environment
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or ""
    counts = variables.get("SLURM_STEP_TASKS_PER_NODE", "")
    try:
        hosts = expand_nodes(nodes) if nodes else []
        tasks = expand_counts(counts) if counts else [1] * len(hosts)
    except ConfigError:
        return {}
    if not hosts or len(tasks) != len(hosts) or world_size % sum(tasks):
        return {}
    return {host: count * world_size // sum(tasks) for host, count in zip(hosts, tasks, strict=True)}


def _groups(nodelist: str) -> list[str]:
    """Split at the commas outside brackets."""
    groups, depth = [""], 0
    for letter in nodelist:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            groups.append("")
        else:
            groups[-1] += letter
    return groups


def _expand_group(group: str) -> list[str]:
    parts = list(_PART.finditer(group))
    if not group or "".join(part[0] for part in parts) != group:
        raise ValueError(f"{group!r} is no group")
    names = [""]
    for part in parts:
        choices = [part[2]] if part[1] is None else list(_numbers(part[1]))
        names = [name + choice for name in names for choice in choices]
    return names


def _numbers(ranges: str) -> Iterator[str]:
    for text in ranges.split(","):
        match = _RANGE.fullmatch(text)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is no range")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield str(number).zfill(len(match[1]))
