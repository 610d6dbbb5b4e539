import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.errors import ConfigError
from megatron_lite.generation.sampling import Sampling, candidates, choose, penalize

numbers = st.floats(-30, 30, width=32)
logits_of_rows = st.integers(2, 12).flatmap(
    lambda vocab: st.lists(st.lists(numbers, min_size=vocab, max_size=vocab), min_size=1, max_size=4)
)
samplings = st.builds(Sampling, temperature=st.floats(0.05, 5), top_k=st.integers(0, 15), top_p=st.floats(0.01, 1.0))
GRID = 20_000


def frequencies(logits, sampling, vocab):
    """Return the share of each token over an even grid of uniform numbers, the exact distribution."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    ids = choose(logits.expand(GRID, -1), sampling, vocab, uniform)
    return torch.bincount(ids, minlength=logits.shape[1]) / GRID


@settings(deadline=None, max_examples=40)
@given(st.lists(numbers, min_size=2, max_size=9), st.floats(0.2, 3))
def test_draws_follow_the_tempered_softmax(logits, temperature):
    row = torch.tensor([logits])
    wanted = (row.double() / temperature).softmax(-1)[0]
    found = frequencies(row, Sampling(temperature=temperature), len(logits))
    assert (found - wanted).abs().max() < 2 / GRID * len(logits)


@settings(deadline=None, max_examples=60)
@given(logits_of_rows, samplings, st.integers(0, 5))
def test_candidates_are_a_distribution_over_the_likeliest(rows, sampling, padding):
    logits = torch.tensor(rows)
    vocab = logits.shape[1]
    padded = torch.cat((logits, torch.full((len(rows), padding), 1e4)), dim=1)
    probabilities, ids = candidates(padded, sampling, vocab)
    assert torch.allclose(probabilities.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    assert (probabilities.diff(dim=-1) <= 0).all()
    assert (ids.sort(-1).values == torch.arange(vocab)).all()
    kept = (probabilities > 0).sum(-1)
    if sampling.top_k:
        assert (kept <= sampling.top_k).all()
    for row in range(len(rows)):
        inside, outside = ids[row, : kept[row]], ids[row, kept[row] :]
        if len(outside):
            assert logits[row, inside].min() >= logits[row, outside].max()


@settings(deadline=None, max_examples=60)
@given(logits_of_rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_it(rows, top_p):
    logits = torch.tensor(rows)
    probabilities, _ = candidates(logits, Sampling(top_p=top_p), logits.shape[1])
    whole = logits.double().softmax(-1).sort(-1, descending=True).values
    for row in range(len(rows)):
        kept = int((probabilities[row] > 0).sum())
        underflowed = int((whole[row] == 0).sum())
        assert whole[row, :kept].sum() >= top_p - 1e-9 or kept == logits.shape[1] - underflowed
        assert kept == 1 or whole[row, : kept - 1].sum() < top_p + 1e-9


@settings(deadline=None)
@given(
    logits_of_rows,
    st.one_of(samplings, st.just(Sampling(temperature=0.0))),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 1 - 2**-24, 1 - 2**-53]),
)
def test_padding_and_filtered_tokens_are_never_chosen(rows, sampling, padding, uniform):
    logits = torch.tensor(rows)
    vocab = logits.shape[1]
    padded = torch.cat((logits, torch.full((len(rows), padding), 1e4)), dim=1)
    chosen = choose(padded, sampling, vocab, torch.full((len(rows),), uniform, dtype=torch.float64))
    assert (chosen < vocab).all()
    if not sampling.greedy:
        probabilities, ids = candidates(padded, sampling, vocab)
        of_chosen = (probabilities * (ids == chosen.unsqueeze(1))).sum(-1)
        assert (of_chosen > 0).all()


def test_greedy_chooses_the_likeliest_for_any_uniform_number():
    logits = torch.tensor([[0.0, 3.0, 2.0, 99.0], [5.0, 3.0, 2.0, 99.0]])
    for uniform in (0.0, 0.99):
        assert choose(logits, Sampling(temperature=0.0), 3, torch.full((2,), uniform)).tolist() == [1, 0]


def test_each_token_has_a_half_open_interval():
    logits = torch.zeros(3, 2)
    assert choose(logits, Sampling(), 2, torch.tensor([0.0, 0.4999, 0.5])).tolist() == [0, 0, 1]


def test_top_k_one_and_a_tiny_temperature_are_greedy():
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * 50
    greedy = choose(logits, Sampling(temperature=0.0), 100, torch.rand(8))
    assert torch.equal(choose(logits, Sampling(top_k=1), 100, torch.rand(8)), greedy)
    assert torch.equal(choose(logits, Sampling(temperature=1e-30), 100, torch.rand(8)), greedy)


def test_top_k_shares_its_probability_by_softmax():
    logits = torch.tensor([[math.log(4.0), math.log(1.0), math.log(5.0), math.log(2.0)]])
    assert frequencies(logits, Sampling(top_k=2), 4).tolist() == pytest.approx([4 / 9, 0, 5 / 9, 0], abs=1e-3)


def test_top_p_applies_after_top_k():
    logits = torch.tensor([[math.log(0.4), math.log(0.3), math.log(0.3)]])
    # Of all tokens 0.4 and 0.3 are needed for 0.5; of the top two the first alone has 4/7.
    assert (candidates(logits, Sampling(top_p=0.5), 3)[0] > 0).sum() == 2
    assert (candidates(logits, Sampling(top_p=0.5, top_k=2), 3)[0] > 0).sum() == 1


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.8)
    together = choose(logits, sampling, 50, uniform)
    alone = [choose(logits[row : row + 1], sampling, 50, uniform[row : row + 1]) for row in range(5)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"--{field.replace('_', '-')}"):
        Sampling(**{field: value})


def test_min_p_keeps_tokens_relative_to_the_likeliest():
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.15), math.log(0.05)]])
    probabilities, ids = candidates(logits, Sampling(min_p=0.25), 4)
    assert probabilities[0].tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0])
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert (candidates(logits, Sampling(min_p=0.5, temperature=0.1), 4)[0] > 0).sum() == 1, "after the temperature"


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0])
    assert penalize(logits, [0, 1, 0, 4], 4.0).tolist() == [0.5, -8.0, 2.0, -2.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0, 0.0]
