"""Which rank of how many this process is, as torchrun, srun or a plain `python` say it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_lite.errors import ConfigError

Launcher = Literal["torchrun", "slurm", "python"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where this process stands in the job, and how the ranks find each other."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Launcher = "python"
    init_method: str = "env://"
    """Rendezvous address: env:// (torchrun's variables), tcp://host:port or file://path."""
    host: str = ""


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Reads the launcher's variables; the most explicit launcher wins (torchrun inside srun is torchrun).

    Args:
        environment: variables to read; None: the process's own.

    Raises:
        ConfigError: variables of one launcher are incomplete or contradict each other.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables and "WORLD_SIZE" in variables:
        launch = _from_torchrun(variables)
    elif "SLURM_PROCID" in variables and "SLURM_STEP_NUM_TASKS" in variables:
        # Both exist inside `srun` only: a batch script has SLURM_PROCID=0 too, though it is no task of a step.
        launch = _from_slurm(variables)
    else:
        return Launch(host=socket.gethostname())
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            "A rank lies in [0, world size)",
            found=f"rank {launch.rank} of {launch.world_size} ({launch.launcher})",
            fix="Unset RANK and WORLD_SIZE, or start the job with torchrun or srun",
        )
    return launch


def _from_torchrun(variables: Mapping[str, str]) -> Launch:
    world_size = _integer(variables, "WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if world_size > 1 and missing:
        raise ConfigError(
            "A job of several ranks needs a rendezvous address",
            found=f"WORLD_SIZE={world_size} without {' and '.join(missing)}",
            fix="Start with torchrun, which sets them, or set them to the first node's name and a free port",
        )
    return Launch(
        rank=_integer(variables, "RANK"),
        world_size=world_size,
        local_rank=_integer(variables, "LOCAL_RANK", default=0),
        local_world_size=_integer(variables, "LOCAL_WORLD_SIZE", default=1),
        launcher="torchrun",
        host=socket.gethostname(),
    )


def _from_slurm(variables: Mapping[str, str]) -> Launch:
    world_size = _integer(variables, "SLURM_STEP_NUM_TASKS")
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "localhost")
    # Ranks of one node meet by themselves, whether or not its name can be resolved.
    one_node = variables.get("SLURM_STEP_NUM_NODES") == "1"
    address = variables.get("MASTER_ADDR") or ("127.0.0.1" if one_node else first_host(nodes))
    # A port of the job's own, the same on every rank: two jobs that share a node do not meet.
    port = variables.get("MASTER_PORT") or str(20000 + _integer(variables, "SLURM_JOB_ID", default=0) % 20000)
    per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return Launch(
        rank=_integer(variables, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(variables, "SLURM_LOCALID", default=0),
        local_world_size=int(re.split(r"[(,]", per_node)[0]),
        launcher="slurm",
        init_method=f"tcp://{address}:{port}",
        host=variables.get("SLURMD_NODENAME") or socket.gethostname(),
    )


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `gpu[07-09,12],head` gives `gpu07`."""
    first = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", nodelist)
    assert first is not None, nodelist
    prefix, ranges, suffix = first.groups()
    return prefix + (re.split(r"[-,]", ranges)[0] if ranges else "") + suffix


def _integer(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"{name} is a whole number", found=f"{name}={text!r}", fix="Start the job with torchrun or srun"
        ) from None
