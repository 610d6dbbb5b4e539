"""Evaluation corpora: formats of files, counts, and errors."""

import json

import pytest

from megatron_lite.errors import DataError
from megatron_lite.evaluation import corpora
from megatron_lite.evaluation.lambada import lambada_metrics, last_word_spans, read_lambada
from megatron_lite.evaluation.scoring import Score


def test_wikitext_and_penn_treebank_are_normalized_by_the_original(tmp_path):
    wiki, ptb = tmp_path / "wiki", tmp_path / "ptb"
    wiki.write_text(" \n = Abc = \n \n a hard @-@ shelled abc , of 0 @.@ 7 kg \n")
    ptb.write_text(" no it was n't N \n")
    corpus = corpora.read_wikitext(str(wiki))
    assert corpus.text == "\n= Abc =\n\na hard-shelled abc, of 0.7 kg\n"
    assert (corpus.num_bytes, corpus.num_words) == (len(wiki.read_bytes()), 18)
    corpus = corpora.read_penn_treebank(str(ptb))
    assert (corpus.text, corpus.num_words) == ("no it wasn't 1\n", 6)


def test_hutter_prize_files_are_cut_to_their_test_split(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "HUTTER_BYTES", 12)
    monkeypatch.setattr(corpora, "HUTTER_TEST_BYTES", 5)
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.write_bytes(b"abcdef\xc3" + b"\xa9-hi\xc3")
    part.write_text("abcdé", encoding="utf-8")
    # Both ends of the split cut a character.
    corpus = corpora.read_enwik8(str(whole))
    assert (corpus.text, corpus.num_characters) == ("-hi", 3)
    corpus = corpora.read_enwik8(str(part))
    assert (corpus.text, corpus.num_characters) == ("abcdé", 6)
    whole.write_text("abcdefg hijk")
    assert corpora.read_text8(str(whole)).text == " hijk"


def test_documents_of_the_pile(tmp_path):
    path = tmp_path / "pile.jsonl"
    path.write_text('{"text": "ab", "meta": {"pile_set_name": "Github"}}\n\n{"text": "c", "meta": "x"}\n{"text": ""}\n')
    found = corpora.read_documents(str(path))
    assert [(one.text, one.subset) for one in found.documents] == [("ab", "Github"), ("c", "")]


def test_last_words(tmp_path):
    openai, original = tmp_path / "a.jsonl", tmp_path / "b.txt"
    openai.write_text(json.dumps({"text": "She said, “yes,\nmy dear"}) + "\n", encoding="utf-8")
    original.write_text("one two three\n\nfour five\n")
    found = read_lambada(str(openai))
    assert (found.variant, found.pairs) == ("openai", (("She said, “yes,\nmy", " dear"),))
    found = read_lambada(str(original))
    assert (found.variant, found.pairs) == ("original", (("one two", " three"), ("four", " five")))
    spans = last_word_spans(found, lambda text: list(text.encode()), [], 100)
    assert [(one.begin, one.start, one.end) for one in spans] == [(0, 7, 13), (0, 4, 9)]
    (cut, _) = last_word_spans(found, lambda text: list(text.encode()), [0], 8)
    assert (cut.begin, cut.start, cut.end, cut.length) == (5, 8, 14, 8)
    assert found.without_word == ()
    original.write_text("one two .\nit is 5\nfour s!\n“ — ”\n", encoding="utf-8")
    assert read_lambada(str(original)).without_word == (1, 4)


def test_lambada_metrics():
    metrics = lambada_metrics([Score(1.0, 2, True), Score(3.0, 1, False)])
    assert metrics == {"passages": 2, "accuracy": 0.5, "perplexity": pytest.approx(7.389056)}
    assert lambada_metrics([Score(1.0, 2, True)], 1)["cut_passages"] == 1


@pytest.mark.parametrize(
    ("reader", "content", "said"),
    [
        (corpora.read_plain, b"", "is empty"),
        (corpora.read_enwik8, b"", "is empty"),
        (corpora.read_wikitext, b"Some text.", "so it is not WikiText"),
        (corpora.read_penn_treebank, b"the Cat", "the word 'Cat'"),
        (corpora.read_text8, b"a text with a point.", "the character '.'"),
        (corpora.read_enwik8, b"\xe9t\xe9 et", "is not UTF-8"),
        (corpora.read_documents, b'{"text": 3}', 'line 1, has no string under the key "text"'),
        (corpora.read_documents, b"\n[1]\n", "line 2 .* is not a JSON object: it is a list"),
        (corpora.read_documents, b'{"text": ""}', "no document with text"),
        (read_lambada, b"word\n", "line 1, has no passage of two words"),
        (read_lambada, b'{"text": null}\n', "line 1, has no passage of two words"),
        (read_lambada, b'{"text": \n', "line 1 .* is not a JSON object"),
        (read_lambada, b"\n", "has no passages"),
    ],
)
def test_files_of_another_format_are_refused(reader, content, said, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        reader(str(path))


def test_missing_files():
    for reader in (*corpora.READERS.values(), corpora.read_documents, read_lambada):
        with pytest.raises(DataError, match="nowhere: No such file"):
            reader("nowhere")
