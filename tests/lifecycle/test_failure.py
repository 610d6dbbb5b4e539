"""Failed, killed, stalled and signalled ranks in real jobs of several processes: the other ranks end and report it."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.job_commands import SMALL
from support.launchers import free_port
from support.trainer import Job

from megatron_lite.optim.update_rule import TorchRule
from megatron_lite.runs.exit_status import read_exit_status
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.lock_file import LOCK_NAME
from megatron_lite.runs.process import this_process
from megatron_lite.train.native import NativeEngine

pytestmark = pytest.mark.slow

TRAIN = [
    *SMALL,
    *shlex.split("--train-iters 100000 --num-layers 2 --mock-data --tokenizer-type NullTokenizer --vocab-size 127"),
    *shlex.split("--make-vocab-size-divisible-by 8 --device cpu --num-threads 1 --log-interval 1"),
    *shlex.split("--distributed-timeout-minutes 0.3 --rendezvous-timeout-minutes 1"),
]


@dataclass(frozen=True)
class Fault:
    """Fault of one rank in iteration 3, or in its first step of the optimizer; it prepares the process of that rank."""

    kind: str
    rank: int
    variables: dict

    def __call__(self):
        os.environ.update(self.variables)
        train_step, step = NativeEngine.train_step, TorchRule.step
        mine = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID"))) == self.rank

        def wrapped(engine, plan, read, rates=None):
            if mine and plan.iteration == 3:
                if self.kind == "sleep":
                    time.sleep(600)
                if self.kind == "kill":
                    time.sleep(2)
                    os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "stuck" and plan.iteration == 3:
                if mine:
                    raise ValueError("the optimizer is broken")
                time.sleep(600)
            return train_step(engine, plan, read, rates)

        def broken(rule, *args):
            if mine and self.kind == "raise":
                raise ValueError("the optimizer is broken")
            return step(rule, *args)

        NativeEngine.train_step, TorchRule.step = wrapped, broken


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


class Ranks:
    """Ranks as processes, with the variables of a launcher."""

    def __init__(self, folder, what, failing, words, *, world=2, variables=torchrun_variables):
        port = str(free_port())
        self.jobs = []
        for rank in range(world):
            (folder / f"rank{rank}").mkdir()
            fault = Fault(what, failing, variables(rank, world, port))
            self.jobs.append(Job(folder / f"rank{rank}", ["train", *TRAIN, *words], fault))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for job in self.jobs:
            job.process.kill()
            job.process.join()

    def text(self, rank):
        return self.jobs[rank].text()

    def wait_for(self, rank, text):
        assert self.jobs[rank].until(lambda: text in self.text(rank), timeout=90.0), self.text(rank)

    def ends_with(self, *codes):
        ended = tuple(job.wait(120.0).code for job in self.jobs)
        assert ended == codes, "\n".join(f"rank {rank}:\n{self.text(rank)}" for rank in range(len(ended)))


@pytest.mark.parametrize("variables", [torchrun_variables, slurm_variables])
def test_an_exception_on_one_rank_ends_all_and_is_named_by_all(tmp_path, variables):
    with Ranks(tmp_path, "raise", 1, ["--tensor-model-parallel-size", "2"], variables=variables) as job:
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
    with Ranks(tmp_path, "kill", killed, words) as job:
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
    with Ranks(tmp_path, "stuck", 1, ["--save", str(save), "--save-interval", "1000000"]) as job:
        job.ends_with(1, 1)
        assert "because another rank failed first" in job.text(0)
    ended = read_exit_status(save)
    assert (ended.status, ended.rank, ended.message) == ("error", 1, "the optimizer is broken")
    assert not (save / LOCK_NAME).exists()


def test_a_stalled_collective_shows_the_stacks_of_all_ranks_and_ends(tmp_path):
    with Ranks(tmp_path, "sleep", 1, ["--distributed-timeout-minutes", "0.1"]) as job:
        job.ends_with(1, 1)
        for rank in (0, 1):
            text = job.text(rank)
            assert "has made no progress for" in text
            assert f"rank {rank} (dp {rank}, pp 0, tp 0)] " in text
            assert "Python stacks of this rank, in iteration 3" in text
            assert " in train_step" in text or rank == 1
        assert f'"{__file__}", line ' in job.text(1), "the stalled rank's stack shows the cause"


def test_a_signal_to_one_rank_stops_all_with_a_save(tmp_path):
    save = tmp_path / "run"
    with Ranks(tmp_path, "", 0, ["--save", str(save), "--save-interval", "1000000"], world=2) as job:
        job.wait_for(1, "iteration        3/")
        job.jobs[0].send(signal.SIGTERM)
        job.ends_with(0, 0)
        assert "exiting program after receiving SIGTERM" in job.text(1)
        ended = read_exit_status(save)
        assert (ended.status, ended.host) == ("signal", socket.gethostname())
    assert (save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip().isdigit()


def test_a_second_job_of_several_ranks_is_refused_on_all(tmp_path):
    save = tmp_path / "run"
    words = ["--save", str(save), "--load", str(save), "--save-interval", "1000000"]
    with FolderLock(save, process=this_process("gpu07"), command="train"):
        with Ranks(tmp_path, "", 0, words) as refused:
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
