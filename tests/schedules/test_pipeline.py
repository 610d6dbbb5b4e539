from __future__ import annotations

from typing import get_args

import pytest

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.errors import ConfigError
from megatron_lite.schedules.pipeline import (
    Action,
    num_stages,
    pipeline_schedule,
    rank_of_stage,
    stage_of_chunk,
)


def written(schedule):
    return [" ".join(map(str, actions)) for actions in schedule]


def test_gpipe():
    assert written(pipeline_schedule("gpipe", 2, 3)) == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]


def test_1f1b():
    assert written(pipeline_schedule("1f1b", 3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_interleaved_is_megatrons_order_for_whole_rounds():
    # Figure 4 of arXiv:2104.04473 for two ranks: rank 0 warms up with 2(p-1) + (v-1)p = 4 forwards.
    assert written(pipeline_schedule("interleaved", 2, 4, 2)) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


def test_zb_h1_defers_weight_gradients_by_the_rank():
    assert written(pipeline_schedule("zb-h1", 2, 3)) == [
        "0F0 0F1 0B0 0W0 0F2 0B1 0W1 0B2 0W2",
        "1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1W2",
    ]


def test_zb_v_starts_as_in_the_paper():
    first, last = written(pipeline_schedule("zb-v", 2, 4))
    assert first.startswith("0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 0F3 0B0 0W0 3F2 3B2 3W2")
    assert last.startswith("1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1")


def test_one_rank_alternates_forward_and_backward():
    assert written(pipeline_schedule("1f1b", 1, 2)) == ["0F0 0B0 0F1 0B1"]
    assert written(pipeline_schedule("zb-h1", 1, 2)) == ["0F0 0B0 0W0 0F1 0B1 0W1"]


@pytest.mark.parametrize("pp", [1, 2, 5])
def test_interleaved_with_one_chunk_is_1f1b(pp):
    for m in range(12):
        assert pipeline_schedule("interleaved", pp, m, 1) == pipeline_schedule("1f1b", pp, m)


@pytest.mark.parametrize("kind", get_args(PipelineKind))
def test_stage_of_chunk_and_rank_of_stage_are_inverse(kind):
    pp, chunks = 4, {"interleaved": 3, "zb-v": 2}.get(kind, 1)
    held = [(rank, chunk, stage_of_chunk(kind, pp, rank, chunk)) for rank in range(pp) for chunk in range(chunks)]
    assert sorted(stage for _, _, stage in held) == list(range(num_stages(kind, pp, chunks)))
    for rank, _, stage in held:
        assert rank_of_stage(kind, pp, stage) == rank


def test_zb_v_stages_form_a_v():
    assert [rank_of_stage("zb-v", 3, stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]


def test_an_action_is_printed_in_the_published_notation():
    assert str(Action("F", 2, 0)) == "2F0"
    assert str(Action("SEND_B", 1, 7, peer=0)) == "1SEND_B7"


@pytest.mark.parametrize(("pp", "m", "chunks"), [(0, 1, 1), (2, -1, 1), (2, 1, 0)])
def test_impossible_sizes_are_refused(pp, m, chunks):
    with pytest.raises(ConfigError, match="Cannot schedule"):
        pipeline_schedule("interleaved", pp, m, chunks)


@pytest.mark.parametrize(("kind", "chunks"), [("1f1b", 2), ("zb-h1", 2), ("zb-v", 3)])
def test_unsupported_chunks_are_refused(kind, chunks):
    with pytest.raises(ConfigError, match=r"does not support \d model chunks on each rank"):
        pipeline_schedule(kind, 4, 8, chunks)
