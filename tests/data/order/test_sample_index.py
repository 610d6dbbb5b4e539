"""Sample index against a reference loop that follows Megatron's procedure step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.order import sample_index
from megatron_lite.data.order.sample_index import build_index, plan_index
from megatron_lite.errors import DataError


def plain_megatron(sizes, bounds, num_samples, length, seed, order):
    """Return document, sample and shuffle indices, built as in Megatron: loops, tiles and int32 arrays."""
    documents = np.arange(*bounds, dtype=np.int32)
    per_epoch = int(np.sum(sizes[documents]))
    epochs, tokens = 0, 0
    while True:
        epochs, tokens = epochs + 1, tokens + per_epoch
        if num_samples is None or (tokens - 1) // length >= num_samples:
            break
    separate, before = False, 0
    if epochs > 1:
        before = ((epochs - 1) * per_epoch - 1) // length
        threshold = {"legacy": 0.95, "modern": 0.80}[order]
        separate = num_samples - before < int(threshold * ((per_epoch - 1) // length))
    rng = np.random.RandomState(seed)
    if separate:
        head = np.tile(documents, epochs - 1)
        rng.shuffle(head)
        tail = documents.copy()
        rng.shuffle(tail)
        order_of_documents = np.concatenate([head, tail])
    else:
        order_of_documents = np.tile(documents, epochs)
        rng.shuffle(order_of_documents)
    total = (epochs * per_epoch - 1) // length
    together = before if separate else total
    head = np.arange(together, dtype=np.uint32)
    rng.shuffle(head)
    tail = np.arange(together, total, dtype=np.uint32)
    if together < total:
        rng.shuffle(tail)
    rows, position, offset = [(0, 0)], 0, 0
    for _ in range(total):
        left = length + 1
        while left:
            have = int(sizes[order_of_documents[position]]) - offset
            left -= have
            if left <= 0:
                offset += left + have - 1
                left = 0
            else:
                position, offset = position + 1, 0
        rows.append((position, offset))
    return order_of_documents, rows, np.concatenate([head, tail])


@st.composite
def cases(draw):
    sizes = np.array(draw(st.lists(st.integers(0, 40), min_size=1, max_size=90)), dtype=np.int32)
    first = draw(st.integers(0, len(sizes) - 1))
    last = draw(st.integers(first + 1, len(sizes)))
    if not sizes[first:last].any():
        sizes[first] = 3
    return {
        "sizes": sizes,
        "bounds": (first, last),
        "num_samples": draw(st.integers(1, 150)),
        "length": draw(st.integers(1, 30)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "order": draw(st.sampled_from(["legacy", "modern"])),
    }


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_equals_megatrons_procedure(case):
    documents, rows, shuffle = plain_megatron(**case)
    sizes, length = case["sizes"], case["length"]
    plan = plan_index(
        sizes,
        case["bounds"],
        num_samples=case["num_samples"],
        seq_length=length,
        seed=case["seed"],
        order=case["order"],
        prefix="p",
    )
    index = build_index(plan, sizes)
    assert index.documents.tolist() == documents.tolist()
    assert index.shuffle.tolist() == shuffle.tolist()
    assert len(index) >= case["num_samples"]
    # Megatron's first row may point at an empty document; the tokens are the same.
    stream = [(int(document), at) for document in documents for at in range(sizes[document])]
    assert [index.locate(number, sizes) for number in range(1, len(index) + 1)] == rows[1:]
    for sample, number in enumerate(shuffle):
        spans = index.spans(sample, sizes)
        pieces = [(document, at) for document, offset, count in spans for at in range(offset, offset + count)]
        assert pieces == stream[number * length : number * length + length + 1]


@pytest.mark.parametrize("chunk", [64, 128])
def test_many_chunks_equal_one(monkeypatch, chunk):
    sizes = np.random.RandomState(3).randint(0, 50, 1000).astype(np.int32)
    plan = plan_index(sizes, (10, 990), num_samples=3000, seq_length=16, seed=5, order="legacy", prefix="p")
    whole = build_index(plan, sizes)
    monkeypatch.setattr(sample_index, "CHUNK", chunk)
    pieces = build_index(plan, sizes)
    assert plan.epochs > 1
    for name in ("documents", "shuffle", "starts"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name))


def test_thresholds_of_the_two_generations():
    """At 85% of the last epoch's samples, only the legacy order separates it."""
    sizes = np.full(1000, 10, dtype=np.int32)
    legacy, modern = (
        plan_index(sizes, (0, 1000), num_samples=1850, seq_length=10, seed=1, order=order, prefix="p")
        for order in ("legacy", "modern")
    )
    assert (legacy.epochs, legacy.separate_last_epoch, modern.separate_last_epoch) == (2, True, False)
    assert legacy.num_shuffled_samples == 999
    assert modern.num_shuffled_samples == 1999


def test_one_epoch_without_a_number_of_samples():
    sizes = np.full(10, 7, dtype=np.int32)
    plan = plan_index(sizes, (0, 10), num_samples=None, seq_length=8, seed=1, order="modern", prefix="p")
    assert (plan.epochs, plan.total_samples) == (1, 8)


@pytest.mark.parametrize(("sizes", "wanted"), [([0, 0], 5), ([3, 2], None)])
def test_too_few_tokens_are_refused(sizes, wanted):
    with pytest.raises(DataError, match="less than one sample of 8"):
        plan_index(
            np.array(sizes, dtype=np.int32),
            (0, 2),
            num_samples=wanted,
            seq_length=8,
            seed=1,
            order="legacy",
            prefix="p",
        )


def test_a_negative_length_is_refused():
    sizes = np.array([5, -1, 9], dtype=np.int32)
    plan = plan_index(sizes, (0, 3), num_samples=1, seq_length=4, seed=1, order="legacy", prefix="p")
    with pytest.raises(DataError, match="sequence 1 has length -1"):
        build_index(plan, sizes)
