"""The tiny corpus that all end-to-end tests read, and the way to start jobs that do not outlive their test."""

import pytest
import torch
from trainer import Job, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tokenizer and two datasets: see trainer.Corpus."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Jobs in this process set torch's threads; other tests keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path):
    """Starts a trainer.Job from its words and a function to prepare it; it does not outlive the test."""
    jobs = []

    def start_job(words, prepare=None):
        jobs.append(Job(tmp_path, words, prepare))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.process.kill()
        job.process.join()
