"""Launch environment: this process's rank, world size and rendezvous address, from torchrun, Slurm or MPI variables."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_lite.backend.nodelist import expand_counts, expand_nodes
from megatron_lite.errors import ConfigError
from megatron_lite.runs.process import ProcessId, machine_id, start_of, this_process

Launcher = Literal["torchrun", "slurm", "mpirun", "task", "python"]
RANKS_PER_TASK, RANK_IN_TASK = "MEGATRON_LITE_RANKS_PER_TASK", "MEGATRON_LITE_RANK_IN_TASK"
"""Variables of a rank that another process of this program started (task_ranks.py): how many, and which of them."""

PORT_RANGE = range(20000, 32768)
"""Derived ports: below the range from which Linux draws the ports of outgoing connections."""
NUM_PORTS = 8
"""Derived ports of a job: the next is tried where another program listens at one."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process's rank and the job's rendezvous address, as the launcher gives them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Launcher = "python"
    init_method: str = ""
    """Address of rank 0: tcp://host:port, tcp://host:port,port,… (tried in this order), or file://path, a file to which
    rank 0 writes its port."""
    job: str = ""
    """Identity of the job, by which ranks of another job are refused. Empty: all ranks at this address are one job."""
    host: str = ""
    slurm_job: str = ""
    """SLURM_JOB_ID; empty: not in a Slurm job."""
    slurm_restarts: int = 0
    """Number of times that Slurm has requeued the job."""
    start_id: str = ""
    """Identity of this start of the job, equal on all ranks; empty: unknown."""

    @property
    def process(self) -> ProcessId:
        """Return the identity of this process, for locks and status files."""
        return this_process(self.host, self.slurm_job, self.slurm_restarts)


@dataclass(frozen=True)
class _MpiVariables:
    """Variables of one MPI launcher; of several names the first that is set is used."""

    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    only_mpirun: bool = True
    """Whether srun never sets them."""


_MPI = (
    _MpiVariables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _MpiVariables(
        "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)
    ),
    # MPICH, Intel MPI (MPI_LOCAL…) and Cray's PALS (PMI_LOCAL_…).
    _MpiVariables(
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
        only_mpirun=False,
    ),
)
_MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID", "MPIEXEC_JOBID")


