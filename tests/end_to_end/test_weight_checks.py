"""--check-weight-hash-across-dp-replicas-interval: a flipped bit stops the job without a save, or is repaired."""

import socket

import pytest
import torch
from support.trainer import assert_same_run, checkpoints, records, status

pytestmark = pytest.mark.slow

CHECK = "--check-weight-hash-across-dp-replicas-interval"
NAME = "decoder.layers.0.mlp.fc1.weight"


def job(corpus, save, *args):
    return corpus.job(
        *("--train-iters", 6, "--save", save, "--load", save, "--save-interval", 2, "--eval-interval", 2),
        *("--distributed-timeout-minutes", 0.5, *args),
    )


def flip_after(iteration, on):
    """Flip a bit of rank `on` after an iteration."""

    def prepare(rank):
        from megatron_lite.train.native import NativeEngine

        step = NativeEngine.train_step

        def broken(self, plan, read, rates):
            pending = step(self, plan, read, rates)
            if rank == on and plan.iteration == iteration:
                self.buffers.finish_gather()
                (parameter,) = (p for p in self.buffers.parameters if p.name == NAME)
                parameter.param.data.view(-1).view(torch.int32)[7] ^= 1 << 4
            return pending

        NativeEngine.train_step = broken

    return prepare


@pytest.fixture
def clean(corpus, ranks, tmp_path):
    save = tmp_path / "clean"
    results = ranks(*[job(corpus, save, CHECK, 1)] * 2)
    assert [result.code for result in results] == [0, 0], results
    for iteration in range(1, 7):
        assert f">>> Weight hashes match after {iteration} iterations..." in results[1].out
    return save


def test_a_difference_ends_the_job_with_nothing_saved(corpus, ranks, tmp_path):
    save = tmp_path / "run"
    args = job(corpus, save, CHECK, 2, "--use-distributed-optimizer")
    results = ranks(args, args, prepare=flip_after(4, on=1))
    assert [result.code for result in results] == [1, 1], results
    assert results[0].err.count("TrainingError") == 1 and "TrainingError" not in results[1].err
    where = f"{NAME} on rank 1 ({socket.gethostname()}), unlike rank 0"
    assert f"differ after iteration 4: 1 replicated parameter differs between ranks: {where}" in results[0].err
    assert "from a checkpoint of iteration 2 or earlier" in results[0].err
    assert checkpoints(save) == ["iter_0000002"]
    ended = status(save)
    assert (ended["status"], ended["iteration"], ended["rank"]) == ("error", 4, 1)
    assert where in ended["message"]


def test_a_repaired_run_equals_one_without_difference(corpus, ranks, tmp_path, clean):
    save = tmp_path / "run"
    args = job(corpus, save, CHECK, 1, "--on-weight-mismatch", "repair")
    results = ranks(args, args, prepare=flip_after(3, on=1))
    assert [result.code for result in results] == [0, 0], results
    warning = f"WARNING: after iteration 3, 1 replicated parameter differs between ranks: {NAME} on rank 1"
    assert warning in results[1].out
    assert any(warning in record.get("text", "") for record in records(save))
    assert_same_run(save, clean)


def test_checks_can_change_on_resume(corpus, ranks, tmp_path, clean):
    save = tmp_path / "run"
    for args in (("--exit-interval", 4, CHECK, 2), ()):
        results = ranks(*[job(corpus, save, *args)] * 2)
        assert [result.code for result in results] == [0, 0], results
    assert_same_run(save, clean)
