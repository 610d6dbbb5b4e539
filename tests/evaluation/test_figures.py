import json
import math

import pytest

from megatron_lite.evaluation.figures import Figures, in_lines
from megatron_lite.evaluation.perplexity import TextLoss

FULL = Figures("text", TextLoss(total=20.0, tokens=10), num_bytes=40, num_words=5)


def test_figures_per_token_byte_and_word():
    record = FULL.record()
    assert record["loss"] == 2.0 and record["perplexity"] == pytest.approx(math.e**2)
    assert record["bits_per_byte"] == pytest.approx(20.0 / 40 / math.log(2))
    assert record["word_perplexity"] == pytest.approx(math.e**4)


def test_where_only_tokens_are_known_the_rest_is_left_out():
    record = Figures("data", FULL.loss).record()
    assert set(record) == {"name", "tokens", "loss", "perplexity"}
    assert in_lines([Figures("data", FULL.loss)]).split()[-3:] == ["-", "-", "-"]


def test_a_hopeless_model_has_a_record_that_is_json_and_a_table_of_80_columns():
    hopeless = Figures("text", TextLoss(total=1e9, tokens=1_000_000), num_bytes=4_000_000, num_words=1_000)
    assert json.loads(json.dumps(hopeless.record(), allow_nan=False))["word_perplexity"] == "Infinity"
    bad = Figures("text", TextLoss(total=6e6, tokens=1_000_000), num_bytes=4_000_000, num_words=200_000)
    table = in_lines([hopeless, bad]).splitlines()
    assert max(map(len, table)) <= 80
    assert all(len(line.split()) == 6 for line in table[2::2])
