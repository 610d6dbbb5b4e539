"""File format recognition by content: compression formats, and formats that cannot be read as text.

Shared by `text_file.read_text` and by preprocessing, which streams its inputs.
"""

from __future__ import annotations

import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

Packing = Literal["gzip", "bz2", "xz", "zstd"]
"""Compression formats that are unpacked while reading."""

BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark: dropped at the start of every text file."""

HEAD = 512
"""Bytes at the start of a file from which its format is recognized."""

PARQUET = b"PAR1"
BUFFER = 1 << 20

_PACKINGS: tuple[tuple[bytes, Packing], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_LIBRARIES: dict[Packing, str] = {"bz2": "_bz2", "xz": "_lzma", "zstd": "zstandard"}
_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32 text"),
    (b"\x00\x00\xfe\xff", "UTF-32 text"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x04\x22\x4d\x18", "an lz4 file"),
    (b"\x1f\x9d", "a compress (.Z) file"),
    (PARQUET, "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
)


def packing_of(head: bytes) -> Packing | None:
    """Return the compression format that the first bytes of a file announce."""
    return next((packing for magic, packing in _PACKINGS if head.startswith(magic)), None)


def foreign_format(head: bytes) -> str:
    """Return the name of a format that cannot be read as text, such as "UTF-16 text"; empty if there is none."""
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    # UTF-16 without a byte order mark: in Latin text, every other byte is 0.
    zeros = sorted(half.count(0) for half in (head[:64:2], head[1:64:2]))
    if zeros[0] == 0 and zeros[1] > len(head[:64]) // 4:
        return "UTF-16 text without a byte order mark"
    return ""


def missing_library(packing: Packing) -> str:
    """Return the name of the library that reads this format if it is not installed, else an empty string."""
    library = _LIBRARIES.get(packing, "")
    return library if library and importlib.util.find_spec(library) is None else ""


def damage_errors(packing: Packing) -> tuple[type[Exception], ...]:
    """Return what `unpacked` raises for a truncated or damaged file; an OSError of these has no errno."""
    if packing == "xz":
        import lzma

        return (EOFError, OSError, lzma.LZMAError)
    return (EOFError, OSError, zlib.error)


def unpacked(raw: IO[bytes], packing: Packing) -> IO[bytes]:
    """Return a buffered reader of a compressed file's content, over all of its streams."""
    if packing == "gzip":
        import gzip

        return io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)), BUFFER)
    if packing == "zstd":
        return io.BufferedReader(_Chunks(_zstd_chunks(raw)), BUFFER)
    if packing == "bz2":
        import bz2

        return io.BufferedReader(_Chunks(_chunks(raw, bz2.BZ2Decompressor)), BUFFER)
    import lzma

    return io.BufferedReader(_Chunks(_chunks(raw, lzma.LZMADecompressor)), BUFFER)


def _chunks(raw: IO[bytes], new_stream: Callable[[], Any]) -> Iterator[bytes]:
    """Yield unpacked chunks of at most BUFFER bytes.

    bz2.BZ2File and lzma.LZMAFile are not used: they treat a second stream with a damaged header as the file's end.
    """
    stream, data, begun = new_stream(), b"", False
    while True:
        if stream.eof:
            stream, data, begun = new_stream(), stream.unused_data, False
        if not data and stream.needs_input:
            data = raw.read(1 << 16)
            if not data and begun:
                raise EOFError("the last stream has no end")
            if not data:
                return
        if not begun:
            data = data.lstrip(b"\x00")  # xz pads streams with zeros
        if data or begun:
            begun = True
            yield stream.decompress(data, BUFFER)
            data = b""


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield unpacked chunks. The library's own reader does not detect truncated files."""
    import zstandard

    frame, fed = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while piece := raw.read(1 << 14):
            while piece:
                yield frame.decompress(piece)
                piece, fed = frame.unused_data if frame.eof else b"", not frame.eof
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if fed:
        raise EOFError("the last frame has no end")


class _Chunks(io.RawIOBase):
    """A readable file whose content an iterator yields in chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
