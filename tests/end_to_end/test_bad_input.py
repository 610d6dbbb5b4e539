"""Invalid files and flags: one error paragraph with a fix, and no partial output."""

from __future__ import annotations

import json
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.trainer import checkpoints, command, iterations, preprocess, status

from megatron_lite.checkpoint.verify import verify_checkpoint

pytestmark = pytest.mark.slow

SAVING = ("--train-iters", 3, "--save-interval", 1)


def assert_explained(result, *texts, kind):
    """Check for exit code 1 and one paragraph on stderr, of error class `kind`, with these texts and no traceback."""
    assert result.code == 1, result.out
    assert "Traceback" not in result.err
    text = result.err[result.err.index(f"{kind}: ") :]
    assert "\n\n" not in text
    assert "None" not in text
    for expected in texts:
        assert str(expected) in text, text


@pytest.fixture
def dataset(corpus, tmp_path):
    """Return the prefix of a copy of the first dataset."""
    prefix = tmp_path / "data"
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{corpus.data[0]}{suffix}", f"{prefix}{suffix}")
    return prefix


def part(prefix, suffix):
    return Path(f"{prefix}{suffix}")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_of_a_dataset(suffix, corpus, dataset, tmp_path):
    part(dataset, suffix).unlink()
    result = command(*corpus.job(*SAVING, "--save", tmp_path / "run", data=dataset))
    assert_explained(result, "--data-path", f'no "{dataset}{suffix}"', kind="ConfigError")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("bytes_left", [0, 1, 33, 1221])
def test_a_truncated_file_of_a_dataset(suffix, manifest, bytes_left, corpus, dataset):
    os.truncate(part(dataset, suffix), bytes_left)
    if not manifest:
        part(dataset, ".manifest.json").unlink()
    result = command(*corpus.job(*SAVING, data=dataset))
    assert_explained(result, part(dataset, suffix), f" {bytes_left:,} bytes", kind="DataError")
    assert "again" in result.err


def test_an_index_of_another_dataset(corpus, dataset, tmp_path):
    other = tmp_path / "other"
    corpus.text.with_name("half.jsonl").write_text("".join(corpus.text.open().readlines()[:60]), encoding="utf-8")
    assert preprocess(corpus.text.with_name("half.jsonl"), other, corpus.tokenizer).code == 0
    shutil.copy(f"{other}_text_document.idx", part(dataset, ".idx"))
    part(dataset, ".manifest.json").unlink()
    result = command(*corpus.job(*SAVING, data=dataset))
    assert_explained(result, part(dataset, ".bin"), "the .idx describes", kind="DataError")


def test_an_index_of_another_order_of_the_same_documents(corpus, dataset):
    """The sizes match the .bin; only the manifest differs."""
    shutil.copy(f"{corpus.data[1]}.idx", part(dataset, ".idx"))
    result = command(*corpus.job(*SAVING, data=dataset))
    assert_explained(result, part(dataset, ".idx"), "does not match its manifest", kind="DataError")


@pytest.mark.parametrize("place", [5, -1])
def test_a_token_outside_the_vocabulary(place, corpus, dataset):
    tokens = np.fromfile(part(dataset, ".bin"), np.uint16)
    tokens[place] = 301
    tokens.tofile(part(dataset, ".bin"))
    result = command(*corpus.job(*SAVING, data=dataset))
    assert_explained(
        result, dataset, "id 301", "the vocabulary has 300", "preprocess the corpus again", kind="DataError"
    )


def test_a_token_outside_the_vocabulary_found_during_training(corpus, dataset, tmp_path):
    """Opening a dataset checks samples of it; other invalid tokens stop the run at the affected sample."""
    tokens = np.fromfile(part(dataset, ".bin"), np.uint16)
    args = corpus.job(
        *SAVING,
        "--save",
        tmp_path / "run",
        data=dataset,
    )
    index = np.fromfile(part(dataset, ".idx"), np.uint8)
    sizes = np.frombuffer(index, "<i4", 120, 34)
    probed = set(np.unique(np.linspace(0, 119, 64).astype(int)))
    for document in range(96):  # of training
        if document not in probed:
            tokens[sizes[:document].sum() :][: sizes[document]] = 301
    tokens.tofile(part(dataset, ".bin"))
    result = command(*args)
    assert_explained(result, "id 301", kind="DataError")
    assert "model " in result.out, "the run had begun"
    assert status(tmp_path / "run")["status"] == "error"


