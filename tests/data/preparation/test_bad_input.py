"""Bad input: errors with file and line, or counted skips; no file under the final name."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.manifest import read_manifest
from megatron_lite.data.preparation.report import Summary
from megatron_lite.errors import DataError

GOOD = b'{"text": "good"}'
BAD = {
    "utf8": (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    "nul": (b'{"text": "a\x00b"}', "not JSON: Invalid control character"),
    "broken": (b'{"text": "a"', "not JSON"),
    "missing": (b'{"txt": "a"}', "no key 'text' .it has 'txt'"),
    "null": (b'{"text": null}', "the value of 'text' is null"),
    "number": (b'{"text": 3}', "the value of 'text' is int"),
    "list": (b'["text"]', "a JSON list instead of an object"),
    "twice": (b'{"text": "a", "text": "b"}', "key 'text' twice"),
    "twice, escaped": (b'{"text": "a", "\\u0074ext": "b"}', "key 'text' twice"),
    "surrogate": (b'{"text": "a\\ud800b"}', "half a surrogate pair in 'text' at character 2"),
    "deep": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "unreadable JSON"),
    "digits": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "unreadable JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_line(make, look, tmp_path, name):
    line, message = BAD[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 9 + [line] + [GOOD] * 9))
    unit_bytes = max(60, path.stat().st_size // 5)
    with pytest.raises(DataError, match=rf"in\.jsonl:10: {message}.*--skip-bad-lines"):
        make(inputs=(str(path),), unit_bytes=unit_bytes)
    assert not list(tmp_path.glob("out_*"))
    prefix = make(inputs=(str(path),), unit_bytes=unit_bytes, skip_bad_lines=True)
    assert len(look.documents(prefix)) == 18
    report = json.loads(Path(f"{prefix}_text_document.manifest.json").read_text(encoding="utf-8"))["report"]
    assert report["bad"] == 1
    assert report["bad_lines"][0].startswith(f"{path}:10 ")


@pytest.mark.parametrize("workers", [1, 2])
def test_plain_text_read_as_json(make, tmp_path, workers):
    """The error names the flag for plain text; nothing is finished, so no work folder is left."""
    path = tmp_path / "in.txt"
    path.write_text("not JSON\n" * 20, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"in\.txt:\d+: not JSON.*add --plain-text file .* or --plain-text line"
    ) as caught:
        make(inputs=(str(path),), unit_bytes=60, workers=workers)
    assert "--skip-bad-lines" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_finished_work_is_kept_after_a_bad_line(make, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 9 + [b"{"]))
    with pytest.raises(DataError, match="leave out and count such lines: the command then continues"):
        make(inputs=(str(path),), unit_bytes=60)
    assert (tmp_path / "out.partial").is_dir()
    make(inputs=(str(path),), unit_bytes=60, skip_bad_lines=True)
    assert not (tmp_path / "out.partial").exists()


def test_an_error_in_a_worker_process_is_complete(make, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 9 + [b"{"] + [GOOD] * 9))
    with pytest.raises(DataError, match=r"in\.jsonl:10: not JSON"):
        make(inputs=(str(path),), unit_bytes=60, workers=2)


def test_unusual_but_valid_lines(make, look, tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [
        b"\xef\xbb\xbf" + GOOD,
        GOOD + b"\r",
        b"",
        b'{"meta": {"text": "a"}, "text": "good"}',
        b'{"text": "\\u0000"}',
    ]
    path.write_bytes(b"\n".join(lines))
    made = look.documents(make(inputs=(str(path),)))
    assert made[0] == made[1] == made[2]
    assert len(made) == 4


def test_a_line_of_many_units(make, look, tmp_path, tokenizer):
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        file.write(json.dumps({"text": "word " * 1_000_000}) + "\n" + GOOD.decode())
    lengths = [len(ids) for ids in look.documents(make(inputs=(str(path),), unit_bytes=None))]
    assert lengths[0] > 1_000_000 > lengths[1]


def test_a_line_longer_than_memory_allows(make, look, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD, b'{"text": "' + b"a" * 3_000_000 + b'"}', GOOD]))
    with pytest.raises(DataError, match=r"in\.jsonl:2: longer than --max-line-mb"):
        make(inputs=(str(path),), unit_bytes=1 << 20, max_line_bytes=100)
    # Finished units are reused, with --skip-bad-lines as well as with a larger maximum.
    assert len(look.documents(make(inputs=(str(path),), unit_bytes=1 << 20))) == 3
    prefix = make("skip", inputs=(str(path),), unit_bytes=1 << 20, skip_bad_lines=True, max_line_bytes=100)
    report = json.loads(Path(f"{prefix}_text_document.manifest.json").read_text(encoding="utf-8"))["report"]
    assert (report["lines"], report["documents"], report["bad"]) == (3, 2, 1)


def test_inputs_that_are_not_regular_files(make, tmp_path, corpus):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for names, message in (
        ((), "No input file is given"),
        ((str(tmp_path / "folder"),), "is a folder without files"),
        ((str(tmp_path / "pipe"),), "is a pipe"),
        ((str(tmp_path / "absent.jsonl"),), "does not exist"),
        ((str(tmp_path / "*.absent"),), "matches no file"),
        ((str(corpus), str(corpus)), "more than once"),
        ((str(corpus), f"{corpus.parent}/../{corpus.parent.name}/{corpus.name}"), "more than once, also as"),
    ):
        with pytest.raises(DataError, match=message):
            make(inputs=names)


def test_empty_corpus(make, tmp_path):
    (tmp_path / "in.jsonl").touch()
    with pytest.raises(DataError, match="no tokens are left of 0 lines"):
        make(inputs=(str(tmp_path / "in.jsonl"),))
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"no tokens are left of 1 lines.*Lower --min-tokens"):
        make(inputs=(str(tmp_path / "in.jsonl"),), min_tokens=1000)
    (tmp_path / "in.jsonl").write_bytes(b"{\n\n[]")
    with pytest.raises(
        DataError, match=r"3 lines of input \(bad lines skipped 2, blank lines 1; .*in\.jsonl:1 not JSON"
    ):
        make(inputs=(str(tmp_path / "in.jsonl"),), skip_bad_lines=True)
    assert not list(tmp_path.glob("out*"))


def test_empty_inputs_among_others_are_named(make, tmp_path):
    (tmp_path / "0.jsonl").touch()
    (tmp_path / "1.jsonl").write_bytes(GOOD)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b""))
    prefix = make(inputs=(str(tmp_path / "*.jsonl*"),))
    report = read_manifest(f"{prefix}_text_document").report
    assert [Path(path).name for path in report["empty_inputs"]] == ["0.jsonl", "2.jsonl.gz"]
    summary = Summary(empty_inputs=report["empty_inputs"])
    assert "empty inputs       2" in summary.text()
    assert f"empty input        {tmp_path}/0.jsonl" in summary.text()


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_truncated_and_damaged_compressed_files(make, tmp_path, ending):
    if ending == "gz":
        pack = gzip.compress
    else:
        pack = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress
    whole = pack(b"\n".join(b'{"text": "%d"}' % (i * i) for i in range(5000)))
    path = tmp_path / f"in.jsonl.{ending}"
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:5],
        whole[:200] + b"\xaa" * 100 + whole[300:],
        b"xx",
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match="truncated or damaged" if content else f"has 0 bytes.*{ending}"):
            make(inputs=(str(path),), skip_bad_lines=True)
    assert not list(tmp_path.glob("out_*"))


def test_parquet_of_every_string_type(make, look, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "in.parquet"
    made = []
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"], kind)}), path)
        made.append(look.documents(make(inputs=(str(path),), overwrite=True)))
    assert made[0] == made[1] == made[2]


def test_parquet_without_the_column_and_damaged(make, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "in.parquet"
    for table, message in (
        (pyarrow.table({"content": ["a"]}), r"named \"text\" .*columns are content \(string\)"),
        (pyarrow.table({"text": [b"a"]}), r"columns are text \(binary\)"),
        (pyarrow.table({"text": [["a"]]}), r"columns are text \(list"),
        (pyarrow.table([["a"], ["b"]], names=["text", "text"]), r"columns are text \(string\), text \(string\)"),
    ):
        parquet.write_table(table, path)
        with pytest.raises(DataError, match=message):
            make(inputs=(str(path),), skip_bad_lines=True)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged"):
        make(inputs=(str(path),))


def test_text_that_the_tokenizer_cannot_encode_is_a_bad_line(make, look, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("1 2", "1 x", "3")), encoding="utf-8")
    numbers = TokenizerConfig(type="NullTokenizer", vocab_size=10)
    with pytest.raises(DataError, match=r"in\.jsonl:2: .*NullTokenizer cannot encode 'x'"):
        make(inputs=(str(path),), tokenizer=numbers)
    assert look.documents(make(inputs=(str(path),), tokenizer=numbers, skip_bad_lines=True)) == [[1, 2], [3]]


def test_output_folder_that_cannot_be_created(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--output-prefix"):
        make("file/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_output_folder(make, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(DataError, match="--output-prefix"):
        make("closed/out")


@pytest.mark.parametrize(
    ("method", "options", "is_full"),
    [
        ("add_batch", {}, lambda writer: writer.num_documents > 100),
        ("_write_index", {}, lambda writer: True),
        ("_write_index", {"shuffle": True}, lambda writer: "000003" in writer.prefix),
        ("_write_index", {"shuffle": True}, lambda writer: ".partial/" not in writer.prefix),
    ],
    ids=["tokens", "index", "shard", "shuffled"],
)
def test_work_continues_after_a_full_disk(make, look, tmp_path, monkeypatch, method, options, is_full):
    write = getattr(IndexedDatasetWriter, method)

    def full(self, *args):
        if is_full(self):
            with self._writing():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetWriter, method, full)
        with pytest.raises(DataError, match="No space left"):
            make(**options)
    assert not list(tmp_path.glob("out_*"))
    assert list((tmp_path / "out.partial").glob("*.json")), "finished units are kept"
    assert look.files(make(**options)) == look.files(make("whole", **options))


def test_shortened_files_of_an_interrupted_run(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetWriter, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make()
    path = tmp_path / "out.partial" / "assembled.0.bin.tmp"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"assembled\.0\.bin\.tmp: it has .* bytes of the .*Delete the folder"):
        make()
