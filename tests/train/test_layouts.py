"""Every layout trains the same model with the same loss: the matrix of layout_matrix.py on gloo ranks."""

from functools import lru_cache
from typing import get_args

import pytest
import torch
from support.layout_matrix import CELLS, LIMITS, deviation, put_together, run_cell, within
from support.parallelism_page import BEGIN, END, HEAD, PAGE, layout_words, table

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig, PipelineKind
from megatron_lite.config.runtime import RuntimeConfig

pytestmark = pytest.mark.slow

ROWS = {}
SCHEDULES = set(get_args(PipelineKind))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def outcome_of(on_ranks):
    """The outcome of a cell; a reference is run once."""
    alone = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())

    def run(cell):
        return put_together([run_cell(alone, cell)] if cell.world == 1 else on_ranks(cell.world, run_cell, cell))

    cached = lru_cache(maxsize=None)(run)
    return lambda cell: cached(cell) if cell == cell.reference() else run(cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_layout_trains_the_same_model(cell, outcome_of):
    found = deviation(outcome_of(cell), outcome_of(cell.reference()))
    ROWS[cell] = found
    assert within(found, LIMITS[cell.dtype]), found


def test_the_matrix_covers_every_choice(capsys):
    with capsys.disabled():
        print("\n" + table(ROWS.items()))

    def values(field, among=CELLS):
        return {getattr(cell, field) for cell in among}

    assert values("world") == {1, 2, 4, 8}
    assert values("tp") == values("pp") == values("dp") == {1, 2, 4, 8}
    assert values("cp") == {1, 2, 4}
    for kind in ("p2p", "all_gather"):
        found = [cell for cell in CELLS if cell.cp > 1 and cell.exchange == kind]
        assert values("cp", found) == {2, 4} and values("documents", found) == {True, False}
        assert values("model", found) >= {"llama"} and "all" in values("dropout", found)
    assert values("recompute") == {"", "full", "selective"}
    assert values("dropout") == {"", "hidden", "all"}
    for flag in (True, False):
        assert values("schedule", [cell for cell in CELLS if cell.zero1 is flag]) >= SCHEDULES - {"gpipe"}
        assert values("schedule", [cell for cell in CELLS if cell.sequence_parallel is flag]) >= SCHEDULES - {"gpipe"}
    for model in ("gpt2", "llama", "bloom"):  # learned and tied, rotary and untied, ALiBi
        found = [cell for cell in CELLS if cell.model == model]
        assert values("schedule", found) >= {"1f1b", "interleaved", "zb-h1"}
        assert max(values("tp", found)) >= 4 and max(values("pp", found)) >= 2 and max(values("dp", found)) >= 2


def test_the_page_shows_this_matrix():
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    shown = [tuple(word.strip() for word in line.strip("| ").split("|")) for line in lines[2:]]
    width = len(HEAD)
    assert [line[:width] for line in shown] == [layout_words(cell) for cell in CELLS]
