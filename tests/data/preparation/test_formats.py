"""Input formats: recognition by content, errors of unsupported and damaged files."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os

import pytest

from megatron_lite.data.preparation import sources
from megatron_lite.data.preparation.sources import find_sources
from megatron_lite.errors import DataError

PACK = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["{0}.jsonl", "{0}.jsonl.gz", "{0}.txt.xz", "{0}.BZ2"])
def test_compressed_files_are_recognized_by_content(make, look, corpus, tmp_path, packing, name):
    path = tmp_path / name.format(packing)
    content = corpus.read_bytes()
    path.write_bytes(PACK[packing](content[:3000]) + PACK[packing](content[3000:]))
    assert find_sources([str(path)])[0].kind == packing
    assert look.documents(make("packed", inputs=(str(path),), workers=2)) == look.documents(make("plain"))


@pytest.mark.parametrize("packing", PACK)
def test_a_truncated_or_damaged_file_is_an_error(make, tmp_path, packing):
    lines = "".join(f'{{"text": "{os.urandom(30).hex()}"}}\n' for _ in range(500)).encode()
    whole = PACK[packing](lines)
    for content in (whole[:-9], whole[: len(whole) // 2], whole + whole[:30]):
        (tmp_path / "in").write_bytes(content)
        with pytest.raises(DataError, match="truncated or damaged"):
            make(inputs=(str(tmp_path / "in"),))
        assert not list(tmp_path.glob("out_*"))


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst", "parquet"])
def test_a_suffix_that_contradicts_the_content_is_an_error(make, tmp_path, ending):
    path = tmp_path / f"in.jsonl.{ending}"
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(DataError, match="truncated or damaged"):
        make(inputs=(str(path),))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16 text"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16 text without a byte order mark"),
        (b"PK\x03\x04", "a zip archive"),
        (b"ARROW1", "an Arrow file"),
    ],
)
def test_unsupported_formats_are_named(tmp_path, content, name):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"in.jsonl is {name}"):
        find_sources([str(tmp_path / "in.jsonl")])


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes(bz2.compress(b"x"))
    for library, advice in (("zstandard", ".[data]"), ("_bz2", "built with this module")):
        monkeypatch.setattr(sources, "missing_library", lambda _, library=library: library)
        with pytest.raises(
            DataError, match=rf"Cannot read the bz2 file .*: the Python module {library} is not installed.*{advice}"
        ):
            find_sources([str(tmp_path / "in.jsonl")])


def test_a_glob_that_matches_a_name_outside_utf_8(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/x\xe9.jsonl", "wb"):  # noqa: PTH123
            pass
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"is not UTF-8: b'.*x\\xe9.jsonl'"):
        find_sources([str(tmp_path / "*.jsonl")])
