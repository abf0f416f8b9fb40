"""Bytes of a file, decompressed, and its lines as strict UTF-8."""

import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator

from triform.runtime.errors import DataError

BOM = b"\xef\xbb\xbf"
COMPRESSED = {".gz": "gzip", ".xz": "xz", ".zst": "zstandard"}
# What reading damaged or unreadable files raises.
DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error)
CHUNK = 1 << 20  # bytes that are read at once
# A longer line is cut where a text file is read in passages: nothing else bounds it.
LONGEST = 64 << 20


def plain_name(path: str) -> str:
    """The path without the suffix of its compression."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in COMPRESSED else path


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, decompressed as its name says; DataError if it is damaged."""
    kind = COMPRESSED.get(os.path.splitext(path)[1].lower(), "")
    with _explained(path, kind), open(path, "rb", buffering=CHUNK) as raw:
        yield _decompressed(raw, kind)


@contextlib.contextmanager
def opened_raw(path: str) -> Iterator[io.BufferedReader]:
    """The file's bytes as they are; DataError if they cannot be read."""
    with _explained(path, ""), open(path, "rb", buffering=0) as raw:
        yield raw


def _decompressed(raw: io.BufferedReader, kind: str) -> io.BufferedIOBase:
    if kind == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), CHUNK)
    if kind == "xz":
        return io.BufferedReader(lzma.LZMAFile(raw), CHUNK)
    if kind == "zstandard":
        # Python has no zstandard before 3.14; pyarrow, which is here anyway, has one.
        # Not at the top: it costs 0.2 s, which no other file needs.
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
        return io.BufferedReader(stream, CHUNK)
    return raw


@contextlib.contextmanager
def _explained(path: str, kind: str) -> Iterator[None]:
    """One line for whatever goes wrong in reading a file."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}); check path and "
                "rights"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: is torn or not {kind} ({reason}); replace the file"
        ) from error


def skip(stream: io.BufferedIOBase, count: int) -> None:
    """Goes on by so many bytes, also where a stream cannot seek."""
    if stream.seekable():
        stream.seek(count, os.SEEK_CUR)
        return
    while count > 0:
        count -= len(stream.read(min(count, CHUNK))) or count


class Lines:
    """The lines of a stream: strict UTF-8, without a byte order mark, ended by LF.

    `offset` and `number` say how many bytes and lines have been read.
    """

    def __init__(self, stream: io.BufferedIOBase, path: str, longest: int = -1):
        self.path, self.offset, self.number = path, 0, 0
        self._stream, self._longest = stream, longest

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        raw = self._stream.readline(self._longest)
        if not raw:
            raise StopIteration
        if len(raw) == self._longest and raw[-1] >= 0x80:
            # Cut inside a character: its other bytes follow, three at most.
            while (more := self._stream.peek(1)[:1]) and 0x80 <= more[0] < 0xC0:
                raw += self._stream.read(1)
        start, self.offset = self.offset, self.offset + len(raw)
        self.number += raw[-1:] == b"\n" or len(raw) != self._longest
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self._not_utf8(raw, start, error.start) from error
        if not start:
            text = text.removeprefix("\ufeff")
        return text[:-2] + "\n" if text.endswith("\r\n") else text

    def peek(self) -> bytes:
        """The first byte of the next line; b"" at the end."""
        return self._stream.peek(1)[:1]

    def jump(self, offset: int, number: int) -> None:
        """Goes on to a position ahead."""
        skip(self._stream, offset - self.offset)
        self.offset, self.number = offset, number

    def _not_utf8(self, raw: bytes, start: int, at: int) -> DataError:
        hint = "convert the file to UTF-8 (iconv -t UTF-8) or remove the byte"
        if not start and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            hint = "it begins as UTF-16 does: save it as UTF-8"
        return DataError(
            f"{self.path}, line {self.number}: byte {start + at} (0x{raw[at]:02x}) is "
            f"not UTF-8; {hint}"
        )
