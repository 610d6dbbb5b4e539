"""Hugging Face and GPT-2 tokenizers: equal ids from both file formats, fingerprints, errors of damaged files."""

from __future__ import annotations

import json

import pytest

from megatron_lite.errors import DataError
from megatron_lite.tokenizer.huggingface import ENCODERS, read_gpt2, read_hugging_face

SAMPLES = ["", " ", "the cat", "naïve 東京 🙂 don't", "a\n\n  b \t c", "\x00\x01", "the cat<|endoftext|>sat"]


def gpt2(folder, **kwargs):
    return read_gpt2(str(folder / "vocab.json"), str(folder / "merges.txt"), **kwargs)


@pytest.mark.parametrize("encoders", [ENCODERS, ("tiktoken",), ()])
def test_round_trip(bpe_folder, each, encoders):
    tokenizer = gpt2(bpe_folder, encoders=encoders)
    assert (tokenizer.fast is not None) == bool(encoders)
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert each(tokenizer, SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]


def test_both_file_formats_give_the_same_tokenizer(bpe_folder):
    files, whole = gpt2(bpe_folder), read_hugging_face(str(bpe_folder))
    assert files.vocab_size == whole.vocab_size
    assert files.eod == whole.eod == files.vocab_size - 1
    assert files.fingerprint() == whole.fingerprint()
    assert files.token(files.eod) == "<|endoftext|>"
    assert files.encode("the cat") == whole.encode("the cat")


def test_an_added_token_is_plain_text_in_gpt2_and_a_token_in_hugging_face(bpe_folder, each):
    files, whole = gpt2(bpe_folder), read_hugging_face(str(bpe_folder / "tokenizer.json"))
    text = "the cat<|endoftext|>"
    assert files.eod not in files.encode(text)
    assert whole.encode(text)[-1] == whole.eod
    assert each(whole, [text, "cat"]) == [whole.encode(text), whole.encode("cat")]


def test_one_changed_id_changes_the_fingerprint(bpe_folder, tmp_path):
    vocabulary = json.loads((bpe_folder / "vocab.json").read_text(encoding="utf-8"))
    a, b = list(vocabulary)[-3:-1]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text((bpe_folder / "merges.txt").read_text(encoding="utf-8"), encoding="utf-8")
    assert gpt2(tmp_path).fingerprint() != gpt2(bpe_folder).fingerprint()


def test_extra_ids_follow_the_vocabulary(bpe_folder):
    plain, extra = read_hugging_face(str(bpe_folder)), read_hugging_face(str(bpe_folder), extra_ids=3)
    assert extra.vocab_size == plain.vocab_size + 3
    assert extra.token(plain.vocab_size) == "<extra_id_0>"


def test_eod_names(bpe_folder, tmp_path):
    spec = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"][0]["content"] = "<stop>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"<\|endoftext\|>, </s>, <\|end_of_text\|>.*--eod-token"):
        _ = read_hugging_face(str(tmp_path)).eod
    assert read_hugging_face(str(tmp_path), eod_token="<stop>").eod == spec["added_tokens"][0]["id"]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert read_hugging_face(str(tmp_path)).eod == spec["added_tokens"][0]["id"]


def test_half_a_surrogate_pair_is_refused(bpe_folder):
    for encoders in (ENCODERS, ("tiktoken",), ()):
        tokenizer = gpt2(bpe_folder, encoders=encoders)
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("\ud800")
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode_flat(["a", "\ud800"])


def test_bad_files(bpe_folder, tmp_path):
    merges = str(bpe_folder / "merges.txt")
    with pytest.raises(DataError, match="--vocab-file is not given"):
        read_gpt2("", merges)
    with pytest.raises(DataError, match=r"absent\.json does not exist"):
        read_gpt2(str(tmp_path / "absent.json"), merges)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(DataError, match=r"Cannot read .*vocab.json .*: Expecting property name"):
        read_gpt2(str(tmp_path / "vocab.json"), merges)
    for content, message in (
        ("[]", "not a JSON object"),
        ('{"a": 1.5}', "the id of 'a' is 1.5"),
        ('{"a": 99999999999}', "the id of 'a' is 99999999999, not a whole number from 0 to 2,147,483,647"),
        ("\xff", "not UTF-8"),
    ):
        (tmp_path / "vocab.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            read_gpt2(str(tmp_path / "vocab.json"), merges)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na b c\n")
    with pytest.raises(DataError, match=r"merges.txt:3 as .*: 'a b c' is not two tokens"):
        read_gpt2(str(bpe_folder / "vocab.json"), str(tmp_path / "merges.txt"))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nqqq zzz\n")
    with pytest.raises(DataError, match="do not belong to the same tokenizer"):
        read_gpt2(str(bpe_folder / "vocab.json"), str(tmp_path / "merges.txt"))
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match="has no tokens for 255 of the 256 byte values"):
        gpt2(tmp_path)
    with pytest.raises(DataError, match="is given without --tokenizer-model"):
        read_hugging_face("")
    with pytest.raises(DataError, match=r"neither a file or folder nor a model"):
        read_hugging_face("no-such/model-anywhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.model").touch()
    with pytest.raises(DataError, match="SentencePieceTokenizer"):
        read_hugging_face(str(tmp_path / "empty"))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match="is not a valid Hugging Face tokenizer file"):
        read_hugging_face(str(tmp_path))
