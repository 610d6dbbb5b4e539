"""Pools of gloo ranks for tests: processes forked once that run many test functions.

A test passes a module-level function, which is called as function(backend, *args) on every rank; the results are
returned, one per rank. Arguments and results are pickled: tensors by value, functions by name.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from multiprocessing import connection, util
from pathlib import Path

import torch
from torch.distributed import ProcessGroupGloo, distributed_c10d

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig

# Fork starts 8 ranks in 1 s, spawn in 10 s: torch is already imported.
_FORK = multiprocessing.get_context("fork")
# Each gloo group keeps two threads for as long as the process lives: a pool with the groups of many tests is replaced.
MOST_THREADS = 240


class RankError(AssertionError):
    """Failure of a rank; the message is its traceback."""


class Ranks:
    """Pool of `world_size` gloo ranks on this machine.

    Args:
        world_size: number of ranks.
        store: path of the rendezvous file, which must not exist yet.
    """

    def __init__(self, world_size, store):
        self.world_size = world_size
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            here, there = _FORK.Pipe()
            inherited = [*self.pipes, here]
            process = _FORK.Process(target=_serve, args=(rank, world_size, store, there, inherited), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    @property
    def alive(self):
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    @property
    def crowded(self):
        """Whether the groups of earlier tests take more than MOST_THREADS."""
        tasks = Path(f"/proc/{self.processes[0].pid}/task")
        return tasks.is_dir() and len(list(tasks.iterdir())) > MOST_THREADS

    def run(self, function, *args, timeout=240.0):
        """Call function(backend, *args) on every rank; return the results in order of ranks."""
        job = pickle.dumps((function, args))
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send_bytes(job)
        results, deadline = {}, time.monotonic() + timeout
        failure = None
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise failure or RankError(f"ranks {sorted(set(range(self.world_size)) - set(results))} hang")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    ok, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.processes[rank].join(5)
                    ok, results[rank] = False, f"died with exit code {self.processes[rank].exitcode}"
                if not ok and failure is None:
                    failure = RankError(f"rank {rank} of {self.world_size}: {results[rank]}")
                    # Other ranks may wait for the failed one in a collective: shorten their timeout.
                    deadline = min(deadline, time.monotonic() + 2.0)
        if failure is not None:
            self.close()
            raise failure
        self._signal(signal.SIGSTOP)
        return [results[rank] for rank in range(self.world_size)]

    def _signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def close(self):
        """Kill the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


class RankPools:
    """One pool of ranks per world size, started on first use and restarted after a failure."""

    def __init__(self, make_folder):
        self._make_folder = make_folder
        self._worlds = {}
        # In this process only, before multiprocessing waits at the exit for processes that are stopped.
        util.Finalize(None, self.close, exitpriority=1)

    def __call__(self, world_size, function, *args, timeout=240.0):
        """Call function(backend, *args) on `world_size` ranks; return the results in order."""
        world = self._worlds.get(world_size)
        if world is not None and (not world.alive or world.crowded):
            world.close()
            world = None
        if world is None:
            world = self._worlds[world_size] = Ranks(world_size, self._make_folder() / "store")
        return world.run(function, *args, timeout=timeout)

    def close(self):
        for world in self._worlds.values():
            world.close()


def _share_event_loop():
    """Let all gloo groups of this process share one event loop.

    By default each has its own, which wakes a hundred times a second. A loop polls while another thread holds the
    lock of a connection (gloo/transport/tcp/pair.cc, handleEvents), and often takes the processor from that thread:
    its priority is therefore lower.
    """
    device = ProcessGroupGloo.create_default_device()
    for task in Path("/proc/self/task").glob("*"):
        if "gloo" in (task / "comm").read_text():
            os.setpriority(os.PRIO_PROCESS, int(task.name), 10)

    class Sharing(ProcessGroupGloo):
        def __init__(self, store, rank, size, timeout):
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Sharing


def _serve(rank, world_size, store, pipe, inherited):
    """Main function of a rank: join the process group, then run the received functions until the pipe closes."""
    os.setpgrp()  # a hangup, which the end of a group's parent sends to groups with stopped members, is theirs alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    _share_event_loop()
    launch = Launch(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, init_method=f"file://{store}"
    )
    runtime = RuntimeConfig(device="cpu", num_threads=1)
    parallel = ParallelConfig(world_size=world_size, distributed_timeout_minutes=4, rendezvous_timeout_minutes=4)
    backend = None
    with contextlib.suppress(EOFError):
        while True:
            function, args = pickle.loads(pipe.recv_bytes())
            try:
                backend = backend or select_backend(runtime, parallel, launch)
                answer = (True, function(backend, *args))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send_bytes(pickle.dumps(answer))
    os._exit(0)
