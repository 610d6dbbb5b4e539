"""Collective error handling: one rank's failure is raised by every rank, with its class."""

import pytest

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.group import LocalGroup
from megatron_lite.errors import CheckpointError, ConfigError, ConfigErrors, DataError, TrainingError, failed_rank
from megatron_lite.runs.manifest import CorruptCheckpointError

FAILURES = {
    "corrupt": CorruptCheckpointError("File 3 is damaged", fix="Restore it", rule="Files have checksums"),
    "data": DataError("No such dataset", fix="Name another"),
    "config": ConfigErrors([ConfigError("Bad --lr", fix="Use a number"), ConfigError("Bad --seed", fix="Use 1")]),
    "other": OSError("disk gone"),
}


def fail(backend, name, failing):
    """Return the class, text and first failed rank of the error that this rank raises; the result if it raises none."""

    def step():
        if backend.rank == failing:
            raise FAILURES[name]
        return backend.rank

    world = backend.new_group("world", ((0, 1),))
    try:
        return broadcast_from_rank0(world, step) if failing == 0 else run_on_all_ranks(world, step)
    except Exception as error:
        first = failed_rank(error)
        return type(error).__name__, str(error), None if first is None else first.rank


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("name", "kind"), [("corrupt", CorruptCheckpointError), ("data", DataError), ("config", ConfigError)]
)
def test_every_rank_raises_the_class_of_the_first_failure(on_ranks, name, kind, failing):
    raised = on_ranks(2, fail, name, failing)
    assert raised[0] == raised[1]
    assert raised[0][0] == kind.__name__ and raised[0][2] == failing
    text = str(FAILURES[name])
    assert f"rank {failing}: {text}" in raised[0][1]


def test_another_exception_stays_on_its_rank(on_ranks):
    own, other = on_ranks(2, fail, "other", 0)
    assert own == ("OSError", "disk gone", None)
    assert other[0] == TrainingError.__name__ and "rank 0: OSError: disk gone" in other[1] and other[2] == 0


def test_results_without_a_failure(on_ranks):
    assert on_ranks(2, fail, "", -1) == [0, 1]
    assert broadcast_from_rank0(LocalGroup("world"), lambda: 5) == 5


def test_one_rank_raises_its_own_error():
    error = CheckpointError("Gone", fix="Restore it")

    def step():
        raise error

    with pytest.raises(CheckpointError) as raised:
        run_on_all_ranks(LocalGroup("world"), step)
    assert raised.value is error
