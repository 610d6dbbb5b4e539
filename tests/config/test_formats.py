import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.batch import (
    Rampup,
    SequenceRamp,
    read_amount,
    read_rampup,
    read_sequence_ramp,
    read_step_schedule,
    write_rampup,
    write_sequence_ramp,
)
from megatron_lite.config.checkpoint import SavePhase, read_save_schedule, write_save_schedule
from megatron_lite.config.data import (
    DataGroup,
    DataSource,
    read_groups,
    read_groups_file,
    read_sources,
    read_split,
    write_groups,
    write_sources,
)
from megatron_lite.config.table import flags_by_spelling
from megatron_lite.config.training import read_iterations, read_ranges, write_ranges

PATHS = st.text(st.characters(categories=["L", "N"], include_characters="/_-."), min_size=1, max_size=12)
WEIGHTS = st.floats(0, 1e6, allow_subnormal=False)
COUNTS = st.integers(1, 10**9)


@given(st.builds(Rampup, start=COUNTS, increment=COUNTS, samples=COUNTS))
def test_rampup_round_trip(rampup):
    assert read_rampup(write_rampup(rampup)) == rampup


@given(st.lists(COUNTS, min_size=1, max_size=5), st.lists(COUNTS, min_size=4, max_size=4, unique=True))
def test_save_schedule_round_trip(intervals, ends):
    ends_in_order = [*sorted(ends)[: len(intervals) - 1], 0]
    phases = tuple(
        SavePhase(interval=interval, until=until) for interval, until in zip(intervals, ends_in_order, strict=True)
    )
    assert read_save_schedule(write_save_schedule(phases)) == phases


def test_the_save_schedule_of_three_phases():
    assert read_save_schedule(["10:100 18:1000 1500"]) == (
        SavePhase(interval=10, until=100),
        SavePhase(interval=18, until=1000),
        SavePhase(interval=1500),
    )


@pytest.mark.parametrize("text", ["10 20", "10:100 20 30:400", "10:100 20 30", "x:100"])
def test_broken_save_schedules(text):
    with pytest.raises(ValueError, match=r"<interval>:<last iteration>|whole number"):
        read_save_schedule([text])


