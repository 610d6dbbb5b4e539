"""Ranks of a documented command, forked from this process with a launcher's environment variables."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

from support.launchers import mpirun, srun, torchrun
from support.trainer import Result, main

from megatron_lite.backend.environment import RANK_IN_TASK, RANKS_PER_TASK

# Fork starts a rank in 0.1 s, an interpreter with torch in 3 s.
_FORK = multiprocessing.get_context("fork")
TIMEOUT = 120
LAUNCHERS = {"torchrun": torchrun, "srun": srun, "mpirun": mpirun, "mpiexec": mpirun}
STARTERS = ("train", "generate", "evaluate", "doctor")  # commands that start ranks themselves


def run_on_ranks(args, variables, stdin=""):
    """Run `megatron-lite …` on several ranks.

    Args:
        args: the command line.
        variables: environment variables of each rank.
        stdin: standard input of rank 0.

    Returns:
        The Result: the code of the first rank that failed, and the output of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(rank) for rank in range(len(variables))]
        ranks = [
            _FORK.Process(target=_rank, args=(args, mine, path, stdin))
            for mine, path in zip(variables, paths, strict=True)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(TIMEOUT)
            if rank.is_alive():
                rank.kill()
                rank.join()
        texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return Result(code, "".join(texts), "".join(texts) if code else "")


def _rank(args, variables, path, stdin):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.stdin = io.StringIO(stdin)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    sys.exit(main(args))


def _start_ranks(command, launch, count):
    """Fork the ranks that a command starts itself, in place of megatron_lite.backend.task_ranks.start_ranks."""
    args = command[command.index("megatron_lite") + 1 :]
    result = run_on_ranks(args, [{RANKS_PER_TASK: str(count), RANK_IN_TASK: str(rank)} for rank in range(count)])
    sys.stdout.write(result.out)
    sys.stderr.write(result.err)
    return result.code


@contextlib.contextmanager
def forked_ranks():
    """Make the commands fork the ranks that they start."""
    with contextlib.ExitStack() as patches:
        for name in STARTERS:
            patches.enter_context(mock.patch(f"megatron_lite.cli.{name}.start_ranks", _start_ranks))
        yield
