"""Tests of a task that starts several ranks: their variables, signals, failures and exit codes; counting GPUs."""

import sys

import pytest

from megatron_lite.backend import task_ranks
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.task_ranks import start_ranks, visible_gpus

TASK = Launch(rank=1, world_size=2, host="n2", launcher="slurm")
READY = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ["MEGATRON_LITE_RANK_IN_TASK"]), pathlib.Path(sys.argv[1])
def ready():
    (folder / f"ready{rank}").touch()
    while not all((folder / f"ready{other}").exists() for other in range(2)):
        time.sleep(0.01)
"""


def run(tmp_path, code):
    return start_ranks([sys.executable, "-S", "-c", READY + code, str(tmp_path)], TASK, 2)


def test_each_rank_has_its_number_and_a_share_of_the_cores(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "print(rank, os.environ['MEGATRON_LITE_RANKS_PER_TASK'], int(os.environ['OMP_NUM_THREADS']) > 0)"
    assert run(tmp_path, code) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["0 2 True", "1 2 True"]
    assert err == "[n2] starting 2 ranks: 2 to 3 of 4\n"


def test_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, "import megatron_lite") == 0


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_is_forwarded_to_all_ranks(name, tmp_path):
    """The ranks save and stop, and the task ends like them."""
    code = f"""
signal.signal(signal.{name}, lambda *_: (print(rank), sys.exit(0)))
ready()
if rank == 0:
    os.kill(os.getppid(), signal.{name})
time.sleep(60)
"""
    before = task_ranks.signal.getsignal(task_ranks.signal.SIGTERM)
    assert run(tmp_path, code) == 0
    assert task_ranks.signal.getsignal(task_ranks.signal.SIGTERM) is before


def test_a_forwarded_signal_that_kills_the_ranks_is_no_failure_to_report(tmp_path, capfd):
    code = "ready(); rank or os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    assert run(tmp_path, code) == 128 + 15
    assert "killed" not in capfd.readouterr().err


def test_the_exit_code_is_that_of_the_first_failed_rank(tmp_path):
    code = "ready(); time.sleep(0 if rank else 0.5); sys.exit(3 if rank else 1)"
    assert run(tmp_path, code) == 3


def test_a_killed_rank_is_named_and_the_others_are_ended(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(task_ranks, "GRACE", 0.1)
    monkeypatch.setattr(task_ranks, "KILL_AFTER", 0.1)
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    assert run(tmp_path, code) == 128 + 9
    _, killed, terminated, ended = capfd.readouterr().err.splitlines()
    assert killed.startswith("[n2] rank 3 (process ") and killed.endswith(") was killed by SIGKILL")
    assert terminated == "[n2] sending SIGTERM to ranks that have not ended after the failure: 2"
    assert ended == "[n2] sending SIGKILL to ranks that have not ended after the failure: 2"


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a, GPU-2b"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a,MIG-2b"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "0,1"}, 2),
        ({}, 3),
    ],
)
def test_visible_gpus(variables, count, tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    monkeypatch.setattr(task_ranks, "NVIDIA_GPUS", tmp_path)
    assert visible_gpus(variables) == count


def test_gpus_of_amd_are_counted_without_their_processors(tmp_path, monkeypatch):
    for number, units in enumerate((0, 0, 304, 304)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(
            f"cpu_cores_count 8\nsimd_count {units}\nmem_banks_count 1\n"
        )
    (tmp_path / "4" / "properties").mkdir(parents=True)  # cannot be read
    monkeypatch.setattr(task_ranks, "NVIDIA_GPUS", tmp_path / "none")
    monkeypatch.setattr(task_ranks, "AMD_NODES", tmp_path)
    assert visible_gpus({}) == 2 and visible_gpus({"HIP_VISIBLE_DEVICES": "1"}) == 1
    assert visible_gpus({"ZE_AFFINITY_MASK": "0.0,0.1,1"}) == 3
