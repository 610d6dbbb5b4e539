"""Fixtures of the end-to-end tests: a tiny corpus, and jobs that end with their test."""

import os

import pytest
import torch
from support.launchers import free_port
from support.trainer import Job, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return a tokenizer and two datasets (trainer.Corpus)."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Restore torch's number of threads, which jobs in this process change."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a trainer.Job (arguments, prepare function), ended with the test."""
    jobs = []

    def start_job(args, prepare=None):
        jobs.append(Job(tmp_path, args, prepare))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.process.kill()
        job.process.join()


@pytest.fixture
def ranks(tmp_path):
    """Return a function that runs one process per argument list, as ranks of one job, and returns the results."""
    jobs = []

    def start(*args, prepare=None, **variables):
        port = free_port()
        for rank, own in enumerate(args):
            folder = tmp_path / f"rank{rank}"
            folder.mkdir(exist_ok=True)

            def enter(rank=rank):
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(args), "MASTER_ADDR": "127.0.0.1"}
                names |= {"MASTER_PORT": port, **(variables if rank else {})}
                os.environ.update({name: str(value) for name, value in names.items()})
                if prepare is not None:
                    prepare(rank)

            jobs.append(Job(folder, own, enter))
        return [job.wait(120) for job in jobs[-len(args) :]]

    yield start
    for job in jobs:
        job.process.kill()
        job.process.join()
