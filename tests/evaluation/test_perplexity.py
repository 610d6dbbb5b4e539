"""Sliding windows, text loss and the metrics derived from it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.evaluation.perplexity import TextLoss, check_stride, require_tokens, text_spans, windows
from megatron_lite.evaluation.scoring import Span
from megatron_lite.model.batch import MicroBatch

VOCAB = 51


def text_loss(scorer, tokens, seq_length, stride=0):
    return TextLoss.of(scorer.score(text_spans(tokens, seq_length, stride)))


def token_losses(stage, tokens):
    """Return the loss of each token but the first, and whether it is the likeliest, with a plain forward pass."""
    stage.eval()
    row = torch.tensor(tokens)[None]
    with torch.no_grad():
        logits = stage.logits(None, MicroBatch(tokens=row[:, :-1], labels=row[:, 1:]))[:, 0, :VOCAB]
    return F.cross_entropy(logits, row[0, 1:], reduction="none"), logits.argmax(-1) == row[0, 1:]


@given(st.integers(2, 300), st.integers(1, 40), st.data())
def test_every_token_but_the_first_is_predicted_once(length, size, data):
    stride = data.draw(st.integers(1, size))
    seen = []
    for number, window in enumerate(windows(length, size, stride)):
        assert 0 < window.end - window.start <= size
        assert window.start == number * stride and window.start <= window.fresh < window.end
        seen += range(window.fresh + 1, window.end + 1)
    assert seen == list(range(1, length))


def test_a_text_of_one_window_has_the_plain_loss(make_scorer, text):
    scorer = make_scorer()
    found = text_loss(scorer, text, 64)
    assert found.tokens == 46
    assert found.mean == pytest.approx(float(token_losses(scorer.stage, text)[0].mean()), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_windows_without_overlap_are_separate_samples(make_scorer, text, batch_size):
    scorer = make_scorer(batch_size)
    parts = [token_losses(scorer.stage, text[start : start + 11])[0] for start in range(0, 46, 10)]
    wanted = torch.cat(parts)
    found = text_loss(scorer, text, 10)
    assert found.tokens == len(wanted) == 46
    assert found.total == pytest.approx(float(wanted.sum()), rel=1e-5)


def test_a_stride_of_one_gives_every_token_full_context(make_scorer, text):
    scorer = make_scorer()
    found = text_loss(scorer, text, 8, stride=1)
    wanted = [float(token_losses(scorer.stage, text[max(0, at - 8) : at + 1])[0][-1]) for at in range(1, 47)]
    assert found.total == pytest.approx(sum(wanted), rel=1e-5)


def test_spans_of_any_length_in_one_batch(make_scorer, text):
    """Padding on the right changes neither losses nor the comparison with greedy decoding."""
    scorer = make_scorer(8)
    losses, greedy = token_losses(scorer.stage, text)
    likeliest = int(greedy.nonzero()[0, 0]) + 1 if greedy.any() else 1
    spans = [Span(text, 0, start, end) for start, end in ((1, 2), (20, 47), (5, 9), (likeliest, likeliest + 1))]
    for span, score in zip(spans, scorer.score(spans), strict=True):
        assert score.tokens == span.end - span.start
        part = slice(span.start - 1, span.end - 1)
        assert score.loss == pytest.approx(float(losses[part].sum()), rel=1e-5)
        assert score.greedy == bool(greedy[part].all())


def test_the_greedy_continuation_is_recognized(make_scorer, text):
    scorer = make_scorer()
    ids = list(text[:5])
    for _ in range(3):
        row = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(scorer.stage.logits(None, MicroBatch(tokens=row, labels=row))[-1, 0, :VOCAB].argmax()))
    (score,) = scorer.score([Span(np.array(ids), 0, 5, 8)])
    assert score.greedy
    ids[6] = (ids[6] + 1) % VOCAB
    (score,) = scorer.score([Span(np.array(ids), 0, 5, 8)])
    assert not score.greedy


def test_perplexity_and_bits():
    loss = TextLoss(total=20.0, tokens=10)
    assert loss.mean == 2.0 and loss.perplexity == pytest.approx(math.e**2)
    assert loss.perplexity_per(5) == pytest.approx(math.e**4)
    assert loss.bits_per(40) == pytest.approx(20.0 / 40 / math.log(2))
    assert TextLoss(1e9, 10).perplexity == math.inf


def test_dropout_is_off_and_the_mode_is_restored(make_scorer, text):
    scorer = make_scorer()
    scorer.stage.train()
    assert text_loss(scorer, text, 16) == text_loss(scorer, text, 16)
    assert scorer.stage.training


def test_texts_and_strides_out_of_range():
    with pytest.raises(ConfigError, match="text x has 1 token, and a loss needs at least 2"):
        require_tokens([3], "x")
    with pytest.raises(ConfigError, match="--stride 17 is outside 1 to 16"):
        check_stride(17, 16)


def test_progress_adds_up(make_scorer, text):
    told = []
    make_scorer(2).score(text_spans(text, 10), told.append)
    assert told == [20, 20, 6]


def test_tokens_and_windows_out_of_range_are_refused(make_scorer):
    with pytest.raises(ConfigError, match="ids from 3 to 51, but the model's vocabulary has 51"):
        text_loss(make_scorer(), np.array([3, 51]), 16)
    with pytest.raises(ConfigError, match="longer than the model's table of 64 learned positions"):
        text_loss(make_scorer(), np.zeros(70, int), 65)


def test_a_non_finite_loss_is_an_error(make_scorer, text):
    weight = make_scorer().stage.embedding.word_embeddings.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[text[3]] = math.nan
        with pytest.raises(TrainingError, match="loss of the text is nan"):
            text_loss(make_scorer(), text, 16)
    finally:
        with torch.no_grad():
            weight.copy_(before)
