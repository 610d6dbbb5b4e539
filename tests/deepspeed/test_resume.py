"""Checkpoints of the DeepSpeed engine: both engines load them bit for bit, and kill -9 in a save loses nothing."""

import signal
from functools import partial

import pytest
from support.deepspeed_cells import OFFLOAD, ZeroCell
from support.layout_matrix import SP, ZERO1, Cell
from support.resume import check
from support.trainer import assert_same_run, checkpoints, die_in_save

LAYOUTS = (
    Cell(dp=2, **ZERO1),
    Cell(tp=2, **SP),
    ZeroCell(dp=2, stage=0),
    ZeroCell(dp=2, stage=2, zero=OFFLOAD),
    ZeroCell(dp=2, stage=3),
    ZeroCell(tp=2, dp=2, stage=3, **SP),
)


@pytest.mark.parametrize("writer", LAYOUTS, ids=str)
def test_a_run_moves_between_engines(writer, on_ranks, tmp_path):
    check(writer, LAYOUTS, on_ranks, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_dropout_and_half_precision_resume_bit_for_bit(stage, on_ranks, tmp_path):
    cell = ZeroCell(dp=2, stage=stage, dropout="all", dtype="bf16")
    check(cell, [cell], on_ranks, tmp_path)


def test_killed_in_a_save(corpus, run, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--deepspeed", "--zero-stage", 3, "--bf16", "--train-iters", 4, "--save-interval", 2)
    assert run(corpus.job(*flags, "--save", whole)).code == 0
    args = corpus.job(*flags, "--save", broken, "--load", broken)
    for count in (1, 4, 7):
        assert run(args, partial(die_in_save, broken, count)).code == -signal.SIGKILL
    assert run(args).code == 0
    assert_same_run(whole, broken)
    assert checkpoints(broken) == ["iter_0000002", "iter_0000004"], "what the killed saves left is gone"
