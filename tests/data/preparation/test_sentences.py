"""--split-sentences with a punkt model that is learnt here: sentences as the originals cut and store them."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.sentences import SentenceSplitter
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.build import build_tokenizer

pytestmark = pytest.mark.slow  # imports nltk

TEXT = "Dr. Low sat.  The cat sat too.\n\nA mat! (It was red.) Was it?"
WHOLE = ["Dr. Low sat.", "The cat sat too.", "A mat!", "(It was red.)", "Was it?"]
KEPT = ["Dr. Low sat.  ", "The cat sat too.\n\n", "A mat! ", "(It was red.)", "Was it?"]


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A folder of nltk data with a model that knows one abbreviation."""
    nltk = pytest.importorskip("nltk")
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    parameters = PunktParameters()
    parameters.abbrev_types = {"dr"}
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.parent.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk_data"))  # for worker processes
    save_punkt_params(parameters, dir=str(folder))


def test_cutting(punkt):
    plain, keeping = SentenceSplitter("english", False), SentenceSplitter("english", True)
    assert plain.split(TEXT) == WHOLE
    assert keeping.split(TEXT) == KEPT
    assert keeping.split(TEXT) == list(originals_splitter().tokenize(TEXT))
    assert plain.split("") == keeping.split("") == [""]


def originals_splitter():
    """What both Megatrons build for --keep-newlines: punkt's rules with two changed lines, on the loaded model."""
    from nltk.tokenize import punkt

    class Variables(punkt.PunktLanguageVars):
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    return punkt.PunktSentenceTokenizer(punkt.PunktTokenizer("english")._params, lang_vars=Variables())


@pytest.mark.parametrize(("keep_newlines", "workers"), [(False, 1), (True, 2)])
def test_a_sequence_for_each_sentence(punkt, make, tokenizer, tmp_path, keep_newlines, workers):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "", "one", TEXT)), encoding="utf-8")
    prefix = make(
        inputs=(str(path),),
        split_sentences=True,
        keep_newlines=keep_newlines,
        append_eod=True,
        workers=workers,
        unit_bytes=60,
    )
    library = build_tokenizer(tokenizer)
    wanted = [library.encode(sentence) for sentence in (KEPT if keep_newlines else WHOLE)]
    wanted[-1].append(library.eod)
    made = IndexedDataset(f"{prefix}_text_sentence")
    assert made.document_index.tolist() == [0, 5, 6, 11]
    assert [made.get(i).tolist() for i in range(5)] == wanted
    assert [made.get(i).tolist() for i in range(6, 11)] == wanted


def test_another_model_is_another_plan(punkt, make, tmp_path, look):
    make(split_sentences=True)
    abbreviations = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english" / "abbrev_types.txt"
    abbreviations.write_text(abbreviations.read_text(encoding="utf-8") + "\nmat", encoding="utf-8")
    with pytest.raises(DataError, match="--overwrite"):
        make(split_sentences=True)
    with pytest.raises(KeyboardInterrupt):
        make("cut", Interrupted(), split_sentences=True)
    abbreviations.write_text("dr")
    make("cut", split_sentences=True)
    made, whole = (look.files(str(tmp_path / name), "_text_sentence") for name in ("cut", "out"))
    assert made == whole


class Interrupted(ProgressDisplay):
    """Ctrl-C after the first step."""

    def advance(self, step):
        raise KeyboardInterrupt


@pytest.mark.parametrize("language", ["klingon", "../english"])
def test_a_language_without_data(punkt, make, tmp_path, language):
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"tokenizers/punkt_tab/.* in any of .*nltk_data.*nltk.downloader"):
            make(split_sentences=True, language=language, workers=workers)


def test_without_nltk(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(DataError, match=r"is not installed.*-e .*\[sentences\]"):
        make(split_sentences=True)
