"""Jobs of several ranks started by launchers: rendezvous, output of each rank, signals before training."""

import logging
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import time

import pytest
from support.launchers import by_hand, mpirun, step
from support.trainer import status

from megatron_lite.backend import rendezvous
from megatron_lite.backend.environment import host_name
from megatron_lite.cli.main import main
from megatron_lite.runs.metrics_file import read_records
from megatron_lite.train import assemble

pytestmark = pytest.mark.slow

_FORK = multiprocessing.get_context("fork")
_LAUNCHERS = ("SLURM_", "MASTER_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC_")
TRAIN = shlex.split(
    """
    train --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 31 --make-vocab-size-divisible-by 8 --device cpu --num-threads 1 --log-interval 1 --eval-iters 0
    --save-interval 100
    """
)


class Process:
    """Process of one rank with its own output file.

    Args:
        path: of the file.
        args: the command line.
        variables: what the launcher sets.
        prepare: called in the process before the command.
    """

    def __init__(self, path, args, variables, prepare=None):
        self.path = path
        self.process = _FORK.Process(target=self._run, args=([str(word) for word in args], variables, prepare))
        self.process.start()

    def _run(self, args, variables, prepare):
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in [name for name in os.environ if name.startswith(_LAUNCHERS)]:
            del os.environ[name]
        os.environ.update(variables)
        if prepare is not None:
            prepare()
        sys.exit(main(args))

    @property
    def text(self):
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    def wait_for(self, text, timeout=60.0):
        deadline = time.monotonic() + timeout
        while text not in self.text:
            assert time.monotonic() < deadline and self.process.is_alive(), f"no {text!r} in:\n{self.text}"
            time.sleep(0.01)

    def code(self, timeout=60.0):
        self.process.join(timeout)
        assert not self.process.is_alive(), f"it hangs; it said\n{self.text}"
        return self.process.exitcode


@pytest.fixture
def ranks(tmp_path):
    """Return a function that starts ranks (arguments, one dict of variables per rank), ended with the test."""
    started = []
    outputs = tmp_path / "outputs"
    outputs.mkdir()

    def start(args, variables, prepare=None):
        new = []
        for rank, mine in enumerate(variables):
            path = outputs / f"{len(started)}.txt"
            new.append(Process(path, args, mine, None if prepare is None else lambda rank=rank: prepare(rank)))
            started.append(new[-1])
        return new

    yield start
    for process in started:
        process.process.kill()
        process.process.join()


def notice_soon(_rank):
    rendezvous.FIRST_NOTICE = 0.1
    rendezvous.REPORT_SECONDS = 1.0


def test_two_steps_of_one_slurm_job_train_side_by_side(ranks, tmp_path):
    jobs = [ranks([*TRAIN, "--save", tmp_path / f"run{number}"], step(number, 2)) for number in range(2)]
    for number, job in enumerate(jobs):
        assert [process.code() for process in job] == [0, 0], job[0].text + job[1].text
        assert "training is complete after 2 iterations" in job[1].text
        assert status(tmp_path / f"run{number}")["status"] == "completed"


def test_mpirun_starts_one_job(ranks, tmp_path):
    job = ranks([*TRAIN, "--save", tmp_path / "run"], mpirun(2, f"prterun-{os.getpid()}@1"))
    assert [process.code() for process in job] == [0, 0], job[0].text + job[1].text
    assert "training is complete after 2 iterations" in job[1].text
    assert "training is complete" not in job[0].text, "the last rank reports for both"
    start, *_, last = (
        one for one in read_records(tmp_path / "run/metrics.jsonl") if one["kind"] in ("start", "iteration")
    )
    assert start["hosts"] == [host_name()] * 2
    assert len(last["rank_seconds"]) == 2 and min(last["rank_seconds"]) > 0, "compute time of each rank"


