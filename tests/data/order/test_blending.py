"""Blend index against a reference loop of the greedy rule: near and far samples, in any order of access."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.order import blending
from megatron_lite.data.order.blending import CHUNK, BlendIndex, counts_before, normalize


def plain_loop(weights, size):
    """Return the sources of the greedy rule, as in Megatron's C++."""
    counts = [0] * len(weights)
    order = []
    for step in range(size):
        errors = [weight * max(float(step), 1.0) - count for weight, count in zip(weights, counts, strict=True)]
        source = errors.index(max(errors))
        order.append((source, counts[source]))
        counts[source] += 1
    return order


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.001, 10), min_size=1, max_size=6), size=st.integers(1, 700))
def test_lookup_equals_the_reference_loop(weights, size):
    normalized = normalize(weights)
    index = BlendIndex(normalized)
    assert [index.lookup(sample) for sample in range(size)] == plain_loop(normalized, size)


WEIGHTS = st.one_of(
    st.lists(st.floats(0.001, 10), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.0, 1e-5, 0.1, 0.2, 1 / 3, 0.5, 1.0, 2.0]), min_size=1, max_size=6).filter(sum),
)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, sample=st.integers(40, 900), reach=st.integers(1, 39))
def test_counts_before_a_sample_are_exact_or_none(weights, sample, reach):
    """A walk of any length gives None, or the counts of the reference loop."""
    normalized = np.array(normalize(weights))
    found = counts_before(normalized, sample, reach)
    if found is not None:
        taken = [source for source, _ in plain_loop(normalized.tolist(), sample)]
        assert found.tolist() == np.bincount(taken, minlength=len(weights)).tolist()


@pytest.mark.parametrize("sources", [2, 5, 40])
def test_a_far_sample_is_reached_in_few_steps(monkeypatch, sources):
    """Without a walk from the beginning, and with the counts of a much longer walk."""
    monkeypatch.setattr(blending, "advance_chunks", None)
    normalized = np.array(normalize(np.random.RandomState(sources).uniform(0.01, 1, sources)))
    index = BlendIndex(normalized)
    chunk = 10**8 // CHUNK
    _, numbers = index.chunk(chunk)
    far = counts_before(normalized, chunk * CHUNK, 1 << 13)
    assert far is not None
    assert far.sum() == chunk * CHUNK
    assert index._starts[chunk].tolist() == far.tolist()
    assert numbers.min() >= far.min()


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights", [[0.3, 0.7], [1, 1, 1], [0.1, 0.2, 0.7], [5, 3, 1, 0.01], [0.5, 0.5], [1.0], [1e-6, 1.0], [0, 1, 2]]
)
@pytest.mark.parametrize("warm_up", [0, 8])
@pytest.mark.parametrize("reaches", [(), (16,), (8, 256)])
def test_chunks_in_any_order_equal_the_reference_loop(monkeypatch, weights, warm_up, reaches):
    monkeypatch.setattr(blending, "CHUNK", 64)
    monkeypatch.setattr(blending, "WARM_UP", warm_up)
    monkeypatch.setattr(blending, "REACHES", reaches)
    monkeypatch.setattr(blending, "STARTS", 8)
    monkeypatch.setattr(blending, "PARALLEL_CHUNKS", 7)
    normalized = normalize(weights)
    expected = plain_loop(normalized, 6400)
    index = BlendIndex(normalized)
    for sample in (6399, 0, 3200, 6336, 63, 64):
        assert index.lookup(sample) == expected[sample]
    for chunk in range(100):
        sources, numbers = index.chunk(chunk)
        assert list(zip(sources, numbers, strict=True)) == expected[chunk * 64 : (chunk + 1) * 64]


@pytest.mark.parametrize("weights", [[0.3, 0.7], [5, 3, 1, 0.01]])
def test_wrong_estimates_of_counts_are_corrected(monkeypatch, weights):
    """Estimates are nearly always right, so wrong ones are injected."""
    monkeypatch.setattr(blending, "CHUNK", 16)
    monkeypatch.setattr(blending, "REACHES", ())
    guess, walks = blending._estimate, []

    def wrong(weights, starts):
        counts = guess(weights, starts)
        counts[0] += 9
        counts[1] -= 9
        return counts

    def counted(weights, counts, starts, steps):
        walks.append(starts.shape[0])
        return advance(weights, counts, starts, steps)

    advance = blending._advance
    monkeypatch.setattr(blending, "_estimate", wrong)
    monkeypatch.setattr(blending, "_advance", counted)
    normalized = normalize(weights)
    expected = plain_loop(normalized, 640)
    index = BlendIndex(normalized)
    index.lookup(639)
    assert len(walks) > 2
    assert [index.lookup(sample) for sample in range(640)] == expected


def test_evicted_chunks_are_recomputed_identically(monkeypatch):
    monkeypatch.setattr(blending, "CHUNK", 16)
    monkeypatch.setattr(blending, "KEPT", 2)
    weights = normalize([2, 3, 4])
    expected = plain_loop(weights, 320)
    index = BlendIndex(weights)
    for sample in np.random.RandomState(0).randint(0, 320, 100):
        assert index.lookup(int(sample)) == expected[sample]
