"""Fixtures of the DeepSpeed tests. DeepSpeed is imported before ranks and jobs are forked from this process."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import pytest
from support.trainer import Job, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return a tokenizer and two datasets (trainer.Corpus)."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path):
    """Return a function that runs `megatron-lite …` in a child process (arguments, prepare function); its Result."""
    return lambda args, prepare=None: Job(tmp_path, args, prepare).wait()