def test_a_step_schedule_counts_tokens():
    schedule = read_step_schedule("2.4B:320, 0:16 4.8B:624", 2048)
    assert schedule == ((0, 16), (2_400_000_000 // 2048, 320), (4_800_000_000 // 2048, 624))
    assert read_step_schedule("0:16 5:32", 1) == ((0, 16), (5, 32))
    # A sequence length of 0 is refused elsewhere; until then the schedule must be readable.
    assert read_step_schedule("0:16 5:32", 0) == ((0, 16), (5, 32))


@pytest.mark.parametrize(
    ("text", "match"),
    [("0:16 320", "pairs"), ("2K:16", "starts at 0"), ("0:16 1:32", "differ"), ("0:16 x:32", "number")],
)
def test_broken_step_schedules(text, match):
    with pytest.raises(ValueError, match=match):
        read_step_schedule(text, 2)


@pytest.mark.parametrize(
    ("word", "number"),
    [("2.4B", 2_400_000_000), ("3K", 3000), ("1.5t", 15 * 10**11), ("7", 7), ("1_000m", 10**9), ("1e3", 1000)],
)
def test_amounts(word, number):
    assert read_amount(word) == number


@pytest.mark.parametrize("word", ["1.5", "2.4000000001B", "B", "", "nanK", "infB", "1/2K"])
def test_amounts_that_are_not_whole_numbers(word):
    with pytest.raises(ValueError, match="number"):
        read_amount(word)


def test_ranges():
    assert read_ranges(["10-20", "2-5"]) == ((2, 5), (10, 20))
    assert read_ranges(["2-5,7"]) == ((2, 5), (7, 7))
    assert write_ranges(((2, 5), (7, 7))) == ["2-5", "7-7"]


@given(st.sets(st.integers(1, 60), min_size=1))
def test_iterations_are_gathered_into_ranges(iterations):
    ranges = read_iterations([str(number) for number in iterations])
    assert {number for first, last in ranges for number in range(first, last + 1)} == iterations
    assert all(last + 1 < first for (_, last), (first, _) in itertools.pairwise(ranges))


def test_sequence_ramp_round_trip():
    for ramp in (SequenceRamp(start=64, iterations=36000, step=8), SequenceRamp(stages=((0, 64), (100, 128)))):
        assert read_sequence_ramp(write_sequence_ramp(ramp)) == ramp
    assert read_sequence_ramp(["1:64", "100:128"]).stages == ((1, 64), (100, 128))
    assert read_sequence_ramp(["64:100"]).step == 8


def test_sequence_stages_begin_at_the_first_iteration_or_are_several():
    assert read_sequence_ramp(["0:64"]).stages == ((0, 64),)
    assert read_sequence_ramp(["1:64"]).stages == ((1, 64),)
    assert read_sequence_ramp(["2:64"]) == SequenceRamp(start=2, iterations=64)
    assert read_sequence_ramp(["5:64,1000:512"]).stages == ((5, 64), (1000, 512))
    assert read_sequence_ramp(["1:100:8"]) == SequenceRamp(start=1, iterations=100, step=8)
    assert read_sequence_ramp(["2:1"]) == SequenceRamp(start=2, iterations=1)


@pytest.mark.parametrize("text", ["64", "64:100:8:9", "0:64:8,100:128:8", "0:64,100", "64:x", "0:64,100:128:8"])
def test_broken_sequence_ramps(text):
    with pytest.raises(ValueError, match="start:iterations"):
        read_sequence_ramp([text])


@pytest.mark.parametrize(
    ("words", "split"),
    [
        (["949,50,1"], "949,50,1"),
        (["969, 30, 1"], "969,30,1"),
        (["969,", "30,", "1"], "969,30,1"),
        (["98/2/0"], "98,2,0"),
        (["100"], "100"),
        ([".9,.1"], ".9,.1"),
    ],
)
def test_splits(words, split):
    assert read_split(words) == split


@pytest.mark.parametrize("word", ["", "1,2,3,4", "1,-1", "0,0", "1,x"])
def test_broken_splits(word):
    with pytest.raises(ValueError, match=r"949,50,1|number"):
        read_split([word])


def test_sources_are_weighted_if_every_other_word_is_a_number():
    assert read_sources(["0.3", "a", "7", "b"]) == (DataSource(path="a", weight=0.3), DataSource(path="b", weight=7.0))
    assert read_sources(["a", "0.3"]) == (DataSource(path="a"), DataSource(path="0.3"))
    assert read_sources(["1"]) == (DataSource(path="1"),)
    assert read_sources([]) == ()
    assert read_sources(["1", "a", "b"]) == tuple(DataSource(path=path) for path in ("1", "a", "b"))


@given(st.lists(st.builds(DataSource, path=PATHS, weight=WEIGHTS), min_size=1, max_size=4))
def test_weighted_sources_round_trip(sources):
    assert read_sources(write_sources(tuple(sources))) == tuple(sources)


RANGES = st.sampled_from([(0.0, 1.0), (0.0, 0.6), (0.95, 1.0), (0.1, 0.2)])


@given(
    st.lists(
        st.builds(
            lambda path, weight, bounds: DataSource(path=path, weight=weight, start=bounds[0], end=bounds[1]),
            PATHS,
            st.none() | WEIGHTS,
            RANGES,
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["train", "TRAIN", "en-2"]),
)
def test_groups_round_trip(sources, name):
    groups = (DataGroup(name=name, sources=tuple(sources)), DataGroup(name="other", sources=tuple(sources)))
    assert read_groups(write_groups(groups)) == groups
    line = '"' + '" "'.join(write_groups(groups)) + '"\n'
    assert read_groups_file(line) == groups


def test_a_group_with_the_line_breaks_of_a_script():
    (group,) = read_groups(["TRAIN: 0.3 0:0.6 PATH, 1 0:0.6 PATH2"])
    assert group == DataGroup(
        name="TRAIN",
        sources=(
            DataSource(path="PATH", weight=0.3, start=0.0, end=0.6),
            DataSource(path="PATH2", weight=1.0, start=0.0, end=0.6),
        ),
    )


@pytest.mark.parametrize(
    "text",
    [
        "TRAIN 1 0:1 x",
        "T: 1 0.5:0.5 x",
        "T: 1 -0.1:0.5 x",
        "TRAIN: 1 0:1",
        "TRAIN: 1 0.6:0.2 x",
        "TRAIN: 1 0:2 x",
        "T: 1 01 x",
        "T: w 0:1 x",
    ],
)
def test_broken_groups(text):
    with pytest.raises(ValueError, match=r"START:END|number"):
        read_groups([text])


@pytest.mark.parametrize("text", ["", '"', '""', 'T: 1 0:1 x"', '"T: 1 0:1 x', '"T: 1 0:1 x"\n"U: 1 0:1 x"'])
def test_broken_groups_files(text):
    with pytest.raises(ValueError, match=r"one line of groups|START:END"):
        read_groups_file(text)


def test_a_named_group_is_a_blend_of_one_split():
    assert flags_by_spelling()["--valid-data-path"].format.read(["2", "a", "1", "b"]) == (
        DataGroup(name="valid", sources=(DataSource(path="a", weight=2.0), DataSource(path="b", weight=1.0))),
    )
