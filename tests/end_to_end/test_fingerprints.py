"""A run goes on with the data that it began with: what is another is named, what has only moved is not."""

from __future__ import annotations

import shutil
from unittest import mock

import pytest
from support.trainer import checkpoints, command, preprocess

from megatron_lite.config.arguments import parse_run
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.train import assemble, comparison, provenance

pytestmark = pytest.mark.slow


@pytest.fixture
def moved(corpus, tmp_path):
    """A copy of the first dataset under another name, without its manifest."""
    for ending in ("bin", "idx"):
        shutil.copy(f"{corpus.data[0]}.{ending}", tmp_path / f"moved.{ending}")
    return tmp_path / "moved"


def job(corpus, save, iterations, *words, data=None):
    """A job of so many iterations in all, at a constant rate, so that a longer one is no other schedule."""
    lengths = ("--train-iters", iterations, "--lr-decay-style", "constant", "--save-interval", 2)
    return command(*corpus.job(*lengths, "--save", save, "--load", save, *words, data=data))


def test_data_may_move_and_must_not_change(corpus, moved, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2).code == 0
    prints = read_manifest(save / "iter_0000002").provenance.fingerprints
    assert prints["data source 1"].endswith(f" of {corpus.data[0]}")
    shown = command("checkpoint", "inspect", save).out
    assert " ".join(shown.split()).count(prints["data source 1"].partition(" of ")[0]) == 1
    assert job(corpus, save, 4, data=moved).code == 0

    other = job(corpus, save, 6, data=corpus.data[1])
    assert other.code == 1
    assert prints["data source 1"].partition(" of ")[0] in other.err
    assert f" of {moved}" in other.err and f" of {corpus.data[1]}" in other.err
    assert "--accept-changed data" in other.err
    accepted = job(corpus, save, 6, "--accept-changed", "data", data=corpus.data[1])
    assert accepted.code == 0, accepted.err
    assert "WARNING: going on with what --accept-changed accepts:\n  data source 1: " in accepted.out
    # From there on, this is the data.
    assert job(corpus, save, 8, data=corpus.data[1]).code == 0
    assert checkpoints(save)[-1] == "iter_0000008"


def test_the_same_path_with_other_text(corpus, moved, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2, data=moved).code == 0
    text = corpus.text.read_text().splitlines(keepends=True)
    (tmp_path / "less.jsonl").write_text("".join(text[:-1]))
    assert preprocess(tmp_path / "less.jsonl", tmp_path / "new", corpus.tokenizer).code == 0
    for ending in ("bin", "idx"):
        shutil.copy(tmp_path / f"new_text_document.{ending}", tmp_path / f"moved.{ending}")
    result = job(corpus, save, 4, data=moved)
    assert result.code == 1
    assert "data source 1: " in result.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--seed", 7), "data order: "),
        (("--split", "70,20,10"), "data order: "),
        (("--data-path", 0.5, 0, 0.5, 1), "data source 1: "),
        (("--data-path", 0.3, 0), "data source 2: "),
        (("--data-path", 0.3, 0, 0.7, 1, 0.1, 0), "data source 3: nothing in the checkpoint"),
    ],
)
def test_a_changed_blend_is_told(corpus, tmp_path, change, told):
    save = tmp_path / "run"
    one, two = corpus.data
    assert job(corpus, save, 2, "--data-path", 0.3, one, 0.7, two).code == 0
    words = [{"0": str(one), "1": str(two)}.get(str(word), word) for word in change]
    base = () if "--data-path" in change else ("--data-path", 0.3, one, 0.7, two)
    result = job(corpus, save, 4, *base, *words)
    assert result.code == 1
    assert told in result.err


def test_a_run_that_begins_anew_or_only_evaluates_takes_any_data(corpus, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2).code == 0
    for words in (("--finetune",), ("--reset-iteration",)):
        given = corpus.job("--train-iters", 2, "--lr-decay-style", "constant", "--load", save, *words)
        assert command(*given, "--data-path", corpus.data[1]).code == 0
    assert job(corpus, save, 2, "--skip-train", data=corpus.data[1]).code == 0


def test_edited_code_is_told(corpus, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2).code == 0
    with mock.patch.object(provenance, "code_fingerprint", lambda package: "edited"):
        result = job(corpus, save, 4)
        assert result.code == 1
        assert "  code: " in result.err and "edited" in result.err and "--accept-changed code" in result.err
        assert job(corpus, save, 4, "--accept-changed", "code").code == 0


def fingerprints_on(backend, words):
    """On one rank: what its manifests would say. Only the first of a node may look at the data for it."""
    config = parse_run(words, world_size=backend.world_size).config
    look = comparison.data_fingerprints if backend.rank == 0 else None
    with mock.patch.object(comparison, "data_fingerprints", look), assemble.assembled(config, backend) as run:
        return run.state.provenance.fingerprints


def test_all_ranks_are_told_what_one_has_read(corpus, on_ranks, tmp_path):
    words = [str(word) for word in corpus.job("--train-iters", 2, "--save", tmp_path, "--save-interval", 2)][1:]
    one, two = on_ranks(2, fingerprints_on, words)
    assert one == two
    assert set(one) == {"tokenizer", "code", "data order", "data source 1"}