@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_rank_that_waits_for_others(ranks, tmp_path, waiting, number):
    save = tmp_path / "run"
    save.mkdir()
    (process,) = ranks([*TRAIN, "--save", save], by_hand(3, waiting), notice_soon)
    process.wait_for("waiting for")
    os.kill(process.process.pid, number)
    began = time.monotonic()
    assert process.code() == -number
    assert time.monotonic() - began < 20, "it does not wait for its time-out"
    ended = status(save)
    assert (ended["status"], ended["message"]) == (
        "signal",
        f"{number.name} received: stopped at once, without saving",
    )
    assert "Traceback" not in process.text and "frame #" not in process.text


def test_ctrl_c_ends_a_rank_that_waits_for_others(ranks):
    (process,) = ranks(TRAIN, by_hand(3, 0), notice_soon)
    process.wait_for("waiting for 2 of 3 ranks at 127.0.0.1:")
    os.kill(process.process.pid, signal.SIGINT)
    assert process.code() == 130
    assert process.text.endswith("interrupted\n") and "Traceback" not in process.text


def test_a_signal_to_one_waiting_rank_ends_the_others(ranks, tmp_path):
    job = ranks([*TRAIN, "--save", tmp_path / "run"], by_hand(4, 0, 1, 2), notice_soon)
    job[0].wait_for("waiting for 1 of 4 ranks at 127.0.0.1:")
    job[0].wait_for("(missing: 3)")
    os.kill(job[1].process.pid, signal.SIGTERM)
    assert [process.code() for process in job] == [1, -signal.SIGTERM, 1]
    assert f"Rank 1 on {socket.gethostname()} failed: Stopped by a signal" in job[0].text
    assert job[2].text == ""


def sleep_while_looking(rank):
    """Delay rank 1 at start."""
    original = assemble.find_start

    def slow(*args):
        print("looking", flush=True)
        if rank == 1:
            time.sleep(600)
        return original(*args)

    assemble.find_start = slow


def test_a_signal_ends_a_rank_that_waits_in_a_collective_at_start(ranks, tmp_path):
    args = [*TRAIN, "--save", tmp_path / "run", "--distributed-timeout-minutes", 0.1]
    job = ranks(args, by_hand(2), sleep_while_looking)
    for process in job:
        process.wait_for("looking")
    time.sleep(0.5)
    os.kill(job[0].process.pid, signal.SIGTERM)
    assert job[0].code() == -signal.SIGTERM
    assert job[1].code() == 1
    assert status(tmp_path / "run")["status"] == "signal"


def test_an_error_of_the_command_line_is_printed_once(ranks):
    job = ranks([*TRAIN, "--hiden-size", 3], by_hand(4))
    assert [process.code() for process in job] == [1] * 4
    text = "".join(process.text for process in job)
    assert text.count("--hiden-size") == 1 and text.count("Error") == 1, text


def test_help_is_printed_once(ranks):
    job = ranks(["train", "--help"], by_hand(2))
    assert [process.code() for process in job] == [0, 0]
    assert "--num-layers" in job[0].text and job[1].text == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--load", "{tmp}/none", "--exit-on-missing-checkpoint"), "none does not exist"),
        (("--save", "/proc/nowhere"), "Cannot write to --save"),
    ],
)
def test_an_error_that_all_ranks_agree_on_is_printed_once(ranks, tmp_path, args, message):
    job = ranks([*TRAIN, *(word.format(tmp=tmp_path) for word in args)], by_hand(3))
    assert [process.code() for process in job] == [1] * 3
    text = "".join(process.text for process in job)
    assert text.count(message) == 1 and text.count("Error") == 1, text


def broken_data(rank):
    def broken(*_, **__):
        if rank != 2:
            logging.getLogger("megatron_lite").warning("all but one warn of this")
        if rank == 1:
            logging.getLogger("megatron_lite").warning("one warns of this")
        time.sleep(0.3)
        raise ValueError("the data is broken") if rank != 2 else ValueError("something else")

    assemble.build_datasets = broken


