"""Failed, killed, stalled and signalled ranks in real jobs of several processes: the other ranks end and report it."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.job_commands import SMALL
from support.launchers import free_port

from megatron_lite.runs.exit_status import read_exit_status
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.lock_file import LOCK_NAME
from megatron_lite.runs.process import this_process

pytestmark = pytest.mark.slow

TRAIN = [
    *SMALL,
    *shlex.split("--train-iters 100000 --num-layers 2 --mock-data --tokenizer-type NullTokenizer --vocab-size 127"),
    *shlex.split("--make-vocab-size-divisible-by 8 --device cpu --num-threads 1 --log-interval 1"),
    *shlex.split("--distributed-timeout-minutes 0.3 --rendezvous-timeout-minutes 1"),
]
PROGRAM = """
import os, signal, sys, time
from megatron_lite.cli.main import main
from megatron_lite.optim.update_rule import TorchRule
from megatron_lite.train.native import NativeEngine

what, rank, *words = sys.argv[1:]
mine = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == int(rank)
train_step, step = NativeEngine.train_step, TorchRule.step

def wrapped(self, plan, read, rates=None):
    if mine and plan.iteration == 3:
        if what == "sleep":
            time.sleep(600)
        if what == "kill":
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "stuck" and plan.iteration == 3:
        if mine:
            raise ValueError("the optimizer is broken")
        time.sleep(600)
    return train_step(self, plan, read, rates)

def broken(self, *args):
    if mine and what == "raise":
        raise ValueError("the optimizer is broken")
    return step(self, *args)

NativeEngine.train_step, TorchRule.step = wrapped, broken
sys.exit(main(["train", *words]))
"""


def torchrun_variables(rank, world, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def slurm_variables(rank, world, port):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_TASKS_PER_NODE": str(world),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(int(port) - 20000),
        "SLURMD_NODENAME": f"node{rank}",
        "MASTER_PORT": port,
    }


class Job:
    """Ranks as processes, started as a launcher starts them."""

    def __init__(self, folder, what, failing, words, *, world=2, variables=torchrun_variables):
        port = str(free_port())
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(world)]
        self.processes = []
        for rank in range(world):
            environment = {**clean, **variables(rank, world, port), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", PROGRAM, what, str(failing), *TRAIN, *words]
            with self.outputs[rank].open("w") as output:
                self.processes.append(
                    subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, rank):
        return self.outputs[rank].read_text(encoding="utf-8")

    def wait_for(self, rank, text, timeout=90.0):
        deadline = time.monotonic() + timeout
        while text not in self.text(rank):
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text(rank)}"
            assert self.processes[rank].poll() is None, self.text(rank)
            time.sleep(0.05)

    def ends_with(self, *codes, timeout=120.0):
        deadline = time.monotonic() + timeout
        ended = tuple(process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes)
        assert ended == codes, "\n".join(f"rank {rank}:\n{self.text(rank)}" for rank in range(len(ended)))


@pytest.mark.parametrize("variables", [torchrun_variables, slurm_variables])
def test_an_exception_on_one_rank_ends_all_and_is_named_by_all(tmp_path, variables):
    with Job(tmp_path, "raise", 1, ["--tensor-model-parallel-size", "2"], variables=variables) as job:
        job.ends_with(1, 1)
        host = "node1" if variables is slurm_variables else socket.gethostname()
        words = (
            f"{host} rank 1 (dp 0, pp 0, tp 1) failed in iteration 1, optimizer: ValueError: the optimizer is broken"
        )
        assert f"[{host} rank 1 (dp 0, pp 0, tp 1)] failed in iteration 1, optimizer" in job.text(1)
        assert words in job.text(0)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_and_is_named(tmp_path, killed):
    save = tmp_path / "run"
    save.mkdir()
    words = ["--pipeline-model-parallel-size", "2", "--save", str(save), "--save-interval", "1000000"]
    with Job(tmp_path, "kill", killed, words) as job:
        codes = [1, 1]
        codes[killed] = -signal.SIGKILL
        job.ends_with(*codes)
        text = job.text(1 - killed)
        if killed == 0:
            assert "rank 0, which holds the job's store, cannot be reached" in text
        else:
            assert "rank 1 (dp 0, pp 1, tp 0) was killed or disconnected: it has sent no heartbeat for" in text
            assert "The phase that it sent last: iteration 3" in text
    ended = read_exit_status(save)
    assert (ended.status, ended.rank, ended.host) == ("error", killed, socket.gethostname())
    assert (save / LOCK_NAME).exists() == (killed == 0), "rank 0 had no time to release it"


def test_a_rank_0_that_is_stuck_when_another_fails_leaves_no_lock(tmp_path):
    save = tmp_path / "run"
    with Job(tmp_path, "stuck", 1, ["--save", str(save), "--save-interval", "1000000"]) as job:
        job.ends_with(1, 1)
        assert "because another rank failed first" in job.text(0)
    ended = read_exit_status(save)
    assert (ended.status, ended.rank, ended.message) == ("error", 1, "the optimizer is broken")
    assert not (save / LOCK_NAME).exists()


def test_a_stalled_collective_shows_the_stacks_of_all_ranks_and_ends(tmp_path):
    with Job(tmp_path, "sleep", 1, ["--distributed-timeout-minutes", "0.2"]) as job:
        job.ends_with(1, 1)
        for rank in (0, 1):
            text = job.text(rank)
            assert "has made no progress for" in text
            assert f"rank {rank} (dp {rank}, pp 0, tp 0)] " in text
            assert "Python stacks of this rank, in iteration 3" in text
            assert " in train_step" in text or rank == 1
        assert '"<string>", line 14 in wrapped' in job.text(1), "the stalled rank's stack shows the cause"


def test_a_signal_to_one_rank_stops_all_with_a_save(tmp_path):
    save = tmp_path / "run"
    with Job(tmp_path, "", 0, ["--save", str(save), "--save-interval", "1000000"], world=2) as job:
        job.wait_for(1, "iteration        3/")
        job.processes[0].send_signal(signal.SIGTERM)
        job.ends_with(0, 0)
        assert "exiting program after receiving SIGTERM" in job.text(1)
        ended = read_exit_status(save)
        assert (ended.status, ended.host) == ("signal", socket.gethostname())
    assert (save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip().isdigit()


def test_a_second_job_of_several_ranks_is_refused_on_all(tmp_path):
    save = tmp_path / "run"
    words = ["--save", str(save), "--load", str(save), "--save-interval", "1000000"]
    with FolderLock(save, process=this_process("gpu07"), command="train"):
        with Job(tmp_path, "", 0, words) as refused:
            refused.ends_with(1, 1)
            printed = refused.text(0) + refused.text(1)
            assert printed.count(f"{save} is in use by process {os.getpid()} on gpu07") == 1
        assert [path.name for path in save.iterdir()] == [LOCK_NAME]


def test_torchrun_needs_no_wrapper(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # a free port of its own choice
    words += [str(Path(__file__).parents[2] / "pretrain_gpt.py"), *TRAIN, "--train-iters", "3"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "training is complete after 3 iterations" in done.stdout
