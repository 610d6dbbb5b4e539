"""Node check before training (--check-nodes): its result in the log, the job's end and the exclude file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.trainer import assert_same_run, command, records, status

from megatron_lite.lifecycle import node_check
from megatron_lite.ops.doctor.verdict import Thresholds
from megatron_lite.train import check_nodes

pytestmark = pytest.mark.slow

SHORT = ("--train-iters", 3, "--save-interval", 3)
LOOSE = Thresholds(cpu_speed=0.0, cpu_link_speed=0.0, write_speed=0.0, rename=60.0, shm=0, free_space=0, inodes=0)


def quick(rank=None):
    """Measure for a moment; nvidia-smi fails on rank 1."""

    def query():
        if rank == 1:
            raise OSError("no driver")

    node_check.query_gpus = query
    check_nodes.fast_check = lambda plan: replace(plan, speed_seconds=0.05, written_bytes=2**16, thresholds=LOOSE)


def test_a_good_node_trains_as_without_the_check(corpus, start, tmp_path):
    checked, plain = tmp_path / "checked", tmp_path / "plain"
    result = start(corpus.job(*SHORT, "--save", checked, "--check-nodes"), quick).wait()
    assert result.code == 0, result.err
    summary = "node check of 1 rank on 1 host: no problems"
    assert result.out.count(summary) == 2, "the table, and the log"
    assert [record for record in records(checked) if record["kind"] == "message" and summary in record["text"]]
    assert command(*corpus.job(*SHORT, "--save", plain)).code == 0
    assert_same_run(checked, plain)


def test_a_bad_node_ends_the_job_and_is_excluded(corpus, ranks, tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    args = corpus.job(*SHORT, "--save", save, "--check-nodes", "--tensor-model-parallel-size", 2, "--device", "auto")
    results = ranks(args, args, prepare=quick, SLURMD_NODENAME="bad")
    assert [result.code for result in results] == [1, 1]
    assert "The node check found problems: bad rank 1: nvidia-smi failed: no driver" in results[0].err
    assert "TrainingError" not in results[1].err
    assert (save / "excluded_nodes.txt").read_text().startswith("bad  # until ")
    ended = status(save)
    assert (ended["status"], ended["host"], ended["rank"]) == ("error", "bad", 1)
