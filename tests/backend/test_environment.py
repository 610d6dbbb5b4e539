"""Tests of the launch environment: torchrun, Slurm and MPI variables, and their contradictions."""

import socket
import subprocess
import sys

import pytest

from megatron_lite.backend.environment import PORT_RANGE, RANK_IN_TASK, RANKS_PER_TASK, read_launch
from megatron_lite.errors import ConfigError

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "40017",
    "SLURM_STEP_ID": "0",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "1234"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-n1-77@1",
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items() if name.startswith("OMPI")}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2", "PALS_APID": "x"}


def ports(launch):
    return [int(port) for port in launch.init_method.rpartition(":")[2].split(",")]


def test_plain_python_is_one_rank_even_inside_a_batch_script():
    launch = read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"})
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "python")


def test_torchrun_takes_precedence_over_slurm_and_mpi():
    launch = read_launch(TORCHRUN | OPEN_MPI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (3, 4, 1, 2)
    assert launch.launcher == "torchrun" and launch.init_method == "tcp://a:1234"


def test_ranks_under_torchruns_agent_use_other_ports():
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    launch = read_launch(TORCHRUN | agent)
    other = read_launch(TORCHRUN | agent | {"MASTER_PORT": "1235"})
    assert launch.init_method.startswith("tcp://a:") and 1234 not in ports(launch)
    assert launch.job != other.job and ports(launch) != ports(other)
    restarted = read_launch(TORCHRUN | agent | {"TORCHELASTIC_RESTART_COUNT": "1"})
    # Each agent counts its own restarts: the numbers differ between nodes.
    assert (restarted.job, restarted.init_method) == (launch.job, launch.init_method)


def test_srun_needs_no_wrapper():
    launch = read_launch(STEP)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (5, 8, 1, 4)
    assert launch.init_method.startswith("tcp://gpu07:") and set(ports(launch)) <= set(PORT_RANGE)
    assert len(set(ports(launch))) > 4
    assert read_launch(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).init_method == launch.init_method


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "40018"}, {"SLURM_RESTART_COUNT": "1"}])
def test_jobs_steps_and_restarts_differ_in_identity_and_ports(change):
    one, other = read_launch(STEP), read_launch(STEP | change)
    assert one.job != other.job and ports(one) != ports(other)


def test_master_port_is_the_only_port():
    launch = read_launch(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "4711"})
    assert launch.init_method == "tcp://head:4711" and "40017.0" in launch.job


@pytest.mark.parametrize(
    ("counts", "node", "expected"),
    [("2(x3),1", 0, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("1,3", 1, 3), ("4", 9, 4)],
)
def test_ranks_of_this_node(counts, node, expected):
    step = {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node)}
    assert read_launch(STEP | step).local_world_size == expected
    if node < 2:
        step |= {"SLURMD_NODENAME": f"gpu0{7 + node}", "SLURM_NODEID": "7"}
        launch = read_launch(STEP | step)
        assert (launch.local_world_size, launch.host) == (expected, f"gpu0{7 + node}")


def test_ranks_of_one_node_use_the_loopback_address():
    launch = read_launch(STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "nowhere"})
    assert launch.init_method.startswith("tcp://127.0.0.1:")


