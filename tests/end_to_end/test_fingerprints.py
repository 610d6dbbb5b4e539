"""Data fingerprints on resume: changed data is an error, moved data is accepted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from unittest import mock

import pytest
from support.trainer import checkpoints, command, preprocess

import megatron_lite
from megatron_lite.config.arguments import parse_run
from megatron_lite.runs.code_version import PACKAGE, source_hashes
from megatron_lite.runs.manifest import encode_manifest, read_manifest
from megatron_lite.train import assemble, comparison

pytestmark = pytest.mark.slow


@pytest.fixture
def moved(corpus, tmp_path):
    """Return a copy of the first dataset under another name, without manifest."""
    for ending in ("bin", "idx"):
        shutil.copy(f"{corpus.data[0]}.{ending}", tmp_path / f"moved.{ending}")
    return tmp_path / "moved"


def job(corpus, save, iterations, *args, data=None):
    """Return a job with `iterations` iterations and a constant learning rate, independent of the length."""
    lengths = ("--train-iters", iterations, "--lr-decay-style", "constant", "--save-interval", 2)
    return command(*corpus.job(*lengths, "--save", save, "--load", save, *args, data=data))


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
    assert "WARNING: continuing with changes that --accept-changed accepts:\n  data source 1: " in accepted.out
    # From there on, the new data is the data of the run.
    assert job(corpus, save, 8, data=corpus.data[1]).code == 0
    assert checkpoints(save)[-1] == "iter_0000008"


def test_the_same_path_with_other_text(corpus, moved, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2, data=moved).code == 0
    text = corpus.text.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "less.jsonl").write_text("".join(text[:-1]), encoding="utf-8")
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
        (("--data-path", 0.3, 0, 0.7, 1, 0.1, 0), "data source 3: "),
    ],
)
def test_a_changed_blend_is_reported(corpus, tmp_path, change, told):
    save = tmp_path / "run"
    one, two = corpus.data
    assert job(corpus, save, 2, "--data-path", 0.3, one, 0.7, two).code == 0
    args = [{"0": str(one), "1": str(two)}.get(str(word), word) for word in change]
    base = () if "--data-path" in change else ("--data-path", 0.3, one, 0.7, two)
    result = job(corpus, save, 4, *base, *args)
    assert result.code == 1
    assert told in result.err


def test_a_fresh_start_or_an_evaluation_accepts_any_data(corpus, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2).code == 0
    for args in (("--finetune",), ("--reset-iteration",)):
        given = corpus.job("--train-iters", 2, "--lr-decay-style", "constant", "--load", save, *args)
        assert command(*given, "--data-path", corpus.data[1]).code == 0
    assert job(corpus, save, 2, "--skip-train", data=corpus.data[1]).code == 0


def test_changed_code_is_a_warning_with_both_revisions_and_the_changed_files(corpus, tmp_path):
    save, version = tmp_path / "run", megatron_lite.__version__
    sources = source_hashes(PACKAGE)
    edited = {**sources, "train/loop.py": "0123456789ab", "train/new.py": "ba9876543210"}
    with mock.patch.object(assemble, "git_revision", lambda package: "aaaaaaaaaaaa"):
        assert job(corpus, save, 2).code == 0
        unchanged = job(corpus, save, 4)
        assert unchanged.code == 0 and "the code has changed" not in unchanged.out
    with (
        mock.patch.object(assemble, "git_revision", lambda package: "bbbbbbbbbbbb"),
        mock.patch.object(assemble, "source_hashes", lambda package: edited),
    ):
        result = job(corpus, save, 6)
        assert result.code == 0, result.err
        assert (
            "WARNING: the code has changed since the checkpoint was saved, from "
            f"megatron_lite {version} at git revision aaaaaaaaaaaa to megatron_lite {version} at git revision "
            "bbbbbbbbbbbb. Changed files: train/loop.py, train/new.py."
        ) in result.out
        # The checkpoint that this job saved is of the edited code; the flag of earlier versions is still accepted.
        again = job(corpus, save, 8, "--accept-changed", "code")
        assert again.code == 0 and "the code has changed" not in again.out


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(corpus, tmp_path):
    save = tmp_path / "run"
    assert job(corpus, save, 2).code == 0
    path = save / "iter_0000002"
    manifest = read_manifest(path)
    prints = {**manifest.provenance.fingerprints, "code": "megatron_lite 0.0.1 0123456789abcdef"}
    older = replace(manifest, provenance=replace(manifest.provenance, fingerprints=prints, sources={}))
    (path / "manifest.json").write_bytes(encode_manifest(older))
    result = job(corpus, save, 4)
    assert result.code == 0, result.err
    assert "from megatron_lite 0.0.1 0123456789abcdef to megatron_lite" in result.out
    assert "Changed files" not in result.out


def fingerprints_on(backend, args):
    """Return the fingerprints of manifests on one rank; only the first rank of a node may read the data."""
    config = parse_run(args, world_size=backend.world_size).config
    look = comparison.data_fingerprints if backend.rank == 0 else None
    with mock.patch.object(comparison, "data_fingerprints", look), assemble.assembled(config, backend) as run:
        return run.state.provenance.fingerprints


def test_all_ranks_save_the_fingerprints_that_one_has_read(corpus, on_ranks, tmp_path):
    args = [str(word) for word in corpus.job("--train-iters", 2, "--save", tmp_path, "--save-interval", 2)][1:]
    one, two = on_ranks(2, fingerprints_on, args)
    assert one == two
    assert set(one) == {"tokenizer", "code", "data order", "data source 1"}
