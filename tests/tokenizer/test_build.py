"""Tokenizer factory: each type, invalid settings, and light imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.tokenizer.build import build_tokenizer
from megatron_lite.tokenizer.training import train_byte_level_bpe, train_sentencepiece


def test_null():
    tokenizer = build_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=100))
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.encode("3 1 100") == [3, 1, 100]
    assert tokenizer.decode([3, 1]) == "3 1"
    with pytest.raises(DataError, match="cannot encode '101'"):
        tokenizer.encode("3 101")
    with pytest.raises(DataError, match="reads token ids from 0 to 100"):
        tokenizer.encode("3 " + "0" * 5000)
    with pytest.raises(ConfigError, match="--vocab-size"):
        build_tokenizer(TokenizerConfig(type="NullTokenizer"))


def test_each_type(bpe_folder):
    files = {"vocab_file": str(bpe_folder / "vocab.json"), "merge_file": str(bpe_folder / "merges.txt")}
    gpt2 = build_tokenizer(TokenizerConfig(**files))
    assert build_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(bpe_folder))).eod == gpt2.eod
    assert build_tokenizer(TokenizerConfig(**files, eod_token="the")).eod == gpt2.encode("the")[0]
    with pytest.raises(ConfigError, match="--vocab-extra-ids"):
        build_tokenizer(TokenizerConfig(**files, vocab_extra_ids=2))


def test_sentencepiece(each, tmp_path):
    pytest.importorskip("sentencepiece")
    texts = [f"the cat number {i} sat on the mat {i * i} times" for i in range(200)]
    size = train_sentencepiece(texts, tmp_path / "sp.model", vocab_size=320)
    tokenizer = build_tokenizer(
        TokenizerConfig(type="SentencePieceTokenizer", model=str(tmp_path / "sp.model"), vocab_extra_ids=2)
    )
    assert tokenizer.vocab_size == size + 2
    text = "the cat  sat 東\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert each(tokenizer, [text, "", "cat"]) == [tokenizer.encode(one) for one in (text, "", "cat")]
    assert tokenizer.token(tokenizer.eod) == "</s>"
    assert tokenizer.decode([*tokenizer.encode("cat"), size + 1]) == "cat<extra_id_1>"
    with pytest.raises(ConfigError, match="smaller --vocab-size"):
        train_sentencepiece(texts, tmp_path / "other.model", vocab_size=100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sp.model"]
    (tmp_path / "bad.model").write_bytes(b"x")
    for path, message in ((tmp_path / "bad.model", "Cannot read"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(DataError, match=message):
            build_tokenizer(TokenizerConfig(type="SentencePieceTokenizer", model=str(path)))


def test_training_needs_text_and_a_large_enough_vocabulary(tmp_path):
    with pytest.raises(DataError, match="contains no text"):
        train_byte_level_bpe([], tmp_path, vocab_size=300)
    with pytest.raises(ConfigError, match="--vocab-size 257 or more"):
        train_byte_level_bpe(["a"], tmp_path, vocab_size=256)
    assert train_byte_level_bpe(["ab ab"], tmp_path, vocab_size=1000, special_tokens=["<end>", "<pad>"]) == 259


def test_imports_do_not_load_tokenizer_libraries():
    heavy = "torch tokenizers sentencepiece tiktoken transformers"
    code = (
        "import sys, megatron_lite.tokenizer.build, megatron_lite.tokenizer.training;"
        "import megatron_lite.tokenizer.huggingface;"
        f"print([name for name in '{heavy}'.split() if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
