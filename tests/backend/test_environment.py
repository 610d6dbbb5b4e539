import pytest

from megatron_lite.backend.environment import first_host, read_launch
from megatron_lite.errors import ConfigError


def test_plain_python_is_one_rank_even_inside_a_batch_script():
    launch = read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"})
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "python")


def test_torchrun_wins_over_slurm():
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    launch = read_launch(variables)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (3, 4, 1, 2)
    assert launch.launcher == "torchrun" and launch.init_method == "env://"


def test_srun_needs_no_wrapper():
    launch = read_launch(
        {
            "SLURM_PROCID": "5",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NODELIST": "gpu[07-08]",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            "SLURM_JOB_ID": "40017",
        }
    )
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (5, 8, 1, 4)
    assert launch.init_method == "tcp://gpu07:20017"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3,5-7]", "n3"), ("gpu[007-010]-ib,head", "gpu007-ib"), ("a-b[01],c", "a-b01")],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "1"},
    ],
)
def test_contradictions_are_config_errors(variables):
    with pytest.raises(ConfigError):
        read_launch(variables)


def test_ranks_of_one_node_meet_without_its_name():
    launch = read_launch(
        {
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NODELIST": "nowhere",
            "SLURM_JOB_ID": "3",
        }
    )
    assert launch.init_method == "tcp://127.0.0.1:20003"
