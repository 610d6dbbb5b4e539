"""Environment variables of the ranks of a one-node job, as torchrun, srun and mpirun set them; and free ports."""

import itertools
import os
import socket

_STEPS = itertools.count()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def by_hand(world, *ranks):
    """Return the variables of the given ranks of a job, of all by default, without a launcher."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in ranks or range(world)]


def torchrun(world):
    """Return the variables of the ranks under torchrun, whose agent listens at MASTER_PORT."""
    agent = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [{**rank, **agent} for rank in by_hand(world)]


def step(number, world, job="4711"):
    """Return the variables of the tasks of a Slurm step."""
    common = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": str(number),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": str(world),
        "SLURM_STEP_NODELIST": "nowhere",
        "SLURMD_NODENAME": "nowhere",
    }
    return [{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(world)]


def srun(world):
    """Return the variables of the tasks of a step that no other test uses."""
    return step(next(_STEPS), world, job=str(os.getpid()))


def mpirun(world, namespace=None):
    """Return the variables of the ranks under Open MPI's mpirun."""
    common = {
        "OMPI_COMM_WORLD_SIZE": str(world),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(world),
        "PMIX_NAMESPACE": namespace or f"prterun-{os.getpid()}@{next(_STEPS)}",
    }
    return [
        {**common, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)} for rank in range(world)
    ]
