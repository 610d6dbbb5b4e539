"""Fixtures of the tests on a Slurm cluster: the cluster, a dataset, and the run without interruption."""

import fcntl
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
def stopped_cluster():
    """The cluster, of which no other test session makes use; where Slurm cannot start, the tests fail."""
    cluster = Cluster(FOLDER, prefix="mltest")
    cluster.check()
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cluster


@pytest.fixture(scope="session")
def small_disk(stopped_cluster):
    """A file system with room for two checkpoints."""
    subprocess.run(("umount", "--lazy", SMALL_DISK), check=False, capture_output=True)
    SMALL_DISK.mkdir(exist_ok=True)
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", SMALL_DISK), check=True)
    yield SMALL_DISK
    subprocess.run(("umount", "--lazy", SMALL_DISK), check=True)
    SMALL_DISK.rmdir()


@pytest.fixture(scope="session")
def cluster(stopped_cluster, small_disk):
    """The running cluster. Nodes see the disks that are mounted before they start."""
    stopped_cluster.start()
    os.environ["PYTHONPATH"] = str(ROOT)
    yield stopped_cluster
    stopped_cluster.stop()


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
