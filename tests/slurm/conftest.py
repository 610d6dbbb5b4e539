"""Fixtures of the tests on a Slurm cluster: the cluster, a dataset, and the run without interruption."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.chained_run import ChainedRun
from slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
# Fixed, so that the next start removes what a killed one left behind.
FOLDER = Path("/tmp/megatron_lite_slurm_tests")
SMALL_DISK = Path("/tmp/megatron_lite_slurm_disk")


@pytest.fixture(scope="session")
def small_disk():
    """A file system with room for two checkpoints."""
    subprocess.run(("umount", "--lazy", SMALL_DISK), check=False, capture_output=True)
    SMALL_DISK.mkdir(exist_ok=True)
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", SMALL_DISK), check=True)
    yield SMALL_DISK
    subprocess.run(("umount", "--lazy", SMALL_DISK), check=True)
    SMALL_DISK.rmdir()


@pytest.fixture(scope="session")
def cluster(small_disk):
    """A running cluster; where Slurm cannot start, the tests fail. Nodes see the disks mounted before they start."""
    cluster = Cluster(FOLDER, prefix="mltest")
    cluster.start()
    os.environ["PYTHONPATH"] = str(ROOT)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Flags of a small dataset and its tokenizer, made as in examples/quickstart.sh."""
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}/tokenizer"
    corpus = f"{folder}/corpus.jsonl"
    for command in (
        f"examples/python_corpus.py {corpus} --max-mb 1",
        f"tools/train_tokenizer.py --input {corpus} --output {folder}/tokenizer --vocab-size 512",
        f"tools/preprocess_data.py --input {corpus} --output-prefix {folder}/python {tokenizer} --append-eod",
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run((sys.executable, *command.split()), cwd=ROOT, check=True, env=environment)
    return f"--data-path {folder}/python_text_document --split 95,4,1 {tokenizer}"


@pytest.fixture(scope="session")
def new_run(cluster, dataset, tmp_path_factory):
    """Return a function that makes a run of a given name, not submitted yet."""
    return lambda name, **options: ChainedRun(cluster, tmp_path_factory.mktemp(name), name, dataset, **options)


@pytest.fixture(scope="session")
def expected(new_run):
    """Losses of all iterations of the run without interruption."""
    run = new_run("uninterrupted")
    run.submit()
    run.wait_until_complete()
    return run.losses()