def host_name(environment: Mapping[str, str] | None = None) -> str:
    """Return this host's name: Slurm's name of the node, if there is one."""
    variables = os.environ if environment is None else environment
    return variables.get("SLURMD_NODENAME") or socket.gethostname()


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables.

    The innermost launcher is used: torchrun before mpirun before srun. srun itself sets PMI_RANK and PMIX_RANK for MPI
    programs, so these are used only if they contradict the Slurm step, as under an mpirun inside it.

    Args:
        environment: variables to read; None: the process's own.

    Raises:
        ConfigError: variables of a launcher are incomplete or contradict each other.
    """
    variables = os.environ if environment is None else environment
    # Both exist inside `srun` only: a batch script has SLURM_PROCID=0 too, but is no task of a step.
    in_step = "SLURM_PROCID" in variables and "SLURM_STEP_NUM_TASKS" in variables
    mpi = next((names for names in _MPI if names.rank in variables and names.size in variables), None)
    if "RANK" in variables and "WORLD_SIZE" in variables:
        launch = _from_torchrun(variables)
    elif in_step and (mpi is None or not _mpirun_in_step(mpi, variables)):
        launch = _from_slurm(variables)
    elif mpi is not None:
        launch = _from_mpi(mpi, variables)
    else:
        _refuse_incomplete(variables)
        launch = Launch()
    launch = replace(
        _in_task(launch, variables),
        host=host_name(variables),
        slurm_job=variables.get("SLURM_JOB_ID", ""),
        slurm_restarts=_integer(variables, "SLURM_RESTART_COUNT", default=0),
        start_id=_start_id(variables),
    )
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            f"The environment variables of {launch.launcher} set rank {launch.rank} of {launch.world_size}; ranks are "
            "0 to "
            f"{launch.world_size - 1}",
            fix="Start the job with torchrun, srun or mpirun, or, for a single process, unset RANK and WORLD_SIZE",
        )
    return launch


def _in_task(launch: Launch, variables: Mapping[str, str]) -> Launch:
    """Return the place of a rank that a task started: the ranks of task 0, then those of task 1, and so on."""
    if RANKS_PER_TASK not in variables:
        return launch
    count, index = _integer(variables, RANKS_PER_TASK), _integer(variables, RANK_IN_TASK)
    job = launch.job or f"task {_parent()}"
    return replace(
        launch,
        rank=launch.rank * count + index,
        world_size=launch.world_size * count,
        local_rank=launch.local_rank * count + index,
        local_world_size=launch.local_world_size * count,
        launcher="task",
        init_method=launch.init_method or _tcp("127.0.0.1", _derived_ports(job)),
        job=job,
    )


def _parent() -> str:
    """Return the identity of the process that started this one."""
    return f"{os.getppid()}, started {start_of(os.getppid())} on {machine_id()}"


def _refuse_incomplete(variables: Mapping[str, str]) -> None:
    """Refuse a process that would train alone, beside the other ranks of its job and in the same folder.

    Raises:
        ConfigError: a rank is set without a world size, or a world size without a rank.
    """
    half = {
        "RANK": "RANK" in variables,
        "WORLD_SIZE": variables.get("WORLD_SIZE", "1").strip() != "1",
        **{name: name in variables for names in _MPI for name in (names.rank, names.size)},
        "PMIX_RANK": "PMIX_RANK" in variables,
        # A batch script has SLURM_PROCID=0, and its step variables are unset.
        "SLURM_PROCID": variables.get("SLURM_PROCID", "0").strip() != "0",
    }
    if found := [f"{name}={variables[name]}" for name, is_set in half.items() if is_set]:
        raise ConfigError(
            f"The environment of this process is that of a launcher, but incomplete: {', '.join(found)} is set and "
            "the rest is "
            "missing",
            rule="A job of several ranks needs both its rank and its world size",
            fix="Start the job with torchrun, srun or mpirun; or, to train with one rank, unset "
            + " and ".join(setting.partition("=")[0] for setting in found),
        )


def _start_id(variables: Mapping[str, str]) -> str:
    """Return the identity of one start of a job, from its Slurm step or torchrun's process on this node.

    The rendezvous address is no identity: the next job on the same nodes has the same one.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    job, step, requeued, restarted = (variables.get(name, "") for name in names)
    if job and step:
        return f"Slurm step {job}.{step}, restart {requeued or 0}.{restarted or 0}"
    if "TORCHELASTIC_RUN_ID" in variables:
        return f"torchrun {_parent()}, restart {restarted or 0}"
    if RANKS_PER_TASK in variables:
        return f"task {_parent()}"
    return ""


def _from_torchrun(variables: Mapping[str, str]) -> Launch:
    world_size = _integer(variables, "WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if world_size > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size} is set without {' and '.join(missing)}, so the ranks cannot find each other",
            fix="Start the job with torchrun, which sets them, or set MASTER_ADDR to the host of rank 0 and "
            "MASTER_PORT to a free "
            "port on it",
        )
    address, job = variables.get("MASTER_ADDR", ""), variables.get("TORCHELASTIC_RUN_ID", "")
    ports: tuple[int, ...] = (_port(variables),) if world_size > 1 else ()
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and world_size > 1:
        # torchrun's agent itself listens at MASTER_PORT.
        job = f"torchrun {job} {address}:{ports[0]}"
        ports = _derived_ports(job)
    return Launch(
        rank=_integer(variables, "RANK"),
        world_size=world_size,
        local_rank=_integer(variables, "LOCAL_RANK", default=0),
        local_world_size=_integer(variables, "LOCAL_WORLD_SIZE", default=1),
        launcher="torchrun",
        init_method=_tcp(address, ports),
        job=job,
    )


