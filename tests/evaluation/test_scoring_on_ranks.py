"""Scores on several ranks: tensor, pipeline and data parallel layouts give those of one process."""

import dataclasses

import numpy as np
import pytest

from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.partition import stage_layers
from megatron_lite.evaluation.perplexity import text_spans
from megatron_lite.evaluation.scoring import Scorer, Span
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams


def spans_of(text):
    return [*text_spans(text, 10, 7), Span(text, 3, 20, 21), Span(text[:5], 0, 1, 5)]


def scores(backend, config, layouts, text):
    """Return the scores under each layout (tp, pp), as (loss, tokens, greedy)."""
    found = []
    for tp, pp in layouts:
        parallel = ParallelConfig(tp=tp, pp=pp, world_size=backend.world_size)
        mesh = build_mesh(backend, parallel)
        layers = stage_layers(config.model, parallel)[mesh.pp.rank]
        placed = dataclasses.replace(config, parallel=parallel)
        stage = GPTStage(placed, layers, mesh, RngStreams(1, backend, mesh.tp.rank))
        told = []
        found.append([dataclasses.astuple(one) for one in Scorer(stage, mesh, 2).score(spans_of(text), told.append)])
        assert mesh.dp.rank or sum(told) == 46 + 1 + 4
    return found


@pytest.mark.slow
def test_every_layout_gives_the_scores_of_one_process(on_ranks, make_scorer, small_config, text):
    wanted = [dataclasses.astuple(one) for one in make_scorer().score(spans_of(text))]
    for of_rank in on_ranks(4, scores, small_config, [(2, 2), (1, 2), (2, 1), (1, 1)], text):
        for found in of_rank:
            assert [one[1:] for one in found] == [one[1:] for one in wanted]
            np.testing.assert_allclose([one[0] for one in found], [one[0] for one in wanted], rtol=1e-5)
