"""Folders and tar archives of .txt files, plain and compressed, nested; bad ones are named with their members."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from megatron_lite.data.format.manifest import read_manifest
from megatron_lite.data.preparation import text_files
from megatron_lite.data.preparation.documents import Sample, iterate_texts
from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.sources import find_sources
from megatron_lite.data.preparation.text_files import list_folder, read_text_files
from megatron_lite.errors import ConfigError, DataError

TEXTS = {f"part{i % 3}/{i:03d}.txt": f"file {i}\n\nsays the cat sat\n" * (1 + i % 4) for i in range(30)}
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def tar_of(contents, **options):
    """Return an archive of files by name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def read(name, content, limit=1 << 20):
    return {file.name: file.content for file in read_text_files(name, io.BytesIO(content), limit)}


@pytest.fixture
def folder(tmp_path):
    """A folder with the texts, and files that are none."""
    path = tmp_path / "texts"
    for name, text in TEXTS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    (path / "README.md").write_text("not a document")
    (path / ".hidden.txt").write_text("not a document")
    return path


@pytest.fixture
def texts(tmp_path):
    """The same texts as JSON lines."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[name]}) + "\n" for name in sorted(TEXTS)), encoding="utf-8")
    return path


def test_a_folder_equals_its_texts_as_json_lines(make, look, folder, texts):
    """Also the report, with any number of workers, units and interruptions."""
    wanted = look.files(make("lines", inputs=(str(texts),), append_eod=True))
    for name, options in (("one", {"unit_bytes": 1 << 30}), ("units", {"unit_bytes": 300}), ("two", {"workers": 2})):
        found = look.files(make(name, inputs=(str(folder),), append_eod=True, **options))
        assert found[:2] == wanted[:2]

    class Interrupt(ProgressDisplay):
        left = 3

        def advance(self, step):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("cut", Interrupt(), inputs=(str(folder),), append_eod=True, unit_bytes=300)
    assert look.files(make("cut", inputs=(str(folder),), append_eod=True, unit_bytes=300)) == look.files(
        str(folder.parent / "units")
    )
    report = read_manifest(f"{folder.parent / 'cut'}_text_document").report
    assert (report["lines"], report["files"], report["documents"], report["ignored"]) == (30, 30, 30, 2)
    assert report["longest"][0].split(" ")[0] == f"{folder}/part0/003.txt"


def test_a_changed_file_of_a_folder_makes_another_dataset(make, folder):
    make(inputs=(str(folder),))
    make(inputs=(str(folder),))
    (folder / "part0/000.txt").write_text("changed!")
    with pytest.raises(DataError, match="Refusing to overwrite"):
        make(inputs=(str(folder),))


@pytest.mark.parametrize("ending", PACK)
def test_nested_archives_are_read_in_order(make, look, tmp_path, texts, ending):
    """As OpenWebText is distributed: an archive of compressed archives of .txt files."""
    names = sorted(TEXTS)
    inner = [tar_of({name: TEXTS[name].encode() for name in names[i::3]}) for i in range(3)]
    path = tmp_path / f"owt.tar{ending}"
    members = {f"owt/subset{i}.xz": lzma.compress(content) for i, content in enumerate(inner)}
    path.write_bytes(PACK[ending](tar_of({**members, "owt/data.bin": b"\x00" * 700})))
    prefix = make(inputs=(str(path),))
    wanted = look.documents(make("lines", inputs=(str(texts),)))
    assert look.documents(prefix) == wanted[0::3] + wanted[1::3] + wanted[2::3]
    report = read_manifest(f"{prefix}_text_document").report
    assert (report["files"], report["ignored"]) == (30, 1)
    assert report["longest"][0].startswith(f"{path}/owt/subset0.xz/part0/027.txt ")


def test_archives_and_compressed_files_in_a_folder(make, look, tmp_path, texts):
    names, path = sorted(TEXTS), tmp_path / "mixed"
    path.mkdir()
    (path / "a.tgz").write_bytes(gzip.compress(tar_of({name: TEXTS[name].encode() for name in names[:10]})))
    (path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[names[10]].encode()))
    (path / "c").mkdir()
    (path / "c" / "d.tar").write_bytes(tar_of({name: TEXTS[name].encode() for name in names[11:]}))
    (path / "other.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000))
    prefix = make(inputs=(str(path),), unit_bytes=100)
    assert look.documents(prefix) == look.documents(make("lines", inputs=(str(texts),)))
    assert read_manifest(f"{prefix}_text_document").report["ignored"] == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_kinds_of_members(format):
    long = "/".join(["d" * 90] * (1 if format == tarfile.USTAR_FORMAT else 4)) + "/é.txt"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("link.txt", tarfile.SYMTYPE), ("p.txt", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        for name in (f"./{long}", "._x.txt", "A.TXT", "no"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"ab"))
    assert read("t", stream.getvalue()) == {
        "t/link.txt": None,
        "t/p.txt": None,
        f"t/{long}": b"ab",
        "t/._x.txt": None,
        "t/A.TXT": b"ab",
        "t/no": None,
    }


def test_a_name_outside_utf_8_is_shown():
    member = tarfile.TarInfo(b"x\xe9.txt".decode("utf-8", "surrogateescape"))
    archive = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + bytes(1024)
    assert list(read("t", archive)) == [r"t/b'x\xe9.txt'"]


def test_memory_does_not_grow_with_the_members(monkeypatch):
    members = []
    step = text_files._Member.fromtarfile.__func__
    monkeypatch.setattr(
        text_files._Member, "fromtarfile", classmethod(lambda cls, a: members.append(len(a.members)) or step(cls, a))
    )
    assert len(read("t", tar_of({f"{i}.txt": b"" for i in range(50)}))) == 50
    assert max(members) <= 1


def test_damaged_archives_are_named_with_the_member(make, tmp_path):
    texts = {f"{i}.txt": os.urandom(400).hex().encode() for i in range(8)}
    good, path = tar_of(texts), tmp_path / "in.tar"
    header = bytearray(good)
    header[1536] ^= 1  # the second header
    packed = lzma.compress(good)
    for content, message in (
        (good[:5000], "in.tar is truncated or damaged"),
        (good[:4608], "in.tar is truncated or damaged: empty header at byte 4,608"),  # between two members
        (bytes(header), "in.tar is truncated or damaged: bad checksum at byte 1,536"),
        (good + good, "in.tar is truncated or damaged: data follow the end"),
        (b"no archive at all", "in.tar is truncated or damaged"),
        (packed[:-20], "in.tar is truncated or damaged"),
        (tar_of({"a/b.tar.xz": packed[:-20]}), r"in.tar/a/b.tar.xz is truncated or damaged"),
        (tar_of({"a/b.tar": good[:5000]}), r"in.tar/a/b.tar is truncated or damaged"),
        (gzip.compress(tar_of({"a.tgz": gzip.compress(good)[:-9]})), r"in.tar/a.tgz is truncated or damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            make(inputs=(str(path),), skip_bad_lines=True)
        assert not list(tmp_path.glob("out_*"))


def test_archives_inside_each_other_end():
    content = tar_of({"a.txt": b"a"})
    for _ in range(8):
        content = tar_of({"x.tar": content})
    with pytest.raises(DataError, match="is packed more than 8 times"):
        read("t", content)


def test_files_that_are_not_utf_8_or_too_long_are_named(make, look, tmp_path):
    path = tmp_path / "in.tar.gz"
    contents = {"d/a.txt": b"\xef\xbb\xbfgood", "d/b.txt": b"abc\xe9", "d/c.txt": b"x" * 300, "d/e.txt": b""}
    path.write_bytes(gzip.compress(tar_of(contents)))
    with pytest.raises(DataError, match=r"Bad file .*/in\.tar\.gz/d/b\.txt: not UTF-8 at byte 3\. Repair the file"):
        make(inputs=(str(path),))
    prefix = make(inputs=(str(path),), skip_bad_lines=True, max_line_bytes=299)
    report = read_manifest(f"{prefix}_text_document").report
    assert (report["files"], report["documents"], report["bad"], report["empty"]) == (4, 1, 2, 1)
    assert report["bad_lines"] == [
        f"{path}/d/b.txt not UTF-8 at byte 3",
        f"{path}/d/c.txt longer than --max-line-mb",
    ]
    with pytest.raises(DataError, match=r"in\.tar\.gz/d/b\.txt: not UTF-8"):
        list(iterate_texts([str(path)]))


def test_folders_without_text(make, tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    with pytest.raises(DataError, match="is a folder without files"):
        make(inputs=(str(path),))
    (path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"without \.txt files or archives: it has 1 other files.*/in/\*\.jsonl'$"):
        make(inputs=(str(path),))
    (path / "a.jsonl").rename(path / "a.md")
    with pytest.raises(DataError, match=r"most of them \.md.*/in/\*\.md' --plain-text file$"):
        make(inputs=(str(path),))
    (path / "a.txt").touch()
    with pytest.raises(DataError, match=r"The dataset would be empty: no tokens are left of 0 lines"):
        make(inputs=(str(path),))
    (path / "b.tar").write_bytes(tar_of({"x.jsonl": b"{}"}))
    with pytest.raises(DataError, match=r"files ignored 2.*Give --input a folder or an archive with \.txt files"):
        make(inputs=(str(path),), unit_bytes=1)


def test_a_folder_with_a_name_outside_utf_8(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/x\xe9.txt", "wb"):  # noqa: PTH123
            pass
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"name of a file in .* is not UTF-8: b'.*x\\xe9\.txt'"):
        list_folder(tmp_path)


@pytest.mark.slow
def test_plain_text_files(make, look, tmp_path):
    """--plain-text: a document is a file, or a line."""
    path = tmp_path / "wiki.tokens"
    path.write_bytes(b"\xef\xbb\xbfthe cat\r\n\r\n  \nsat\nlast line")
    packed = tmp_path / "wiki.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, packed):
        with pytest.raises(DataError, match=r"wiki\.\w+:1: not JSON"):
            make(inputs=(str(source),))
        for form, texts in (("line", ["the cat", "sat", "last line"]), ("file", [path.read_text("utf-8-sig")])):
            lines = tmp_path / f"{form}.jsonl"
            # Universal newlines would hide a carriage return.
            texts = [path.read_bytes()[3:].decode()] if form == "file" else texts
            lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            wanted = look.documents(make("wanted", inputs=(str(lines),), overwrite=True))
            found = make(f"{form}{source.suffix}", inputs=(str(source),), plain_text=form, unit_bytes=4)
            assert look.documents(found) == wanted
            assert list(iterate_texts([str(source)], plain_text=form)) == texts


def test_plain_text_where_it_has_no_meaning(make, tmp_path, folder, corpus):
    with pytest.raises(DataError, match=r"--plain-text line does not apply to .*a folder.*/texts/\*\.txt'"):
        make(inputs=(str(folder),), plain_text="line")
    (tmp_path / "a.tar").write_bytes(tar_of({"a.txt": b"a"}))
    with pytest.raises(DataError, match=r"--plain-text line does not apply to .*an archive"):
        make(inputs=(str(tmp_path / "a.tar"),), plain_text="line")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"--plain-text file does not apply to .*a Parquet file"):
        make(inputs=(str(tmp_path / "a.parquet"),), plain_text="file")
    with pytest.raises(ConfigError, match=r"--input-format prompt-completion reads JSON lines; .*texts is plain text"):
        make(inputs=(str(folder),), input_format="prompt-completion")
    with pytest.raises(ConfigError, match=r"--json-keys text title names 2 texts .*texts is plain text"):
        make(inputs=(str(corpus), str(folder)), json_keys=("text", "title"))


def test_samples_for_tokenizer_training(folder, texts, tmp_path):
    names = sorted(TEXTS)
    (tmp_path / "more.tar").write_bytes(tar_of({"a.txt": b"from the archive"}))
    inputs = [str(folder), str(texts), str(tmp_path / "more.tar")]
    everything = list(iterate_texts(inputs))
    assert everything == [TEXTS[name] for name in names] * 2 + ["from the archive"]
    assert list(iterate_texts(inputs, sample=Sample(files=32))) == everything
    ten = [list(iterate_texts([str(folder)], sample=Sample(files=10, seed=seed))) for seed in (1, 1, 2)]
    assert ten[0] == ten[1] != ten[2]
    assert [len(some) for some in ten] == [10] * 3 and set(ten[0]) <= set(TEXTS.values())
    assert sorted(ten[0], key=everything.index) == ten[0], "in the order of the files"
    half = list(iterate_texts([str(texts)], sample=Sample(documents=0.5)))
    assert 5 < len(half) < 25
    assert half == list(iterate_texts([str(texts)], sample=Sample(documents=0.5)))
    limited = list(iterate_texts([str(folder)], max_bytes=200))
    assert limited == everything[: len(limited)] and 0 < sum(map(len, limited)) <= 200
    assert [source.kind for source in find_sources(inputs)] == ["folder", "text", "archive"]
    assert Path(find_sources(inputs)[0].path) == folder