def _from_slurm(variables: Mapping[str, str]) -> Launch:
    step_size = _integer(variables, "SLURM_STEP_NUM_TASKS")
    # Old versions of Slurm number the tasks of a step over several components through, but count each component's.
    het = "SLURM_HET_SIZE" in variables and _integer(variables, "SLURM_NTASKS", default=step_size) > step_size
    list_name = "SLURM_STEP_NODELIST" if variables.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    nodes = expand_nodes(variables.get(list_name) or "localhost", list_name)
    node = variables.get("SLURMD_NODENAME", "")
    address = variables.get("MASTER_ADDR", "")
    if not address and not het and variables.get("SLURM_STEP_NUM_NODES") == "1":
        address = "127.0.0.1"  # the name of a node may not resolve on the node itself
    if not address and "SLURM_HET_SIZE" in variables:
        address = _first_het_host(variables, nodes, all_nodes=not het)
    address = address or nodes[0]
    job_id = variables.get("SLURM_HET_JOB_ID" if het else "SLURM_JOB_ID") or variables.get("SLURM_JOB_ID", "0")
    step_id = variables.get("SLURM_STEP_ID") or variables.get("SLURM_STEPID", "0")
    job = f"Slurm step {job_id}.{step_id}, restart {variables.get('SLURM_RESTART_COUNT', '0')}"
    per_node = expand_counts(variables.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    index = nodes.index(node) if node in nodes else _integer(variables, "SLURM_NODEID", default=0)
    return Launch(
        rank=_integer(variables, "SLURM_PROCID"),
        world_size=_integer(variables, "SLURM_NTASKS") if het else step_size,
        local_rank=_integer(variables, "SLURM_LOCALID", default=0),
        local_world_size=per_node[index] if index < len(per_node) else max(per_node),
        launcher="slurm",
        init_method=_tcp(address, (_port(variables),) if variables.get("MASTER_PORT") else _derived_ports(job)),
        job=job,
    )


def _first_het_host(variables: Mapping[str, str], nodes: Sequence[str], *, all_nodes: bool) -> str:
    """Return the host of rank 0 of a step in a heterogeneous job: the first node of the step's first component.

    Args:
        variables: of a task.
        nodes: of the step, sorted by name across its components; or of this component.
        all_nodes: whether `nodes` are those of the whole step.

    Raises:
        ConfigError: the variables do not show which components the step has.
    """
    groups = range(_integer(variables, "SLURM_HET_SIZE"))
    lists = [variables.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", "") for group in groups]
    hosts = [host for nodelist in lists if nodelist for host in expand_nodes(nodelist)]
    if all_nodes:
        return next((host for host in hosts if host in nodes), nodes[0])
    tasks = sum(_integer(variables, f"SLURM_NTASKS_HET_GROUP_{group}", default=0) for group in groups)
    if not hosts or tasks != _integer(variables, "SLURM_NTASKS"):
        raise ConfigError(
            "MASTER_ADDR is not set, and cannot be derived in a Slurm step over several components of a heterogeneous "
            f"job ({variables['SLURM_STEP_NUM_TASKS']} of {variables['SLURM_NTASKS']} tasks are in this component)",
            fix="Set MASTER_ADDR to the first host of the first component in the job script",
        )
    return hosts[0]


def _mpirun_in_step(names: _MpiVariables, variables: Mapping[str, str]) -> bool:
    """Return whether an mpirun inside this Slurm step started the process: the variables differ from the step's.

    Raises:
        ConfigError: it is as likely that the step was started inside an mpirun.
    """
    mpi = _integer(variables, names.rank), _integer(variables, names.size)
    tasks = "SLURM_NTASKS" if "SLURM_HET_SIZE" in variables and "SLURM_NTASKS" in variables else "SLURM_STEP_NUM_TASKS"
    step = _integer(variables, "SLURM_PROCID"), _integer(variables, tasks)
    if mpi == step or (mpi[1] == 1 and (step[1] == 1 or not names.only_mpirun)):
        return False
    if mpi[1] > 1 and (names.only_mpirun or step[1] != mpi[1]):
        return True
    raise ConfigError(
        f"Slurm and MPI variables contradict each other: rank {step[0]} of {step[1]} by SLURM_PROCID and {tasks}, "
        f"rank {mpi[0]} of {mpi[1]} by "
        f"{names.rank} and {names.size}",
        fix="Start the job with either srun or mpirun, and unset the variables of the other",
    )


def _from_mpi(names: _MpiVariables, variables: Mapping[str, str]) -> Launch:
    rank, world_size = _integer(variables, names.rank), _integer(variables, names.size)
    alone = {"rank": rank, "world_size": world_size, "launcher": "mpirun", "host": host_name(variables)}
    if world_size == 1:
        return Launch(**alone)  # type: ignore[arg-type]
    local = []
    for options in (names.local_rank, names.local_size):
        name = next((name for name in options if name in variables), None)
        if name is None:
            raise ConfigError(
                f"{names.rank}={rank} and {names.size}={world_size} are set without {' or '.join(options)}",
                rule="The rank within the node is needed to choose a device",
                fix="Start the job with an mpirun that sets it, or with torchrun or srun",
            )
        local.append(_integer(variables, name))
    address = variables.get("MASTER_ADDR") or ("127.0.0.1" if local[1] == world_size else "")
    job = next((f"mpirun {variables[name]}" for name in _MPI_JOB if variables.get(name)), "")
    if not job and local[1] == world_size and (process := _launching_process(names.rank)):
        job = f"mpirun {process}"
    missing = [] if address else ["MASTER_ADDR"]
    missing += [] if variables.get("MASTER_PORT") or job else ["MASTER_PORT"]
    if missing:
        error = ConfigError(
            f"mpirun started {local[1]} of {world_size} ranks on this node without {' and '.join(missing)}, so the "
            "ranks of "
            "different nodes cannot find each other",
            fix="Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port on it, for all ranks (Open MPI: "
            "mpirun -x "
            "MASTER_ADDR=host -x MASTER_PORT=29500; MPICH and Intel MPI: mpiexec -genv MASTER_ADDR host …)",
        )
        # The ranks of a node have the same variables: one of them prints the error.
        error.silent = local[0] != 0
        raise error
    ports = (_port(variables),) if variables.get("MASTER_PORT") else _derived_ports(job)
    return Launch(
        **alone,  # type: ignore[arg-type]
        local_rank=local[0],
        local_world_size=local[1],
        init_method=_tcp(address, ports),
        job=job,
    )


def _launching_process(variable: str) -> str:
    """Return the identity of the nearest ancestor process without `variable`: the launcher on this node.

    For MPICH, whose launcher sets no job number. Empty where there is no /proc.
    """
    try:
        pid = os.getppid()
        while pid > 1 and f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = _stat(pid)[1]
        return f"process {pid} of {socket.gethostname()} since {_stat(pid)[19]}" if pid > 1 else ""
    except OSError:
        return ""


def _stat(pid: int) -> list[int]:
    """Return the numbers of /proc/PID/stat from the state on: [0, parent, …, start time (19), …]."""
    numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return [0, *map(int, numbers[1:])]


def _derived_ports(job: str) -> tuple[int, ...]:
    """Return the ports of a job, equal on every rank and with high probability unlike those of another job."""
    digest = hashlib.blake2b(job.encode(), digest_size=4 * NUM_PORTS).digest()
    numbers = (int.from_bytes(digest[start : start + 4], "big") for start in range(0, len(digest), 4))
    return tuple(dict.fromkeys(PORT_RANGE[number % len(PORT_RANGE)] for number in numbers))


def _tcp(address: str, ports: tuple[int, ...]) -> str:
    return f"tcp://{address}:{','.join(map(str, ports))}" if ports else ""


def _port(variables: Mapping[str, str]) -> int:
    port = _integer(variables, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT={port} is not a port", fix="Set MASTER_PORT to a free port from 1024 to 65535")
    return port


def _integer(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"The environment variable {name} is {text!r} instead of a whole number",
            fix=f"Start the job with torchrun, srun or mpirun, or unset {name} to train with one rank",
        ) from None
