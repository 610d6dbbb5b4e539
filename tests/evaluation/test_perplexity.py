"""Sliding windows, text loss and the metrics derived from it."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from megatron_lite.backend.environment import read_launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.evaluation.perplexity import TextLoss, TextMetrics, format_table, text_loss, windows
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams

VOCAB = 51


@pytest.fixture(scope="module")
def stage():
    torch.set_num_threads(1)
    config = RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=64,
            vocab_size=VOCAB,
            padded_vocab_size=64,
            init_std=0.3,
        ),
        batch=BatchConfig(seq_length=16, micro_batch_size=1),
        runtime=RuntimeConfig(device="cpu"),
    )
    backend = select_backend(config.runtime, config.parallel, read_launch({}))
    return GPTStage(
        config, range(config.model.num_layers), build_mesh(backend, config.parallel), RngStreams(1, backend)
    )


@pytest.fixture(scope="module")
def text():
    return torch.randint(VOCAB, (47,), generator=torch.Generator().manual_seed(0)).tolist()


def token_losses(stage, tokens):
    """Return the loss of each token but the first, with a plain loop."""
    stage.eval()
    row = torch.tensor([tokens])
    with torch.no_grad():
        logits = stage.logits(None, MicroBatch(tokens=row[:, :-1], labels=row[:, 1:]))
    return F.cross_entropy(logits[:, 0, :VOCAB], row[0, 1:], reduction="none")


@given(st.integers(2, 300), st.integers(1, 40), st.data())
def test_every_token_but_the_first_is_predicted_once(length, size, data):
    stride = data.draw(st.integers(1, size))
    seen = []
    for number, window in enumerate(windows(length, size, stride)):
        assert 0 < window.end - window.start <= size
        assert window.start == number * stride and window.start <= window.fresh < window.end
        seen += range(window.fresh + 1, window.end + 1)
    assert seen == list(range(1, length))


def test_a_text_of_one_window_has_the_plain_loss(stage, text):
    found = text_loss(stage, text, 64)
    assert found.tokens == 46
    assert found.mean == pytest.approx(float(token_losses(stage, text).mean()), rel=1e-5)


def test_windows_without_overlap_are_separate_samples(stage, text):
    parts = [token_losses(stage, text[start : start + 11]) for start in range(0, 46, 10)]
    wanted = torch.cat(parts)
    for batch_size in (1, 3, 8):
        found = text_loss(stage, text, 10, batch_size=batch_size)
        assert found.tokens == len(wanted) == 46
        assert found.total == pytest.approx(float(wanted.sum()), rel=1e-5)


def test_a_stride_of_one_gives_every_token_full_context(stage, text):
    found = text_loss(stage, text, 8, stride=1)
    wanted = [float(token_losses(stage, text[max(0, at - 8) : at + 1])[-1]) for at in range(1, 47)]
    assert found.total == pytest.approx(sum(wanted), rel=1e-5)


def test_perplexity_and_bits(stage, text):
    found = text_loss(stage, text, 16)
    assert found.perplexity == pytest.approx(math.exp(found.mean))
    assert found.bits_per_byte(23) == pytest.approx(found.mean * 2 / math.log(2))


def test_dropout_is_off_and_the_mode_is_restored(stage, text):
    stage.train()
    assert text_loss(stage, text, 16) == text_loss(stage, text, 16)
    assert stage.training


@pytest.mark.parametrize(("length", "stride"), [(1, 0), (10, 17), (10, -1)])
def test_invalid_texts_and_strides_are_refused(stage, text, length, stride):
    with pytest.raises(ConfigError, match=r"loss needs at least 2|--stride .* is outside 1 to 16"):
        text_loss(stage, text[:length], 16, stride=stride)


def test_progress_adds_up(stage, text):
    told = []
    text_loss(stage, text, 10, batch_size=2, on_tokens=told.append)
    assert told == [20, 20, 6]


def test_tokens_and_windows_out_of_range_are_refused(stage):
    with pytest.raises(ConfigError, match="ids from 3 to 51, but the model's vocabulary has 51"):
        text_loss(stage, [3, 51], 16)
    with pytest.raises(ConfigError, match="longer than the model's table of 64 learned positions"):
        text_loss(stage, [1, 2, 3], 65)


def test_a_non_finite_loss_is_an_error(stage, text):
    weight = stage.embedding.word_embeddings.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[text[3]] = math.nan
        with pytest.raises(TrainingError, match="loss of the text is nan"):
            text_loss(stage, text, 16)
    finally:
        with torch.no_grad():
            weight.copy_(before)


FULL = TextMetrics("text", TextLoss(total=20.0, tokens=10), num_bytes=40, num_words=5)


def test_metrics_per_token_byte_and_word():
    record = FULL.record()
    assert record["loss"] == 2.0 and record["perplexity"] == pytest.approx(math.e**2)
    assert record["bits_per_byte"] == pytest.approx(20.0 / 40 / math.log(2))
    assert record["word_perplexity"] == pytest.approx(math.e**4)


def test_metrics_without_sizes():
    record = TextMetrics("data", FULL.loss).record()
    assert set(record) == {"name", "tokens", "loss", "perplexity"}
    assert format_table([TextMetrics("data", FULL.loss)]).split()[-3:] == ["-", "-", "-"]


def test_infinite_perplexity_in_json_and_table():
    hopeless = TextMetrics("text", TextLoss(total=1e9, tokens=1_000_000), num_bytes=4_000_000, num_words=1_000)
    assert json.loads(json.dumps(hopeless.record(), allow_nan=False))["word_perplexity"] == "Infinity"
    bad = TextMetrics("text", TextLoss(total=6e6, tokens=1_000_000), num_bytes=4_000_000, num_words=200_000)
    table = format_table([hopeless, bad]).splitlines()
    assert max(map(len, table)) <= 80
    assert all(len(line.split()) == 6 for line in table[2::2])
