"""The gigatoken encoder gives the ids of the tokenizers library; its memory is bounded; others replace it."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.tokenizer import gigatoken_bpe
from megatron_lite.tokenizer.fast import FastByteBpe
from megatron_lite.tokenizer.gigatoken_bpe import GigatokenBpe
from megatron_lite.tokenizer.huggingface import read_gpt2, read_hugging_face

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def both(bpe_folder):
    files = str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")
    tokenizers = read_gpt2(*files, encoders=("gigatoken",)), read_gpt2(*files, encoders=())
    assert isinstance(tokenizers[0].fast, GigatokenBpe)
    return tokenizers


def same(both, texts):
    quick, plain = (tokenizer.encode_flat(texts) for tokenizer in both)
    assert quick.lengths.tolist() == plain.lengths.tolist()
    assert (quick.ids == plain.ids).all()


text = st.text(
    st.one_of(
        st.sampled_from("ab the  \n\t'sl1\uff12²\u00a0\u2028\x1c\x85東\u088f\U000323b0\U0001f600"),
        st.sampled_from(["'re", "'LL", "  ", "\r\n", "don't", "<|endoftext|>"]).flatmap(st.sampled_from),
        st.characters(codec="utf-8"),
    )
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(text, max_size=5))
def test_same_ids(both, texts):
    same(both, texts)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama 3's pattern; Qwen 2's has single digits."""


def split_by(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}


