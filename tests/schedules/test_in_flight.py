"""Tests of the tensors that ranks hold under each pipeline schedule."""

from itertools import product
from typing import get_args

import pytest

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules import in_flight
from megatron_lite.schedules.in_flight import MAX_SENDS, held_states
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import SPLIT_BACKWARD, pipeline_schedule
from megatron_lite.schedules.simulate import peak_activations

CHUNKS = {"interleaved": (2, 3), "zb-v": (2,)}


def most(states):
    """Most micro-batches whose activations are held: saved or deferred, and the one that is computed."""
    return max(sum(state.saved) + sum(state.deferred) + 1 for state in states)


@pytest.mark.parametrize("kind", get_args(PipelineKind))
def test_micro_batches_in_flight_are_those_of_the_simulation(kind):
    for chunks in CHUNKS.get(kind, (1,)):
        for pp in (1, 2, 3, 4) if kind != "interleaved" else (2, 3, 4):
            for microbatches in (1, 2, pp + 1, 3 * pp, 5 * pp + 1):
                program = lower(pipeline_schedule(kind, pp, microbatches, chunks), kind, chunks)
                peaks = [peak_activations(actions, kind in SPLIT_BACKWARD) for actions in program]
                held = held_states(kind, pp, microbatches, chunks)
                assert [most(states) for states in held] == peaks, (pp, microbatches, chunks)


def test_a_long_iteration_needs_no_long_simulation(monkeypatch):
    """The first rounds have the states of all."""
    for kind, pp in product(("1f1b", "zb-h1", "zb-v"), (1, 2, 3, 6)):
        held_states.cache_clear()
        short = held_states(kind, pp, 40, 2 if kind == "zb-v" else 1)
        with monkeypatch.context() as patch:
            patch.setattr(in_flight, "_simulated", lambda kind, pp, microbatches: microbatches)
            held_states.cache_clear()
            assert [set(states) for states in held_states(kind, pp, 40, 2 if kind == "zb-v" else 1)] == [
                set(states) for states in short
            ]
    held_states.cache_clear()
    saved = max(sum(state.saved) for state in held_states("gpipe", 2, 1_000_000)[0])
    assert saved == 1_000_000 - 1


def test_messages_wait_and_are_sent():
    first, last = held_states("1f1b", 2, 8)
    assert max(state.messages for state in first) == MAX_SENDS
    assert all(state.messages <= MAX_SENDS + 1 for state in (*first, *last))
    assert held_states("1f1b", 1, 8)[0][0].messages == 0
    assert held_states("1f1b", 4, 0) == ((), (), (), ())
