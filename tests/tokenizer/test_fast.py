"""The tiktoken encoder gives the ids of the reference library; unsuitable vocabularies use the reference."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.errors import DataError
from megatron_lite.tokenizer import fast, huggingface
from megatron_lite.tokenizer.huggingface import read_gpt2
from megatron_lite.tokenizer.training import train_byte_level_bpe

pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def both(bpe_folder):
    files = str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")
    return read_gpt2(*files, encoders=("tiktoken",)), read_gpt2(*files, encoders=())


def same(both, texts):
    quick, plain = (tokenizer.encode_flat(texts) for tokenizer in both)
    assert quick.lengths.tolist() == plain.lengths.tolist()
    assert (quick.ids == plain.ids).all()


text = st.text(
    st.one_of(st.sampled_from("ab the  \n\t'sl1\uff12²\u00a0\u2028\x1c\x85東"), st.characters(codec="utf-8"))
)


@settings(max_examples=300, deadline=None)
@given(st.lists(text, max_size=5))
def test_same_ids(both, texts):
    same(both, texts)


@pytest.mark.slow
def test_both_libraries_classify_every_character_alike(both):
    """Letters join letters, numbers join numbers: three neighbours distinguish the classes."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    same(both, ["".join(f"a{c}1{c}!" for c in characters[i : i + 4096]) for i in range(0, 0x32000, 4096)])
    same(both, ["".join(f"a{c}1{c}!" for c in characters[0xE0000 - 2048 : 0xE0400])])


def test_long_whitespace_runs_and_the_separator_token(both):
    same(both, ["x" + " " * 120_000 + "y", "x" + "\n \t" * 30_000, "東" * 60_000, ("word " * 30_000) + "  \n end"])
    same(both, ["a" + both[0].fast._marker + "b", "c"])


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("abs1 \n\u00a0\x1c'_,東、。がー\uff12\u0301"), max_size=60), st.integers(2, 9))
def test_pieces_split_only_where_the_pattern_splits(both, string, limit):
    parts = list(fast.pieces(string, limit))
    assert "".join(parts) == string
    assert [i for part in parts for i in both[1].encode(part)] == both[1].encode(string)


def test_pieces_are_short_if_there_are_split_points():
    for text in ("word " * 100, "a,b;" * 100, "x1" * 200, "東京、" * 100):
        assert max(map(len, fast.pieces(text, 20))) <= 20


RUNS = ["a", "-", " ", "0", "ACGT", "=-", " \n\t", "0123456789", "ab東京é", "'!\"", "the"]


@pytest.fixture(scope="module")
def runs_vocabulary(tmp_path_factory):
    """A vocabulary with many tokens for repetitions, so that spans can be segmented in several ways."""
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(1)
    texts = ["".join(draw.choices(run, k=length)) for run in RUNS for length in (3, 5, 16, 40, 200) for _ in range(4)]
    train_byte_level_bpe(texts, folder, vocab_size=900)
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return read_gpt2(*files, encoders=("tiktoken",)), read_gpt2(*files, encoders=())


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_word_of_any_length_is_joined_from_spans(runs_vocabulary, run, monkeypatch):
    monkeypatch.setattr(fast, "MAX_WHOLE", 60_000)  # never encoded in one call
    draw = random.Random(run)
    for before, after in (("", ""), ("x", "y"), ("the 's", "'s end"), (" ", "  .")):
        length = draw.randrange(50_000, 170_000)
        same(runs_vocabulary, [before + "".join(draw.choices(run, k=length)) + after, "next"])
        same(runs_vocabulary, [before + (run * length)[:length] + after])


def test_a_word_without_spans_is_encoded_in_one_call_up_to_a_limit(both, monkeypatch):
    text = "\u0e01" * 120_000  # a letter outside of LETTERS
    same(both, [text])
    monkeypatch.setattr(fast, "MAX_WHOLE", 60_000)
    with pytest.raises(
        DataError, match=r"120,000 characters that begins with 'ก{30}': in more than 60,000 characters in a row"
    ):
        both[0].encode_flat(["short", text])
    monkeypatch.setattr(huggingface, "MAX_SLOW", 60_000)
    with pytest.raises(DataError, match=r"120,000 characters that .*-e .*\[fast\]"):
        both[1].encode(text)


def test_spans_without_a_common_token_are_encoded_in_one_call(both, monkeypatch):
    monkeypatch.setattr(fast.FastByteBpe, "_common_token", lambda *_: None)
    same(both, ["ab" * 60_000])
    with pytest.raises(DataError, match="2,000,000 characters"):
        both[0].encode(" " * 2_000_000)  # more than the regex engine accepts


def test_an_unsuitable_vocabulary_is_not_encoded_with_tiktoken(bpe_folder):
    vocabulary = json.loads((bpe_folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (bpe_folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    assert fast.build(vocabulary, merges) is not None
    assert fast.build(vocabulary, merges[::-1]) is None
    assert fast.build(vocabulary, [*merges, merges[-1]]) is None
    swapped = dict(vocabulary)
    first, last = "".join(merges[0]), "".join(merges[-1])
    swapped[first], swapped[last] = vocabulary[last], vocabulary[first]
    assert fast.build(swapped, merges) is None


def test_a_token_that_its_bytes_do_not_merge_to_uses_the_reference(tmp_path):
    """`abc` is listed as a+bc, but ab merges first: the libraries would give different ids."""
    symbols = list(fast.byte_of_symbol())
    vocabulary = {token: i for i, token in enumerate([*symbols, "ab", "bc", "abc"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nb c\na bc\n")
    assert not read_gpt2(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), encoders=("tiktoken",)).fast
