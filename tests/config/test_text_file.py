"""Text files that users name: byte order marks, encodings, compression, and what is no text file at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os

import pytest

from megatron_lite.config import text_format
from megatron_lite.config.text_file import TextFileError, read_text, require_text, text_lines
from megatron_lite.config.text_format import foreign_format, unpacked
from megatron_lite.errors import DataError

TEXT = "naïve 東京 🙂\r\nsecond\u2028line\n"
PACK = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def failure(path):
    with pytest.raises(TextFileError) as caught:
        read_text(path)
    return str(caught.value)


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("packing", ["", *PACK])
def test_byte_order_mark_is_dropped(tmp_path, before, packing):
    content = before + TEXT.encode()
    (tmp_path / "text").write_bytes(PACK[packing](content) if packing else content)
    assert read_text(tmp_path / "text") == TEXT


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_recognized_and_named(tmp_path, encoding):
    (tmp_path / "text").write_text("hello world\n", encoding=encoding)
    assert f"is {'UTF-32' if encoding == 'utf-32' else 'UTF-16'} text" in failure(tmp_path / "text")


def test_invalid_utf_8_is_reported_with_its_position(tmp_path):
    (tmp_path / "text").write_bytes("first\ncafé\n".encode("latin-1"))
    assert failure(tmp_path / "text") == "is not UTF-8: byte 0xe9 in line 2, byte 4 of the line, 10 of the file"
    (tmp_path / "text").write_bytes(b"first\na\x00b\n")
    assert failure(tmp_path / "text") == "is not text: NUL byte in line 2, byte 2 of the line, 8 of the file"


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"PK\x03\x04..", "a zip archive"), (b"PAR1....", "a Parquet file"), (b"\x00" * 257 + b"ustar", "a tar archive")],
)
def test_other_formats_are_named(tmp_path, content, name):
    (tmp_path / "text").write_bytes(content)
    assert f"is {name}, not plain UTF-8 text" in failure(tmp_path / "text")
    assert foreign_format(b"") == foreign_format(b"{") == foreign_format(TEXT.encode()) == ""


@pytest.mark.parametrize("packing", PACK)
def test_damaged_compression(tmp_path, packing):
    whole = PACK[packing](os.urandom(5000).hex().encode())
    for content in (whole[:-9], whole[:100] + b"\x00" * 40 + whole[140:], whole + whole[:20], whole + b"garbage"):
        (tmp_path / "text").write_bytes(content)
        assert f"is compressed with {packing} and truncated or damaged" in failure(tmp_path / "text")


@pytest.mark.parametrize("packing", PACK)
def test_several_streams_are_read_one_after_another(packing):
    parts = [PACK[packing](part) for part in (b"one\n" * 300_000, b"", b"two\n")]
    if packing == "xz":
        parts.insert(1, b"\x00" * 8)  # stream padding
    assert unpacked(io.BytesIO(b"".join(parts)), packing).read() == b"one\n" * 300_000 + b"two\n"


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_format, "_LIBRARIES", {"bz2": "no_such_library"})
    (tmp_path / "text").write_bytes(bz2.compress(b"x"))
    assert "no_such_library that reads it is not installed" in failure(tmp_path / "text")


def test_pipes_devices_and_missing_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe, socket or device" in failure(tmp_path / "pipe")
    assert "pipe, socket or device" in failure("/dev/zero")
    assert "impossible name" in failure("a\x00b")
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "absent", "No such file"),
        (tmp_path / "pipe", "pipe"),
    ):
        with pytest.raises(DataError, match=f"--flag {path}.*{reason}"):
            require_text(path, "--flag")


def test_process_substitution_is_read():
    reading, writing = os.pipe()
    os.write(writing, b"hello\n")
    os.close(writing)
    assert read_text(f"/dev/fd/{reading}") == "hello\n"
    os.close(reading)


def test_lines_end_at_line_feeds_only():
    assert text_lines("a\r\nb\u2028c\x0cd\n\ne") == ["a", "b\u2028c\x0cd", "", "e"]
    assert text_lines("") == []
    assert text_lines("\n") == [""]