def test_rank_0_of_a_heterogeneous_job_is_on_its_first_component():
    """Slurm 22 sorts the nodes of the step by name: its first node may belong to the second component."""
    step = STEP | {"SLURM_HET_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "6,2", "SLURMD_NODENAME": "gpu08"}
    step |= {"SLURM_JOB_NODELIST_HET_GROUP_0": "gpu[08-09]", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu07"}
    launch = read_launch(step)
    assert launch.init_method.startswith("tcp://gpu08:")
    assert (launch.world_size, launch.local_world_size) == (8, 2)
    second = step | {"SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_NUM_NODES": "1"}
    assert read_launch(second).init_method.startswith("tcp://127.0.0.1:")


def test_an_old_slurm_counts_the_tasks_of_one_component():
    step = STEP | {"SLURM_HET_SIZE": "2", "SLURM_NTASKS": "12", "SLURM_STEP_NUM_NODES": "1"}
    step |= {"SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[07-08]"}
    step |= {"SLURM_NTASKS_HET_GROUP_0": "4", "SLURM_NTASKS_HET_GROUP_1": "8"}
    launch = read_launch(step)
    assert launch.init_method.startswith("tcp://a1:") and launch.world_size == 12


def test_a_step_over_components_of_a_heterogeneous_job_needs_an_address():
    step = STEP | {"SLURM_HET_SIZE": "2", "SLURM_NTASKS": "12", "SLURM_PROCID": "9", "SLURM_HET_JOB_ID": "40000"}
    with pytest.raises(ConfigError, match=r"8 of 12 tasks are in this component.*first host of the first component"):
        read_launch(step)
    launch = read_launch(step | {"MASTER_ADDR": "gpu01", "PMI_RANK": "9", "PMI_SIZE": "12"})
    assert (launch.rank, launch.world_size, launch.launcher) == (9, 12, "slurm") and "40000.0" in launch.job
    # A step of one component of such a job is an ordinary step.
    assert read_launch(STEP | {"SLURM_HET_SIZE": "2", "SLURM_NTASKS": "8"}).world_size == 8


@pytest.mark.parametrize("variables", [OPEN_MPI, MVAPICH, HYDRA, PALS])
def test_mpirun_needs_no_wrapper_on_one_node(variables):
    launch = read_launch({**variables, "PALS_APID": "1"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (1, 2, 1, 2)
    assert launch.launcher == "mpirun" and launch.init_method.startswith("tcp://127.0.0.1:")


def test_under_mpich_the_launching_process_is_the_identity():
    """Each rank is started through a script, and twice by different launching processes."""
    code = "from megatron_lite.backend.environment import read_launch; print(read_launch())"
    below = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    start = (
        "import os, subprocess, sys\n"
        "for rank in '01':\n"
        "    variables = {**os.environ, 'PMI_RANK': rank, 'PMI_SIZE': '2', 'MPI_LOCALRANKID': rank,\n"
        "                 'MPI_LOCALNRANKS': '2'}\n"
        "    subprocess.run([sys.executable, '-c', *sys.argv[1 + int(rank):]], env=variables, check=True)\n"
    )
    found = []
    for _ in range(2):
        words = [sys.executable, "-c", start, below, code]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found.append([line.partition("init_method=")[2] for line in done.stdout.splitlines()])
    assert found[0][0] == found[0][1] != found[1][0] == found[1][1]


def test_srun_sets_the_variables_of_mpi_too():
    launch = read_launch(STEP | {"PMI_RANK": "5", "PMI_SIZE": "8", "PMIX_RANK": "5"})
    assert (launch.launcher, launch.rank, launch.world_size) == ("slurm", 5, 8)
    stale = read_launch(STEP | {"PMI_RANK": "0", "PMI_SIZE": "1"})
    assert (stale.launcher, stale.rank, stale.world_size) == ("slurm", 5, 8)


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA])
def test_an_mpirun_inside_a_step_takes_precedence(variables):
    """This occurs in a step's shell, and on nodes where mpirun starts its daemons with srun."""
    inside = {**STEP, **variables, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PALS_APID": "1"}
    launch = read_launch(inside)
    assert (launch.launcher, launch.rank, launch.world_size) == ("mpirun", 1, 2)


def test_mpi_on_several_nodes_needs_master_addr_and_port():
    variables = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(ConfigError, match="1 of 2 ranks on this node without MASTER_ADDR") as caught:
        read_launch(variables)
    assert not caught.value.silent
    launch = read_launch(variables | {"MASTER_ADDR": "head"})
    assert launch.init_method.startswith("tcp://head:") and "prterun-n1-77@1" in launch.job
    with pytest.raises(ConfigError, match="without MASTER_PORT"):
        read_launch(HYDRA | {"MPI_LOCALNRANKS": "1", "MASTER_ADDR": "head"})
    launch = read_launch(HYDRA | {"MPI_LOCALNRANKS": "1", "MASTER_ADDR": "head", "MASTER_PORT": "4711"})
    assert launch.init_method == "tcp://head:4711"


def test_one_rank_of_mpi_needs_no_address():
    launch = read_launch({"PMI_RANK": "0", "PMI_SIZE": "1"})
    assert (launch.rank, launch.world_size, launch.init_method) == (0, 1, "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            r"set rank 2 of 2; ranks are 0 to 1",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK is 'zero'"),
        ({"RANK": "1"}, "RANK=1 is set and the rest"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1 is set and the rest"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and the rest"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 is set and the rest"),
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, "PMIX_RANK=1 is set and the rest"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1 and PMI_SIZE=2 are set without MPI_LOCALRANKID or"),
        (TORCHRUN | {"MASTER_PORT": "123456"}, "MASTER_PORT=123456"),
        (STEP | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, "rank 5 of 8 by SLURM_PROCID and"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x"}, r"SLURM_STEP_TASKS_PER_NODE is '4\(x'"),
        (STEP | {"SLURM_STEP_NODELIST": "gpu[07-"}, r"'gpu\[07-'"),
    ],
)
def test_contradictions_are_config_errors(variables, message):
    with pytest.raises(ConfigError, match=message):
        read_launch(variables)


ELASTIC = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
IN_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "other",
    [
        {**IN_STEP, "SLURM_STEP_ID": "1"},
        {**IN_STEP, "SLURM_RESTART_COUNT": "1"},
        {**IN_STEP, **ELASTIC, "TORCHELASTIC_RESTART_COUNT": "1"},
        {},
        ELASTIC,
    ],
)
def test_starts_of_a_job_differ_and_ranks_of_one_start_do_not(other):
    names = {read_launch({**IN_STEP, "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": "2"}).start_id for rank in "01"}
    assert len(names) == 1
    assert read_launch(other).start_id not in names
    assert read_launch(other).start_id == read_launch(other).start_id


def test_torchruns_ranks_on_a_node_are_one_start():
    assert read_launch(ELASTIC).start_id == read_launch({**ELASTIC}).start_id != ""
    assert read_launch({**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "2"}).start_id != read_launch(ELASTIC).start_id


@pytest.mark.parametrize("launcher", [{}, ELASTIC, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_host_has_one_name_whatever_starts_the_job(launcher):
    assert read_launch({**launcher, "SLURMD_NODENAME": "gpu07"}).host == "gpu07"
    assert read_launch(launcher).host == socket.gethostname()


def test_the_slurm_job_is_read_under_any_launcher():
    process = read_launch({**ELASTIC, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}).process
    assert (process.slurm_job, process.slurm_restarts) == ("7", 3)


def test_ranks_that_a_task_of_srun_started():
    task = {**STEP, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    task |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", RANKS_PER_TASK: "4"}
    launches = [read_launch({**task, RANK_IN_TASK: str(index)}) for index in range(4)]
    assert [launch.rank for launch in launches] == [4, 5, 6, 7]
    assert [launch.local_rank for launch in launches] == [0, 1, 2, 3]
    assert {(launch.world_size, launch.local_world_size, launch.launcher) for launch in launches} == {(8, 4, "task")}
    other_task = {**task, "SLURM_PROCID": "0", "SLURM_NODEID": "0", RANK_IN_TASK: "0"}
    rank0 = read_launch(other_task)
    assert (rank0.rank, rank0.init_method, rank0.job) == (0, launches[0].init_method, launches[0].job)
    assert rank0.init_method.startswith("tcp://gpu07:")
    assert {launch.start_id for launch in launches} == {rank0.start_id} != {""}


def test_ranks_that_a_single_process_started():
    launches = [read_launch({RANKS_PER_TASK: "2", RANK_IN_TASK: str(index)}) for index in range(2)]
    assert [(launch.rank, launch.world_size) for launch in launches] == [(0, 2), (1, 2)]
    assert launches[0].init_method == launches[1].init_method != ""
    assert launches[0].init_method.startswith("tcp://127.0.0.1:")
    assert launches[0].start_id == launches[1].start_id != ""
    assert {launch.job for launch in launches} == {launches[0].job} != {""}
