"""BOS and EOD tokens of documents, and the plans by which interrupted work is continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, processors

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.manifest import read_manifest, write_manifest
from megatron_lite.data.preparation import run
from megatron_lite.data.preparation.assembly import Assembly
from megatron_lite.data.preparation.batch import Batch
from megatron_lite.data.preparation.merge import merge_datasets
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.run import preprocess
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.build import build_tokenizer


@pytest.fixture
def template(tokenizer, tmp_path):
    """A tokenizer.json whose template adds BOS and EOS."""
    library = tokenizers.Tokenizer.from_file(str(Path(tokenizer.vocab_file).with_name("tokenizer.json")))
    library.add_special_tokens(["<s>", "</s>"])
    ends = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return TokenizerConfig(type="HuggingFaceTokenizer", model=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("bos", "eod"), [(False, False), (False, True), (True, False), (True, True)])
def test_bos_and_eod_are_added_once_if_requested(make, look, template, bos, eod, workers):
    encoder = build_tokenizer(template)
    prefix = make(tokenizer=template, append_eod=eod, prepend_bos=bos, workers=workers)
    start, end = [encoder.bos] if bos else [], [encoder.eod] if eod else []
    assert look.documents(prefix) == [[*start, *encoder.encode(text), *end] for text in look.texts if text]
    manifest = read_manifest(f"{prefix}_text_document")
    assert manifest.tokenizer["bos"] == (encoder.bos if bos else None)
    assert manifest.tokenizer["eod"] == (encoder.eod if eod else None)
    assert manifest.report["empty"] == look.texts.count("")


def test_bos_and_eod_of_documents_of_several_sentences(template):
    encoder = build_tokenizer(template)
    batch = Batch.of(encoder.encode_flat(["a", "b", "", "c"]), np.array([2, 1, 1])).with_ends(
        [7], [8], np.dtype(np.uint16)
    )
    assert batch.ids.tolist() == [7, *encoder.encode("a"), *encoder.encode("b"), 8, 7, *encoder.encode("c"), 8]
    assert batch.lengths.tolist() == [2, 2, 3]
    assert batch.sequences.tolist() == [2, 0, 1]


def test_a_tokenizer_without_bos_is_refused_at_the_start(make, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no beginning-of-text token for --prepend-bos"):
        make(prepend_bos=True)
    assert not list(tmp_path.glob("out*"))


def interrupted(options, monkeypatch):
    """Stop after two units."""

    def stop(self):
        if len(self.done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "_commit_if_due", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(options, ProgressDisplay())


class Recorder(ProgressDisplay):
    def __init__(self):
        self.lines, self.left = [], 0

    def say(self, text):
        self.lines.append(text)

    def start(self, total, todo, finished):
        self.left = finished


def test_interrupted_work_is_continued_with_the_same_rules_only(corpus, template, tmp_path, monkeypatch):
    """The vocabulary and the fingerprint are unchanged."""
    options = PreprocessOptions(
        inputs=(str(corpus),), output_prefix=str(tmp_path / "out"), tokenizer=template, unit_bytes=3000
    )
    interrupted(options, monkeypatch)
    said = Recorder()
    path = tmp_path / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    before = build_tokenizer(template).fingerprint()
    library.normalizer = normalizers.Lowercase()
    library.save(str(path))
    assert build_tokenizer(template).fingerprint() == before
    preprocess(options, said)
    assert "was deleted" in "".join(said.lines) and said.left == 0


def test_interrupted_work_of_an_older_version_is_not_continued(corpus, template, tmp_path, monkeypatch):
    """Its documents contain the tokens of the template."""
    options = PreprocessOptions(
        inputs=(str(corpus),), output_prefix=str(tmp_path / "out"), tokenizer=template, unit_bytes=3000
    )
    plan = run.plan_hash

    def older(options, sources, about, unit_bytes):
        about = {key: value for key, value in about.items() if key not in ("rules", "bos")}
        return plan(options, sources, about, unit_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(run, "plan_hash", older)
        interrupted(options, monkeypatch)
    said = Recorder()
    preprocess(options, said)
    assert "was deleted" in "".join(said.lines) and said.left == 0
    # A finished dataset of an older version is not accepted either.
    prefix = f"{tmp_path / 'out'}_text_document"
    write_manifest(prefix, replace(read_manifest(prefix), plan="older"))
    with pytest.raises(DataError, match="another command or version"):
        preprocess(options, ProgressDisplay())


def test_merging_datasets_with_different_bos_and_eod(make, template, tmp_path):
    parts = {
        name: f"{make(name, tokenizer=template, append_eod=eod, prepend_bos=bos)}_text_document"
        for name, eod, bos in (("a", True, False), ("b", False, False), ("c", True, True), ("d", True, False))
    }
    assert not merge_datasets([parts["a"], parts["d"]], str(tmp_path / "same")).warnings
    assert read_manifest(tmp_path / "same").tokenizer == read_manifest(parts["a"]).tokenizer
    (warning,) = merge_datasets([parts["a"], parts["b"]], str(tmp_path / "m")).warnings
    assert "begin or end documents with different tokens (eod" in warning
    assert "eod" not in read_manifest(tmp_path / "m").tokenizer
    old = read_manifest(parts["d"])
    older = {key: value for key, value in old.tokenizer.items() if key not in ("bos", "rules")}
    write_manifest(parts["d"], replace(old, tokenizer=older))
    (warning,) = merge_datasets([parts["a"], parts["d"]], str(tmp_path / "n")).warnings
    assert "(bos None and unknown)" in warning
    assert (
        json.loads((tmp_path / "n.manifest.json").read_text(encoding="utf-8"))["tokenizer"]["eod"]
        == old.tokenizer["eod"]
    )