def test_warnings_and_errors_of_several_ranks_are_printed_once(ranks):
    job = ranks(TRAIN, by_hand(3), broken_data)
    assert [process.code() for process in job] == [1] * 3
    text = "".join(process.text for process in job)
    assert text.count("all but one warn of this") == 1
    assert f"[{socket.gethostname()} rank 1] one warns of this\n" in text
    assert text.count("failed in opening the data: ValueError: the data is broken") in (1, 2), text
    assert text.count("ValueError: the data is broken") <= 4, "the first one's line and traceback, and rank 0's"


def signal_at_2(rank):
    """Send SIGTERM to rank 1, or to all ranks, in an iteration."""
    from megatron_lite.train.native import NativeEngine

    step_of = NativeEngine.train_step

    def train_step(self, plan, read, rates):
        if plan.iteration == 2 and rank in range(int(os.environ["FIRST"]), 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, plan, read, rates)

    NativeEngine.train_step = train_step


@pytest.mark.parametrize("alone", [False, True])
def test_a_signal_is_announced_once(ranks, alone):
    variables = [{**mine, "FIRST": "1" if alone else "0"} for mine in by_hand(2)]
    job = ranks([*TRAIN, "--train-iters", 9], variables, signal_at_2)
    assert [process.code() for process in job] == [0, 0]
    notices = ["SIGTERM received: finishing this" in process.text for process in job]
    assert notices == [not alone, False]
    where = f" (on {socket.gethostname()}, rank 1)" if alone else ""
    assert f"exiting program after receiving SIGTERM{where}\n" in job[1].text


def test_an_unknown_address_ends_all_at_once(ranks):
    torchrun = {"MASTER_ADDR": "no-such-host.invalid", "TORCHELASTIC_RUN_ID": "gpt"}
    job = ranks(TRAIN, [{**mine, **torchrun} for mine in by_hand(2)])
    assert [process.code() for process in job] == [1, 1]
    assert "MASTER_ADDR=no-such-host.invalid cannot be resolved on" in job[0].text and "Set MASTER_ADDR" in job[0].text
    assert job[1].text == "" and len(job[0].text.splitlines()) == 1


def test_one_process_starts_both_ranks(ranks, tmp_path):
    (job,) = ranks([*TRAIN, "--save", tmp_path / "run", "--ranks-per-task", 2], [{}])
    assert job.code() == 0, job.text
    assert "starting 2 ranks: 0 to 1 of 2" in job.text
    assert job.text.count("training is complete after 2 iterations") == 1
    assert "machine     2 ranks" in job.text
    assert status(tmp_path / "run")["status"] == "completed"


def test_the_ranks_of_one_process_print_an_error_once(ranks, tmp_path):
    (job,) = ranks([*TRAIN, "--ranks-per-task", 2, "--tensor-model-parallel-size", 3], [{}])
    assert job.code() == 1
    assert job.text.count("ConfigError") == 1, job.text


def test_torchrun_starts_all_ranks_itself(ranks, tmp_path):
    (job,) = ranks([*TRAIN, "--ranks-per-task", 2], by_hand(1))
    assert job.code() == 1
    assert "--ranks-per-task 2 is given, but torchrun starts all ranks itself" in job.text


def test_a_dry_run_counts_the_ranks_that_a_task_starts(ranks):
    (job,) = ranks([*TRAIN, "--ranks-per-task", 2, "--dry-run"], step(0, 2)[:1])
    assert job.code() == 0
    assert "4 ranks" in job.text, job.text


@pytest.mark.parametrize(("tasks", "count"), [(1, 4), (2, 2)])
def test_the_only_task_of_a_node_starts_a_rank_for_each_gpu(tasks, count, ranks):
    variables = {**step(0, tasks)[0], "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    (job,) = ranks([*TRAIN, "--device", "auto", "--dry-run"], [variables])
    assert job.code() == 0
    assert f"{count} ranks" in job.text, job.text
