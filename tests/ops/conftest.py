"""Fixtures: a stand-in for Slurm's queue, and a run with a chain in it."""

from types import SimpleNamespace

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.chain import start_chain

DOWN = ConfigError("sbatch failed: Unable to contact slurm controller", fix="")


@pytest.fixture
def queue(monkeypatch):
    """A queue: the options of each job that was submitted, the state of each, and other calls."""

    queue = SimpleNamespace(options={}, states={}, comments={}, calls=[], final={}, refuse=None, down=False)

    def submit(options, script, arguments=()):
        if queue.refuse is not None:
            raise queue.refuse
        job = str(100 + len(queue.options))
        queue.options[job], queue.states[job] = list(options), "PENDING"
        return job

    def job_state(job):
        if queue.down:
            raise DOWN
        return queue.states.get(job)

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "job_state", job_state)
    monkeypatch.setattr(
        slurm,
        "queued_jobs",
        lambda jobs=(): [
            slurm.QueuedJob(job, state, comment=queue.comments.get(job, ""))
            for job in jobs or queue.states
            if (state := job_state(job))
        ],
    )
    monkeypatch.setattr(slurm, "final_state", lambda job: queue.final.get(job))
    monkeypatch.setattr(slurm, "cancel", lambda job: queue.states.pop(job, None))
    monkeypatch.setattr(slurm, "call", lambda *command: queue.calls.append(command) or "")
    monkeypatch.setattr(slurm, "node_names", frozenset)
    return queue


@pytest.fixture
def run(tmp_path, queue):
    script = tmp_path / "job.slurm"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2\n# a comment\n#SBATCH --time=20:00:00\n\nsrun train\n#SBATCH --not=this\n"
    )
    folder = tmp_path / "run"
    assert start_chain(folder, script, ["a b"], ["--partition=long"]) == "100"
    return folder
