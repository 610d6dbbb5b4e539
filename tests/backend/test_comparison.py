"""Tests of the comparison of values over ranks: differences, names of ranks, and the errors of each rank."""

import re
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.backend.comparison import (
    MAX_LINES,
    MAX_TEXT,
    Comparison,
    RankValues,
    compare_over_store,
    describe_ranks,
    difference_line,
    find_differences,
    reference_value,
)
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.numerics import MACHINES, VARIABLES, machine_values
from megatron_lite.errors import DataError, RankDifferenceError, TrainingError, failed_rank
from megatron_lite.formatting import MAX_RANGES

PLAIN = Comparison(
    topic="test",
    problem="Arguments differ between ranks",
    fix="Start all ranks with the same arguments",
    warn=frozenset({"name"}),
)


def ranks_values(*values, hosts=None, failures=None):
    """Return the values of each rank; eight ranks per host."""
    return [
        RankValues(f"n{rank // 8}", value, failure=failures[rank] if failures else "")
        for rank, value in enumerate(values)
    ]


def test_one_node_of_a_big_job_differs():
    values = [{"lr": "--lr 0.001" if rank // 8 == 2 else "--lr 0.0001", "seed": "--seed 1"} for rank in range(256)]
    differences = find_differences(ranks_values(*values), PLAIN)
    assert differences.errors == ["--lr 0.001 on ranks 16-23 (n2), --lr 0.0001 on the other 248 ranks"]
    assert (differences.rank, differences.differing, differences.warnings) == (16, ["lr"], [])


def test_rank_0_may_differ_from_the_majority():
    differences = find_differences(ranks_values({"a": "a 1"}, {"a": "a 2"}, {"a": "a 2"}), PLAIN)
    assert differences.errors == ["a 1 on rank 0 (n0), a 2 on the other 2 ranks"]
    assert differences.rank == 0


def test_without_a_majority_rank_0_is_the_reference():
    differences = find_differences(ranks_values({"a": "a 1"}, {"a": "a 2"}), PLAIN)
    assert differences.errors == ["a 2 on rank 1 (n0), a 1 on rank 0 (n0)"]


def test_every_rank_has_another_value():
    differences = find_differences(ranks_values(*({"seed": f"--seed {rank}"} for rank in range(32))), PLAIN)
    assert differences.errors == [
        "--seed 1 on rank 1 (n0), --seed 2 on rank 2 (n0), --seed 3 on rank 3 (n0), --seed 4 on rank 4 (n0), "
        "27 other values on ranks 5-31 (n0, n1, n2, n3), --seed 0 on rank 0 (n0)"
    ]


def test_warnings_and_notes_are_no_errors():
    comparison = Comparison(topic="t", problem="", fix="", warn=frozenset({"name"}), note=frozenset({"paths"}))
    differences = find_differences(
        ranks_values({"name": "A100", "paths": "/a"}, {"name": "H100", "paths": "/b"}), comparison
    )
    assert differences.errors == []
    assert differences.warnings == ["H100 on rank 1 (n0), A100 on rank 0 (n0)"]
    assert differences.differing == ["name", "paths"]


def test_a_missing_value_is_not_compared():
    assert find_differences(ranks_values({"a": "1"}, {}, {"a": "1"}), PLAIN).errors == []


def test_details_are_shown_and_not_compared():
    same = [RankValues("n0", {"data": "data abc"}, {"data": path}) for path in ("/one", "/two")]
    assert find_differences(same, PLAIN).errors == []
    other = [RankValues("n0", {"data": f"data {text}"}, {"data": "/path"}) for text in ("abc", "def")]
    assert find_differences(other, PLAIN).errors == ["data def (/path) on rank 1 (n0), data abc (/path) on rank 0 (n0)"]


def test_failures_of_some_ranks_name_them_and_failures_of_all_are_common():
    some = find_differences(ranks_values({}, {}, failures=["", "no file"]), PLAIN)
    assert (some.errors, some.common_failure, some.rank) == (["rank 1 (n0): no file"], False, 1)
    every = find_differences(ranks_values({}, {}, failures=["no file", "no file"]), PLAIN)
    assert (every.errors, every.common_failure) == (["all ranks: no file"], True)
    two = find_differences(ranks_values({}, {}, failures=["no file", "no disk"]), PLAIN)
    assert not two.common_failure and len(two.errors) == 2
    unchecked = [RankValues("n0", {}, failure="no file"), RankValues("n0", {}, checked=False)]
    assert find_differences(unchecked, PLAIN).common_failure


def test_mixed_checkouts_are_an_error():
    differences = find_differences(
        ranks_values(*({"code": f"code {'old' if rank == 1 else 'new'}"} for rank in range(3))), PLAIN
    )
    assert differences.errors == ["code old on rank 1 (n0), code new on the other 2 ranks"]


def test_long_values_are_cut_around_their_first_difference():
    one, two = ("--data-path " + "1 PATH " * 500 + tail + " 1 PATH" * 500 for tail in ("0.25", "0.75"))
    line = difference_line({one: [0], two: [1]}, one, ["n0", "n1"])
    assert len(line) < 2 * MAX_TEXT + 100
    assert line.count("--data-path …") == 2 and "0.25" in line and "0.75" in line


numbers = st.lists(st.integers(0, 4), min_size=2, max_size=80)


@given(numbers)
def test_the_summary_names_every_differing_rank_once(choices):
    """A line gives every rank with another value than the reference, under its value, and no other rank."""
    hosts = [f"n{rank // 8}" for rank in range(len(choices))]
    found = {}
    for rank, choice in enumerate(choices):
        found.setdefault(f"v{choice}", []).append(rank)
    differences = find_differences(ranks_values(*({"v": f"v{choice}"} for choice in choices)), PLAIN)
    if len(found) == 1:
        assert differences.errors == [] and differences.differing == []
        return
    reference = reference_value(found)
    largest = max(map(len, found.values()))
    assert len(found[reference]) == largest if 2 * largest > len(choices) else reference == f"v{choices[0]}"
    (line,) = differences.errors
    parts = dict(re.findall(r"(v\d) on ranks? ([^()]+) \(", line))
    for text, ranks in found.items():
        if text == reference:
            continue
        named, _, more = parts[text].partition(" and ")
        shown = [rank for word in named.split(", ") for rank in span(word)]
        assert shown == ranks[: len(shown)]
        assert len(shown) + int(more.split()[0] if more else 0) == len(ranks)
    assert differences.rank == min(ranks[0] for text, ranks in found.items() if text != reference)
    assert set(re.findall(r"n\d+", line.rpartition(f"{reference} on")[0])) <= set(hosts)


def span(word):
    first, _, last = word.partition("-")
    return range(int(first), int(last or first) + 1)


@given(st.sets(st.integers(0, 99), min_size=1))
def test_ranks_are_named_by_ranges(ranks):
    text = describe_ranks(sorted(ranks), ["host"] * 101)
    assert text.startswith("rank " if len(ranks) == 1 else "ranks ")
    assert text.endswith(" (host)")
    assert text.count(",") < MAX_RANGES


def run_ranks(values, comparison=PLAIN, failures=None, hosts=("n1", "n2", "n3", "n4")):
    """Return what compare_over_store returned or raised on each rank; ranks are threads over one store."""
    store, results = dist.HashStore(), [None] * len(values)

    def rank(number):
        launch = Launch(rank=number, world_size=len(values), host=hosts[number])
        try:
            results[number] = compare_over_store(
                store, launch, comparison, values[number], failure=failures[number] if failures else None
            )
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_all_ranks_raise_and_rank_0_prints():
    errors = run_ranks([{"a": "--a 1"}, {"a": "--a 1"}, {"a": "--a 2"}])
    assert [type(error) for error in errors] == [RankDifferenceError] * 3
    assert len({str(error) for error in errors}) == 1
    assert (
        str(errors[0]) == "Arguments differ between ranks:\n  --a 2 on rank 2 (n3), --a 1 on the other 2 ranks\n"
        "Start all ranks with the same arguments"
    )
    assert [error.silent for error in errors] == [False, True, True]
    assert all(error.shared for error in errors)
    assert {(failed_rank(error).rank, failed_rank(error).host) for error in errors} == {(2, "n3")}


def test_equal_values_pass_with_their_warnings():
    results = run_ranks([{"a": "1", "name": "A100"}, {"a": "1", "name": "H100"}])
    assert [differences.warnings for differences in results] == [["H100 on rank 1 (n2), A100 on rank 0 (n1)"]] * 2


def test_a_failure_of_one_rank_is_raised_by_all():
    failure = DataError("No file /x", fix="Copy it")
    errors = run_ranks([{}, {}], failures=[None, failure])
    assert [type(error) for error in errors] == [RankDifferenceError] * 2
    assert "rank 1 (n2): No file /x. Copy it" in str(errors[0])


def test_an_error_of_all_ranks_is_raised_unchanged():
    failures = [DataError("No file /x", fix="Copy it") for _ in range(2)]
    assert run_ranks([{}, {}], failures=failures) == failures
    assert [failure.silent for failure in failures] == [False, True]


def test_only_the_first_differences_are_listed():
    one, two = ({f"f{number}": f"--f{number} {rank}" for number in range(30)} for rank in range(2))
    assert f"and {30 - MAX_LINES} more differences" in str(run_ranks([one, two])[0])


def test_a_missing_rank_is_named():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(
        TrainingError, match=r"timed out after 0\.2 s: rank 0 of 3 on n1 received nothing from rank 1, rank 2"
    ):
        compare_over_store(store, Launch(rank=0, world_size=3, host="n1"), PLAIN, {})
    with pytest.raises(TrainingError, match=r"rank 1 of 3 on n1 received nothing from rank 0"):
        compare_over_store(store, Launch(rank=1, world_size=3, host="n1"), PLAIN, {}, number=1)


def test_another_kind_of_device_and_other_variables_are_errors_other_cards_a_warning():
    base = machine_values("cuda", "A100", {})
    others = {
        "cpu": machine_values("cpu", "A100", {}),
        "tf32": machine_values("cuda", "A100", {"NVIDIA_TF32_OVERRIDE": "0", "HOME": "/x"}),
        "card": machine_values("cuda", "H100", {}),
    }
    assert "--device cpu on rank 1 (n2), --device cuda on rank 0 (n1)" in str(
        run_ranks([base, others["cpu"]], MACHINES)[0]
    )
    text = str(run_ranks([base, others["tf32"]], MACHINES)[0])
    assert "NVIDIA_TF32_OVERRIDE=0 on rank 1 (n2), no NVIDIA_TF32_OVERRIDE on rank 0 (n1)" in text
    assert run_ranks([base, others["card"]], MACHINES)[0].warnings == [
        "device H100 on rank 1 (n2), device A100 on rank 0 (n1)"
    ]
    newer = {**base, "PyTorch": "PyTorch 9.0"}
    assert "PyTorch 9.0 on rank 1 (n2)" in run_ranks([base, newer], MACHINES)[0].warnings[0]


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_is_compared(name):
    assert machine_values("cpu", "x", {name: "1"})[name] == f"{name}=1"
