"""Encoding returns the content of a text: templates, truncation and dropout of a tokenizer's files have no effect."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.build import build_tokenizer
from megatron_lite.tokenizer.huggingface import ENCODERS, read_gpt2, read_hugging_face
from megatron_lite.tokenizer.training import train_sentencepiece

TEXT = "the cat sat on the mat"


def bos_eos(library):
    """Return a template that adds BOS and EOS."""
    library.add_special_tokens(["<s>", "</s>"])
    ends = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)


TEMPLATES = {
    "template": bos_eos,
    "sequence": lambda library: processors.Sequence([processors.ByteLevel(), bos_eos(library)]),
    "roberta": lambda library: (
        bos_eos(library)
        and processors.RobertaProcessing(("</s>", library.token_to_id("</s>")), ("<s>", library.token_to_id("<s>")))
    ),
}


@pytest.fixture(params=TEMPLATES)
def with_template(request, bpe_folder, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    library.post_processor = TEMPLATES[request.param](library)
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert library.encode(TEXT).tokens[0] == "<s>"
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("encoders", [ENCODERS, ("tiktoken",), ()])
def test_no_template_truncation_or_padding(with_template, bpe_folder, each, encoders):
    tokenizer = read_hugging_face(str(with_template), encoders=encoders)
    plain = read_gpt2(str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt"))
    texts = ["", TEXT, "a", "the cat<|endoftext|>sat", ""]
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)
    assert tokenizer.encode("") == []
    assert each(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.token(tokenizer.bos) == "<s>"


def test_a_template_does_not_disable_the_fast_encoder(with_template):
    pytest.importorskip("tiktoken")
    assert read_hugging_face(str(with_template)).fast is not None


def test_beginning_of_text_token(bpe_folder, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    library.add_special_tokens(["<go>", "<bos>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert read_hugging_face(str(tmp_path)).token(read_hugging_face(str(tmp_path)).bos) == "<bos>"
    (tmp_path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"bos_token": {"content": "<go>"}}')
    tokenizer = read_hugging_face(str(tmp_path))
    assert tokenizer.token(tokenizer.bos) == "<go>"
    with pytest.raises(DataError, match=r"for --prepend-bos: .* has none of these: <s>, <\|begin_of_text\|>"):
        _ = read_hugging_face(str(bpe_folder)).bos
    with pytest.raises(DataError, match="NullTokenizer has no beginning-of-text token"):
        _ = build_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=9)).bos


def word_level(tmp_path, name="tokenizer.json", **model):
    library = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "h": 2, "i": 3}, **model))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.post_processor = bos_eos(library)
    library.save(str(tmp_path / name))
    return read_hugging_face(str(tmp_path / name))


def test_a_text_that_the_library_cannot_encode_is_a_data_error(tmp_path):
    tokenizer = word_level(tmp_path)
    assert tokenizer.encode("hi") == [2, 3]
    with pytest.raises(DataError, match=r"Missing \[UNK\] token"):
        tokenizer.encode("ho")
    with pytest.raises(DataError, match=r"Missing \[UNK\] token"):
        tokenizer.encode_flat(["hi", "ho"])
    known = word_level(tmp_path, unk_token="h")
    assert (known.encode("ho"), known.unknown) == ([2, 2], 2)


def test_unknown_token_of_a_unigram_model(tmp_path):
    library = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_hugging_face(str(tmp_path))
    assert tokenizer.unknown == 1
    assert tokenizer.encode("") == []


def test_segmentation_is_not_random(bpe_folder, tmp_path):
    spec = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    for encoders in (ENCODERS, ("tiktoken",), ()):
        tokenizer = read_hugging_face(str(tmp_path), encoders=encoders)
        assert {tuple(tokenizer.encode(TEXT)) for _ in range(9)} == {
            tuple(read_hugging_face(str(bpe_folder)).encode(TEXT))
        }


@pytest.mark.parametrize("encoders", [ENCODERS, ("tiktoken",), ()])
def test_special_tokens_in_a_text_are_encoded_by_both_hugging_face_formats(bpe_folder, tmp_path, encoders):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((bpe_folder / name).read_bytes())
    whole, parts = (read_hugging_face(str(folder), encoders=encoders) for folder in (bpe_folder, tmp_path))
    text = "the cat<|endoftext|>sat"
    assert whole.eod in whole.encode(text)
    assert parts.encode(text) == whole.encode(text)
    assert parts.fingerprint() == whole.fingerprint()
    assert read_hugging_face(str(tmp_path), extra_ids=2).vocab_size == whole.vocab_size + 2


def test_sentencepiece_adds_no_tokens(each, tmp_path):
    library = pytest.importorskip("sentencepiece")
    texts = [f"the cat number {i} sat on the mat" for i in range(200)]
    train_sentencepiece(texts, tmp_path / "sp.model", vocab_size=300)
    tokenizer = build_tokenizer(TokenizerConfig(type="SentencePieceTokenizer", model=str(tmp_path / "sp.model")))
    tokenizer._library = library.SentencePieceProcessor(
        model_file=str(tmp_path / "sp.model"), add_bos=True, add_eos=True
    )
    ends = {tokenizer.bos, tokenizer.eod}
    assert tokenizer.token(tokenizer.bos) == "<s>"
    for text in ("the cat", "", "</s> <s>"):
        assert not ends & set(tokenizer.encode(text))
        assert each(tokenizer, ["a", text]) == [tokenizer.encode("a"), tokenizer.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


def test_files_with_a_byte_order_mark_and_windows_line_ends(bpe_folder, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        content = (bpe_folder / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    plain = read_hugging_face(str(bpe_folder))
    assert read_gpt2(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).encode(TEXT) == plain.encode(TEXT)
    assert read_hugging_face(str(tmp_path)).fingerprint() == plain.fingerprint()


def test_rules_hash_differs_if_ids_can_differ(bpe_folder, tmp_path):
    plain = read_hugging_face(str(bpe_folder))
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    library.post_processor = processors.ByteLevel()
    library.enable_truncation(3)
    library.save(str(tmp_path / "same.json"))
    library.normalizer = normalizers.Lowercase()
    library.save(str(tmp_path / "lower.json"))
    same, lower = (read_hugging_face(str(tmp_path / f"{name}.json")) for name in ("same", "lower"))
    assert same.rules() == plain.rules()
    assert lower.fingerprint() == plain.fingerprint() and lower.rules() != plain.rules()
    (tmp_path / "vocab.json").write_bytes((bpe_folder / "vocab.json").read_bytes())
    lines = (bpe_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")
    fewer = read_gpt2(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert fewer.rules() != read_gpt2(str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")).rules()


def test_empty_batches(bpe_folder):
    for encoders in (ENCODERS, ("tiktoken",), ()):
        batch = read_hugging_face(str(bpe_folder), encoders=encoders).encode_flat([])
        assert batch.ids.dtype == np.uint32 and batch.ids.shape == batch.lengths.shape == (0,)
