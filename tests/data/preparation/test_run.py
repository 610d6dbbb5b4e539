"""Preprocessing end to end: the bytes of Megatron's tools, for any workers, units and interruptions."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.report import Summary, UnitReport
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.tokenizer.build import build_tokenizer


class Interrupt(ProgressDisplay):
    """Simulates Ctrl-C after some steps."""

    def __init__(self, after):
        self.left = after

    def advance(self, step):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("keep_empty", [False, True])
@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_equal_those_of_megatrons_tools(make, look, tokenizer, keep_empty, append_eod):
    library = build_tokenizer(tokenizer)
    wanted = look.original(look.texts, library.encode, library.eod if append_eod else None, keep_empty)
    prefix = make(append_eod=append_eod, empty_documents="keep" if keep_empty else "skip")
    assert look.files(prefix)[:2] == look.bytes_of(wanted)


@pytest.mark.slow
def test_output_is_independent_of_workers_and_units(make, look):
    one = look.files(make("one", append_eod=True))
    assert look.files(make("two", append_eod=True, workers=2)) == one
    for unit_bytes in (170, 10**9):
        other = look.files(make(f"u{unit_bytes}", append_eod=True, unit_bytes=unit_bytes))
        assert other[:2] == one[:2]


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
def test_interrupted_runs_are_continued(make, look, tmp_path, shuffle):
    whole = look.files(make("whole", shuffle=shuffle))
    for after in (0, 1, 0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            make("cut", Interrupt(after), shuffle=shuffle)
        assert not list(tmp_path.glob("cut_*")), "no file under the final name"
        assert (tmp_path / "cut.partial").is_dir()
    assert look.files(make("cut", shuffle=shuffle)) == whole
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.slow
def test_runs_are_continued_with_another_number_of_workers(make, look, tmp_path):
    """Units are finished by this process, by workers, and again by this process."""
    keys = {"json_keys": ("text", "title"), "append_eod": True}
    whole = look.files(make("whole", **keys))
    for workers, after in ((1, 5), (2, 6), (1, 2)):
        with pytest.raises(KeyboardInterrupt):
            make("cut", Interrupt(after), workers=workers, **keys)
    assert look.files(make("cut", **keys)) == whole
    assert look.files(str(tmp_path / "cut"), "_title_document") == look.files(
        str(tmp_path / "whole"), "_title_document"
    )


def test_progress_reaches_the_end_of_the_input(make, corpus, tmp_path):
    """Also with units within one long line, compressed files, and blank lines at the end."""
    steps = []

    class Steps(ProgressDisplay):
        def advance(self, step):
            steps.append(step)

    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "word " * 2000}) + "\n\n", encoding="utf-8")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    names = (str(path), str(corpus), str(packed))
    make(progress=Steps(), inputs=names, unit_bytes=1000)
    assert sum(step.input_bytes for step in steps) == sum(Path(name).stat().st_size for name in names)


@pytest.mark.slow
def test_killed_runs_are_continued(corpus, tokenizer, tmp_path, look, make):
    big = tmp_path / "big.jsonl"
    big.write_bytes((corpus.read_bytes() + b"\n") * 320)  # five units
    whole = look.files(make("whole", inputs=(str(big),), unit_bytes=None))
    args = ["--input", str(big), "--vocab", tokenizer.vocab_file, "--merge", tokenizer.merge_file]
    args += ["--output-prefix", str(tmp_path / "killed"), "--workers", "2", "--no-fast-tokenizer"]
    start = "import sys; from megatron_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "preprocess", *args]
    for wanted in (1, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(list((tmp_path / "killed.partial").glob("*.json"))) < wanted:
            time.sleep(0.01)
        assert process.poll() is None, "the process ended before it was killed"
        process.send_signal(signal.SIGKILL)
        assert "Traceback" not in process.communicate()[1], "workers end without a traceback"
        assert not list(tmp_path.glob("killed_*"))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--data-path" in done.stdout
    assert "units are done" in done.stderr
    assert look.files(tmp_path / "killed") == whole
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Already complete" in again.stdout


@pytest.mark.slow
def test_several_keys(make, look):
    prefix = make(json_keys=("text", "title"), workers=2)
    alone = make("alone", json_keys=("title",))
    assert look.files(prefix, "_title_document")[:2] == look.files(alone, "_title_document")[:2]
    assert look.files(prefix)[:2] == look.files(make("text"))[:2]


@pytest.mark.slow
def test_compressed_and_several_inputs_are_read_in_order(make, look, corpus, tmp_path):
    pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet
    import zstandard

    content = corpus.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content[:70]) + zstandard.compress(content[70:]))
    rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    plain = look.documents(make("plain"))
    names = (str(corpus), str(tmp_path / "?.*"))
    assert look.documents(make("all", inputs=names)) == plain * 4
    assert look.documents(make("two", inputs=names, workers=2)) == plain * 4


def test_filtered_documents_are_counted(make, look, tokenizer):
    encode = build_tokenizer(tokenizer).encode
    prefix = make(min_tokens=5, max_tokens=100, min_chars=3)
    kept = [text for text in look.texts if len(text) >= 3 and 5 <= len(encode(text)) <= 100]
    assert look.documents(prefix) == [encode(text) for text in kept]
    report = json.loads(Path(f"{prefix}_text_document.manifest.json").read_text(encoding="utf-8"))["report"]
    dropped = report["too_few_chars"] + report["too_few_tokens"] + report["too_many_tokens"]
    assert (report["documents"], report["blank"]) == (len(kept), 1)
    assert dropped + len(kept) == len(look.texts)
    assert report["document_bytes"] == sum(len(text.encode()) for text in kept)


@pytest.mark.slow
def test_samples_keep_the_order_of_the_input(make, look):
    every, half = look.documents(make("every")), look.documents(make("half", sample=0.5))
    assert 0.35 * len(every) < len(half) < 0.65 * len(every)
    rest = iter(every)
    assert all(document in rest for document in half)
    assert look.files(make("again", sample=0.5, workers=2)) == look.files(make("half2", sample=0.5))
    assert look.documents(make("other", sample=0.5, seed=5)) != half


def test_complete_output_is_not_overwritten(make, look, corpus, tmp_path):
    prefix = make()
    before = Path(f"{prefix}_text_document.bin").stat().st_mtime_ns
    make()
    assert Path(f"{prefix}_text_document.bin").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="--overwrite"):
        make(append_eod=True)
    make(append_eod=True, overwrite=True)
    other = tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes())
    with pytest.raises(DataError, match="--overwrite"):
        make(append_eod=True, inputs=(str(other),))


@pytest.mark.parametrize("left", [(".bin",), (".json",), ("plan", ".json")])
def test_output_is_complete_after_an_interrupted_cleanup(make, look, tmp_path, monkeypatch, left):
    """The process is killed after some of the files are deleted."""

    def killed(folder, **_):
        for path in Path(folder).iterdir():
            if not path.name.endswith(left):
                path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            make()
    before = look.files(str(tmp_path / "out"))
    assert look.files(make()) == before
    assert not (tmp_path / "out.partial").exists()


def test_complete_output_next_to_unfinished_work_of_another_command(make, look, tmp_path):
    whole = look.files(make())
    with pytest.raises(KeyboardInterrupt):
        make("out", Interrupt(2), append_eod=True, overwrite=True)
    assert look.files(make()) == whole
    assert list(tmp_path.glob("out.partial/*.json")), "the work of the other command is kept"


def test_unfinished_work_of_another_command_is_not_used(make, look):
    with pytest.raises(KeyboardInterrupt):
        make("x", Interrupt(4))
    assert look.files(make("x", append_eod=True)) == look.files(make("y", append_eod=True))


def test_one_run_at_a_time(make, tmp_path):
    from megatron_lite.data.preparation.work_folder import WorkFolder

    folder = WorkFolder(str(tmp_path / "out"), "plan")
    with pytest.raises(DataError, match=f"is in use by another preprocessing run: process {os.getpid()} on"):
        make()
    folder.release()
    make()


def test_shards_lost_in_a_power_failure_are_made_again(tmp_path):
    """They were not synced: files end early, are empty or missing."""
    from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
    from megatron_lite.data.preparation.work_folder import FinishedUnit, Shard, WorkFolder, mark_finished

    prefix = str(tmp_path / "out")
    folder = WorkFolder(prefix, "plan")
    for number in range(5):
        with IndexedDatasetWriter(folder.path / f"{number}", np.uint16, synced=False) as writer:
            writer.add_document([1, 2, 3])
        shard = Shard(str(folder.path / f"{number}"), 6, 0, (1, 1, 3))
        mark_finished(folder.path, {number: FinishedUnit([shard], UnitReport())}, sync=False)
    folder.release()
    for name, size in (("0.bin", 4), ("1.idx", 0), ("000002.json", 0)):
        os.truncate(folder.path / name, size)
    (folder.path / "4.bin").unlink()
    folder = WorkFolder(prefix, "plan")
    assert list(folder.finished()) == [3]
    assert sorted(path.name for path in folder.path.glob("*.bin")) == ["3.bin"]
    folder.release()


def test_bytes_per_token_refer_to_the_output():
    assert "bytes per token    2.50" in Summary(UnitReport(text_bytes=1000, document_bytes=5, tokens=2)).text()


def test_outliers_are_in_the_manifest(make, corpus, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "=- " * 20000}) + "\n", encoding="utf-8")
    report = json.loads(Path(f"{make(inputs=(str(path),))}_text_document.manifest.json").read_text(encoding="utf-8"))[
        "report"
    ]
    assert report["longest"][0].startswith(f"{path}:2 ")
    assert report["repetitive"][0].startswith(f"{path}:2 ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"sample": 0.0},
        {"sample": 2.0},
        {"min_tokens": -1},
        {"max_tokens": 3, "min_tokens": 4},
        {"json_keys": ()},
        {"json_keys": ("a", "a")},
        {"seed": -1},
        {"min_chars": -1},
        {"max_line_bytes": 0},
    ],
)
def test_invalid_options(make, wrong):
    with pytest.raises(ConfigError, match="--"):
        make(**wrong)