def byte_fallback(spec):
    """Return a tokenizer like Llama 2's: words begin with a lower one-eighth block, other characters are bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abelstr", "\u2581a", "th", "el", "\u2581el"]
    model = {
        **spec["model"], "vocab": {token: i for i, token in enumerate([*tokens, "t", "h"]) if token != "th"},
        "merges": [["\u2581", "a"], ["e", "l"], ["\u2581", "el"]], "unk_token": "<unk>", "fuse_unk": True,
        "byte_fallback": True,
    }  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    return {"model": model, "normalizer": normalizer, "pre_tokenizer": None, "added_tokens": []}


OTHERS = {
    "llama 3": lambda spec: split_by(LLAMA3),
    "qwen 2": lambda spec: split_by(LLAMA3.replace("{1,3}", "")),
    "prefix": lambda spec: {"pre_tokenizer": {**spec["pre_tokenizer"], "add_prefix_space": True}},
    "nfc": lambda spec: {"normalizer": {"type": "NFC"}},
    "byte fallback": byte_fallback,
}


@pytest.fixture(scope="module", params=OTHERS)
def others(request, bpe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    spec = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**spec, **OTHERS[request.param](spec)}), encoding="utf-8")
    tokenizers = [read_hugging_face(str(folder), encoders=encoders) for encoders in (("gigatoken",), ())]
    assert isinstance(tokenizers[0].fast, GigatokenBpe)
    return tokenizers


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(text, max_size=4))
def test_other_tokenizers_give_the_same_ids(others, texts):
    same(others, texts)


@pytest.mark.slow
def test_both_libraries_classify_every_character_alike(both):
    """A contraction is split from a letter or number before it, and joins other characters."""
    points = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    # Of the 800,000 code points without a character every eighth is enough.
    characters = [chr(code) for code in points if code % 8 == 0 or unicodedata.category(chr(code)) != "Cn"]
    for low in range(0, len(characters), 1 << 16):
        texts = [f"{character}'t a{character}1{character} " for character in characters[low : low + (1 << 16)]]
        certain = [text for text in texts if not GigatokenBpe.is_uncertain(text)]
        same(both, certain)
        if low == 0:
            assert len(certain) > 0.85 * len(texts)


def test_characters_of_new_unicode_versions_are_left_to_the_library():
    letters = [chr(code) for code in (0x88F, 0xA7CE, 0x10940, 0x323B0, 0x33479)]
    assert all(map(GigatokenBpe.is_uncertain, letters))
    assert GigatokenBpe.is_uncertain("x" * 100 + "\U000323b0")
    for usual in (
        "Привет, 東京! ﬁ",
        "\U0001f600\U0001f9ff\U0001f1e9\U0001f1ea",
        "\U00020000 \U0001d400",
        "\u200b\ufeff",
    ):
        assert not GigatokenBpe.is_uncertain(usual)
    assigned = [code for code in range(0x3000, 0xA000) if unicodedata.category(chr(code)) != "Cn"]
    assert not GigatokenBpe.is_uncertain("".join(map(chr, assigned)))


def test_long_runs(both):
    same(
        both,
        [
            "x" + " " * 120_000 + "y",
            "x" + "\n \t" * 30_000,
            "東" * 60_000,
            "word " * 30_000 + "  \n end",
            "a" * 200_000,
        ],
    )


def test_added_tokens_become_their_ids(bpe_folder):
    quick, plain = (read_hugging_face(str(bpe_folder), encoders=encoders) for encoders in (("gigatoken",), ()))
    assert isinstance(quick.fast, GigatokenBpe)
    texts = ["a", "the cat<|endoftext|>sat", "", "<|endoftext|>", "b c"]
    same((quick, plain), texts)
    assert plain.eod in quick.encode(texts[1])


def test_memory_is_bounded(both, monkeypatch):
    """The encoder is created again when the process has grown, and gives the same ids."""
    encoder = GigatokenBpe(both[0].fast._spec)
    first, sizes = encoder._library, iter([10 << 20, 100 << 20, 101 << 20, 102 << 20])
    monkeypatch.setattr(gigatoken_bpe, "process_size", lambda: next(sizes))
    monkeypatch.setattr(gigatoken_bpe, "CHECKED_EVERY", 50)
    texts = ["some words of the cat " * 5]
    encoder._first_size, encoder._left = 10 << 20, 50
    expected = encoder.encode_flat(texts)
    assert encoder._library is first, "10 MiB at the first reading"
    assert np.array_equal(encoder.encode_flat(texts).ids, expected.ids)
    assert encoder._library is not first, "100 MiB at the second one"
    assert encoder._first_size == 101 << 20
    assert np.array_equal(encoder.encode_flat(texts).ids, expected.ids)


def test_without_the_size_of_the_process_it_is_created_again_at_intervals(both, monkeypatch, tmp_path):
    monkeypatch.setattr(gigatoken_bpe, "STATM", tmp_path / "absent")
    monkeypatch.setattr(gigatoken_bpe, "WITHOUT_STATM", 50)
    encoder = GigatokenBpe(both[0].fast._spec)
    first = encoder._library
    encoder.encode_flat(["a" * 40])
    assert encoder._library is first
    encoder.encode_flat(["a" * 40])
    assert encoder._library is not first


def test_unsuitable_tokenizers_use_another_encoder(bpe_folder, tmp_path, monkeypatch):
    files = str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")
    spec = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Removed", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert read_hugging_face(str(tmp_path)).fast is None, "gigatoken does not support the pattern"
    with monkeypatch.context() as patch:
        patch.setattr(gigatoken_bpe, "_agrees", {})
        patch.setattr(
            GigatokenBpe, "encode_flat", lambda self, texts: read_gpt2(*files, encoders=()).encode_flat(["b"])
        )
        assert isinstance(read_gpt2(*files).fast, FastByteBpe), "other ids for the probe text"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert read_gpt2(*files).fast is None, "nothing is installed"


def test_a_difference_is_described(both, monkeypatch):
    plain = both[1]
    assert both[0].compare_encoders(["the cat", "", "sat\U000323b0's"]) == ""
    wrong = plain.encode_flat(["the cat", "sat"])
    monkeypatch.setattr(GigatokenBpe, "encode_flat", lambda self, texts: wrong._replace(ids=wrong.ids[:-1]))
    assert "GigatokenBpe encodes a text as" in both[0].compare_encoders(["the cat sat on"])
