"""Tests of collective error handling: every rank raises the first failed rank's error, of the same class."""

import threading
from types import SimpleNamespace

import pytest

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.group import LocalGroup
from megatron_lite.errors import ConfigError, ConfigErrors, DataError, TrainingError, failed_rank
from megatron_lite.runs.manifest import CorruptCheckpointError


def run_ranks(steps, function=run_on_all_ranks):
    """Return what the function returned or raised on each rank; ranks are threads."""
    values, results, barrier = [None] * len(steps), [None] * len(steps), threading.Barrier(len(steps))

    def rank(number):
        def all_gather_object(value):
            barrier.wait()
            values[number] = value
            barrier.wait()
            return list(values)

        world = SimpleNamespace(rank=number, size=len(steps), all_gather_object=all_gather_object)
        try:
            results[number] = function(world, steps[number])
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def failing(error):
    def step():
        raise error

    return step


@pytest.mark.parametrize("kind", [ConfigError, DataError, TrainingError, CorruptCheckpointError])
def test_every_rank_raises_the_first_error_with_its_class(kind):
    own = kind("index.bin is 7 bytes long", rule="It must have 8 bytes", fix="Copy it again")
    second = DataError("Another error", fix="Do something else")
    results = run_ranks([lambda: 1, failing(own), failing(second)])
    assert [type(result) for result in results] == [kind] * 3
    assert {str(error) for error in results} == {str(results[0])}
    assert "rank 1: index.bin is 7 bytes long. It must have 8 bytes. Copy it again" in str(results[0])
    assert [failed_rank(error).rank for error in results] == [1, 1, 1]
    assert results[1].__cause__.__cause__ is own


def test_a_class_with_a_constructor_of_its_own_becomes_its_base_class():
    errors = ConfigErrors([ConfigError("A", fix="B"), ConfigError("C", fix="D")])
    results = run_ranks([failing(errors), lambda: 1])
    assert [type(result) for result in results] == [ConfigError] * 2
    assert "1. A. B" in str(results[1])


def test_an_unexpected_error_stays_on_its_rank_and_ends_the_others():
    own = ZeroDivisionError("oops")
    results = run_ranks([lambda: 1, failing(own)])
    assert results[1] is own
    assert isinstance(results[0], TrainingError) and "rank 1: ZeroDivisionError: oops" in str(results[0])


def test_results_and_the_error_of_a_single_rank_are_unchanged():
    assert run_ranks([lambda: "a", lambda: "b"]) == ["a", "b"]
    assert run_ranks([lambda: "a", failing(ZeroDivisionError())], broadcast_from_rank0) == ["a", "a"]
    with pytest.raises(DataError, match=r"^Too short\. Copy it$"):
        run_on_all_ranks(LocalGroup("world"), failing(DataError("Too short", fix="Copy it")))