@pytest.mark.parametrize("lines", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_corpus(lines, corpus, tmp_path):
    text = tmp_path / "empty.jsonl"
    text.write_text(lines, encoding="utf-8")
    result = preprocess(text, tmp_path / "out", corpus.tokenizer)
    assert_explained(result, "--input", "--json-keys", kind="DataError")
    assert not list(tmp_path.glob("out_*"))


def test_a_broken_line_is_named_or_counted(corpus, tmp_path):
    text = tmp_path / "broken.jsonl"
    text.write_text('{"text": "abc def"}\n{"text": "abc\n{"text": "gha"}\n[]\n')
    result = preprocess(text, tmp_path / "out", corpus.tokenizer)
    assert_explained(
        result, f"{text}:2: not JSON: Invalid control character at character 14", "--skip-bad-lines", kind="DataError"
    )
    assert not list(tmp_path.glob("out_*"))
    result = preprocess(text, tmp_path / "out", corpus.tokenizer, "--skip-bad-lines")
    assert result.code == 0
    assert "bad lines skipped  2" in result.out
    assert f"{text}:2 " in result.out
    assert f"{text}:4 " in result.out
    assert command(*corpus.job(*SAVING, "--split", "1,0,0", data=tmp_path / "out_text_document")).code == 0


def test_a_tokenizer_other_than_that_of_the_data(corpus, tmp_path):
    other = tmp_path / "other"
    args = ("train-tokenizer", "--input", corpus.text, "--output", other, "--vocab-size", 290)
    assert command(*args).code == 0
    result = command(*corpus.job(*SAVING, "--tokenizer-model", other))
    assert_explained(result, corpus.data[0], "fingerprint", "preprocess the corpus again", kind="DataError")


def limit_files(size):
    """Limit files of this process to `size` bytes: writes fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("mode", [(), ("--async-save",)])
def test_full_disk_during_a_checkpoint(mode, corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SAVING, *mode, "--save", save, "--load", save)
    assert command(*args, "--exit-after-iters", 1).code == 0
    result = start(args, partial(limit_files, 100_000)).wait()
    assert_explained(result, "iteration 2", save, "Earlier checkpoints are untouched", kind="CheckpointError")
    assert checkpoints(save) == ["iter_0000001"]
    verify_checkpoint(save / "iter_0000001")
    assert (status(save)["status"], status(save)["saved_iteration"]) == ("error", 1)
    assert command(*args).code == 0
    assert iterations(save) == [1, 2, 3]


def test_full_disk_for_metrics(corpus, start, tmp_path):
    args = corpus.job("--train-iters", 50, "--metrics-file", tmp_path / "metrics.jsonl")
    result = start(args, partial(limit_files, 10_000)).wait()
    assert_explained(result, tmp_path / "metrics.jsonl", "--metrics-file", kind="TrainingError")


def test_full_disk_for_a_dataset(corpus, start, tmp_path):
    args = ("preprocess", "--input", corpus.text, "--output-prefix", tmp_path / "out", "--append-eod")
    args += ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", corpus.tokenizer)
    result = start(args, partial(limit_files, 8_000)).wait()
    assert_explained(result, tmp_path / "out", "ulimit -f", kind="DataError")
    assert not list(tmp_path.glob("out_*"))
    assert command(*args).code == 0
    assert command(*corpus.job(*SAVING, data=tmp_path / "out_text_document")).code == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--tran-iters", 3), "Did you mean --train-iters?"),
        (("--hidden-sise=16",), "Did you mean --hidden-size?"),
        (("--eval-itres", 3), "Did you mean --eval-iters?"),
        (("--seed", "abc"), "--seed abc"),
        (("--seed",), "--seed with nothing after it"),
    ],
)
def test_a_typo(args, expected, corpus):
    assert_explained(command(*corpus.job("--train-iters", 3, *args)), expected, kind="ConfigError")


@pytest.mark.parametrize(
    ("flag", "kind"),
    [("--save", "CheckpointError"), ("--load", "CheckpointError"), ("--tensorboard-dir", "ConfigError")],
)
def test_a_file_in_place_of_a_folder(flag, kind, corpus, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    result = command(*corpus.job(*SAVING, flag, file))
    assert_explained(result, flag, file, kind=kind)
    assert file.read_text(encoding="utf-8") == "mine"
    assert "model " not in result.out, "it was noticed before anything was built"


@pytest.mark.parametrize(
    ("flag", "kind"),
    [("--data-path", "ConfigError"), ("--metrics-file", "TrainingError"), ("--tokenizer-model", "DataError")],
)
def test_a_folder_in_place_of_a_file(flag, kind, corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    assert_explained(command(*corpus.job(*SAVING, flag, folder)), folder, kind=kind)
    assert (folder / "precious").read_text(encoding="utf-8") == "mine"


def test_a_metrics_file_that_is_something_else(corpus):
    before = corpus.text.read_bytes()
    result = command(*corpus.job(*SAVING, "--metrics-file", corpus.text))
    assert_explained(result, corpus.text, kind="DataError")
    assert corpus.text.read_bytes() == before


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir"])
def test_a_folder_that_is_not_writable(flag, corpus):
    """/proc rejects writes even as root."""
    result = command(*corpus.job(*SAVING, flag, "/proc/megatron_lite"))
    assert_explained(result, f"{flag} ", "/proc/megatron_lite", kind="Error")
    assert "model " not in result.out


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Return the --save folder of a run of three iterations, each saved; read-only."""
    save = tmp_path_factory.mktemp("finished") / "run"
    assert command(*corpus.job(*SAVING, "--save", save)).code == 0
    return save


def test_a_save_that_holds_a_longer_run(corpus, finished):

    def content():
        files = [path for path in finished.rglob("*") if path.name != "exit_status.json"]
        return {path: path.is_file() and path.read_bytes() for path in files}

    before = content()
    result = command(*corpus.job(*SAVING, "--save", finished))
    assert_explained(
        result,
        f"--save {finished} contains the checkpoint iter_0000003",
        f"Add --load {finished}",
        kind="CheckpointError",
    )
    args = ("--save", finished, "--load", finished, "--load-iteration", 1)
    result = command(*corpus.job(*SAVING, *args))
    assert_explained(result, "starts at iteration 1", "Remove --load-iteration", kind="CheckpointError")
    assert content() == before
    assert status(finished)["status"] == "error", "the last job was refused"


def test_a_checkpoint_of_another_model(corpus, finished):
    args = ("--load", finished, "--num-layers", 3, "--normalization", "RMSNorm")
    result = command(*corpus.job(*SAVING, *args))
    expected = "\n  --normalization: LayerNorm in the checkpoint, RMSNorm now\n  --num-layers: 2 in the"
    assert_explained(result, expected, "Give these flags the values of the checkpoint", kind="CheckpointError")


def test_a_checkpoint_of_another_tokenizer(corpus, finished, tmp_path):
    """The vocabulary has the same size; only the fingerprint differs."""
    args = json.loads((corpus.tokenizer / "vocab.json").read_text(encoding="utf-8"))
    other = tmp_path / "tokenizer"
    shutil.copytree(corpus.tokenizer, other)
    (other / "tokenizer.json").unlink()
    names = sorted(args, key=args.get)
    names[10], names[11] = names[11], names[10]
    (other / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    assert preprocess(corpus.text, tmp_path / "data", other).code == 0
    args = ("--train-iters", 5, "--load", finished, "--tokenizer-model", other, "--override-opt_param-scheduler")
    args = corpus.job(*args, data=tmp_path / "data_text_document")
    assert_explained(command(*args), "tokenizer: ", "--accept-changed data tokenizer", kind="CheckpointError")
    assert command(*args, "--accept-changed", "data", "tokenizer").code == 0


def test_missing_checkpoints(corpus, finished, tmp_path):
    nothing = tmp_path / "nothing"
    result = command(*corpus.job(*SAVING, "--load", nothing, "--exit-on-missing-checkpoint"))
    assert_explained(result, nothing, "remove --exit-on-missing-checkpoint", kind="ConfigError")
    result = command(*corpus.job(*SAVING, "--load", finished, "--load-iteration", 7))
    assert_explained(result, "iter_0000007 does not exist", "iter_0000001, iter_0000002, iter", kind="CheckpointError")
    result = command(*corpus.job("--train-iters", 1, "--load", nothing))
    assert f"WARNING: --load {nothing} does not exist: starting from fresh weights" in result.out


def test_a_damaged_checkpoint_is_named_or_passed_over(corpus, finished, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(finished, save)
    (file,) = (save / "iter_0000003").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    job = partial(corpus.job, "--save-interval", 1, "--save", save, "--load", save, "--override-opt_param-scheduler")
    result = command(*job("--train-iters", 5))
    assert_explained(result, file, "--fallback-on-corrupt", kind="CorruptCheckpointError")
    result = command(*job("--train-iters", 5, "--fallback-on-corrupt"))
    assert result.code == 0, result.err
    assert f"skipped the damaged checkpoint iter_0000003: {file} is damaged" in result.out
    assert f"  start       after iteration 2, from {save}/iter_0000002" in result.out
    assert iterations(save) == [1, 2, 3, 4, 5]
    whole = [name for name in checkpoints(save) if ".damaged-" not in name]
    assert whole == [f"iter_{iteration:07d}" for iteration in range(1, 6)]
    assert [name.partition("-")[0] for name in checkpoints(save) if name not in whole] == ["iter_0000003.damaged"]
    for name in whole:
        verify_checkpoint(save / name)
