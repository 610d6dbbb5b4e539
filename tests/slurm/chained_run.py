"""A chained run of the quickstart's model at toy size on the test cluster: 2 nodes x 2 ranks, tensor 2 x data 2."""

import json
import os
import re
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

from megatron_lite.ops.chain_state import read_chain
from megatron_lite.runs.metrics_file import read_records

ITERATIONS = 80
SAVE_INTERVAL = 10
WAIT_SECONDS = 240
PROGRAM = Path(__file__).with_name("paced_training.py")

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name} --nodes=2 --ntasks-per-node=2 --time=5 --requeue
#SBATCH --output={folder}/job-%j.out

srun --kill-on-bad-exit=1 {python} {program} {dataset} \\
    --num-layers 2 --hidden-size 48 --num-attention-heads 6 --seq-length 32 --max-position-embeddings 32 \\
    --attention-dropout 0 --hidden-dropout 0 --tensor-model-parallel-size 2 \\
    --micro-batch-size 2 --global-batch-size 8 --train-iters {iterations} --log-interval 1 \\
    --eval-interval 40 --eval-iters 2 \\
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95 \\
    --save {save} --load {save} --save-interval {interval} {flags}
"""


class ChainedRun:
    """One run, its job script and its chain.

    Args:
        cluster: the cluster.
        folder: for the script, the output of the jobs and the --save folder.
        name: of the jobs.
        dataset: flags of dataset and tokenizer.
        save: the --save folder; None: a folder in `folder`.
        flags: further flags of the training.
    """

    def __init__(self, cluster, folder, name, dataset, *, save=None, flags=""):
        self.cluster = cluster
        self.folder = folder
        self.name = name
        self.save = save or folder / "run"
        self.script = folder / "job.slurm"
        values = {"name": name, "folder": folder, "python": sys.executable, "program": PROGRAM, "dataset": dataset}
        values |= {"iterations": ITERATIONS, "save": self.save, "interval": SAVE_INTERVAL, "flags": flags}
        self.script.write_text(SCRIPT.format(**values), encoding="utf-8")

    def submit(self, *options, pace=0.0):
        """Submit the chain with options of sbatch, iterations taking `pace` seconds at least."""
        self.pace(pace)
        return self.slurm("submit", "--chain", f"--sbatch={' '.join(options)}", self.script)

    def slurm(self, *arguments):
        """Run `megatron-lite slurm …` on the controller's host; return its output."""
        command = (sys.executable, "-m", "megatron_lite", "slurm", *map(str, arguments))
        return self.cluster.run(*command, cwd=self.folder)

    def pace(self, seconds):
        """Set the seconds that an iteration takes at least; 0: full speed."""
        if seconds:
            (self.folder / "pace").write_text(str(seconds), encoding="utf-8")
        else:
            (self.folder / "pace").unlink(missing_ok=True)

    def status(self):
        """Return `slurm status --json`."""
        return json.loads(self.slurm("status", "--json", self.save))

    @property
    def chain(self):
        """State of the chain."""
        return read_chain(self.save)

    @property
    def outcomes(self):
        """How the starts of jobs ended, oldest first."""
        return [outcome.status for outcome in self.chain.outcomes]

    @property
    def job(self):
        """Number of the job that runs or ran last."""
        return self.chain.job.job

    def queue(self):
        """Return the states of the chain's jobs in the queue."""
        return self.cluster.run("squeue", "-h", f"--name={self.name}", "-o", "%T").split()

    def ticks(self):
        """Return (job, restart, iteration) of each iteration, in the order in which they were computed."""
        log = self.folder / "iterations.log"
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        return [tuple(map(int, line.split())) for line in text.splitlines()]

    def wait_for(self, condition, what, seconds=WAIT_SECONDS):
        """Wait until a function returns true.

        Raises:
            AssertionError: it does not, with the output of all jobs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.name}: no {what} within {seconds} s\n{self.report()}"
            time.sleep(0.5)

    def wait_for_iteration(self, iteration, *, starts=1):
        """Wait until an iteration is finished by the given start of a job (1: the first)."""

        def reached():
            ticks = self.ticks()
            return len({tick[:2] for tick in ticks}) >= starts and ticks[-1][2] >= iteration

        self.wait_for(reached, f"iteration {iteration} of start {starts}")

    def wait_until_complete(self, seconds=WAIT_SECONDS):
        """Wait until the chain has ended, and check that the run is complete."""
        self.wait_until_ended(seconds)
        assert (self.chain.state, self.chain.outcomes[-1].iteration) == ("completed", ITERATIONS), self.report()

    def wait_until_ended(self, seconds=WAIT_SECONDS):
        """Wait until the chain has ended and none of its jobs is in the queue."""
        self.wait_for(lambda: self.chain.state != "active" and not self.queue(), "end of the chain", seconds)

    def losses(self):
        """Return the loss of each iteration with all its digits."""
        records = [record for record in read_records(self.save / "metrics.jsonl") if record["kind"] == "iteration"]
        assert [record["iteration"] for record in records] == list(range(1, ITERATIONS + 1))
        return [record["losses"]["lm loss"] for record in records]

    def assert_one_at_a_time(self):
        """Assert that no two starts of jobs trained at the same time, by their iterations and Slurm's records."""
        starts = [tick[:2] for tick in self.ticks()]
        changes = [start for place, start in enumerate(starts) if place == 0 or starts[place - 1] != start]
        assert len(changes) == len(set(changes)), f"interleaved: {changes}"
        log = (self.cluster.folder / "log" / "jobcomp.txt").read_text(encoding="utf-8")
        # A job that was cancelled before it started has no nodes.
        pattern = rf"Name={self.name} .*?StartTime=(\S+) EndTime=(\S+) NodeList=n\["
        times = sorted(match.groups() for match in re.finditer(pattern, log))
        assert len(times) >= len(changes)
        assert all(end <= start for (_, end), (start, _) in pairwise(times)), times

    def processes(self, node):
        """Return the training processes of this run on a node, as this machine numbers them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    variables = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                ours = str(PROGRAM).encode() in command and str(self.save).encode() in command
                if ours and command[0] != b"srun" and f"SLURMD_NODENAME={node}".encode() in variables:
                    found.append(int(entry.name))
        return found

    def kill_rank(self, node):
        """Kill one training process on a node with SIGKILL."""
        os.kill(self.processes(node)[0], signal.SIGKILL)

    def report(self):
        """Return the state of the chain and the output of its jobs, for messages of failed tests."""
        outputs = [f"{path.name}:\n{path.read_text(encoding='utf-8')}" for path in self.folder.glob("job-*.out")]
        return "\n".join([str(self.chain), self.cluster.run("squeue", check=False), *outputs])
