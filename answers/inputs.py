"""Requests from the command line, from standard input and from files, as they come."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from triform.data.datasets import Requests
from triform.data.music import SUFFIXES as MIDI
from triform.data.sources.files import read_rows
from triform.data.sources.locate import PICTURES, TABLES, suffix
from triform.data.sources.streams import BOM, opened
from triform.runtime import hosts, paths
from triform.runtime.errors import DataError, UserError

ROWS = (".jsonl", ".ndjson")  # of which a bad line does not spoil the next


@dataclasses.dataclass
class Asked:
    """One request, and where it stands."""

    value: Any  # what `Sampler` takes
    where: str  # 'input 3', 'standard input, line 3', 'a.jsonl, line 3'
    notes: tuple[str, ...] = ()  # what was changed to read it
    fault: str = ""  # why it cannot be read

    def repeated(self) -> Any:
        """The value as an answer repeats it: of a file inside a table its path."""
        if not isinstance(self.value, dict):
            return self.value
        return {name: self._repeated(x) for name, x in self.value.items()}

    def _repeated(self, cell: Any) -> Any:
        inside = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(inside, bytes):
            return cell
        return (isinstance(cell, dict) and cell.get("path")) or self.where


def of_flags(values: Iterable[str]) -> Iterator[Asked]:
    """Texts of the command line, which may hold bytes that are no text."""
    for number, value in enumerate(values, 1):
        text, notes = decoded(value.encode("utf-8", "surrogateescape"))
        yield Asked(text, f"input {number}", notes)


def decoded(line: bytes) -> tuple[str, tuple[str, ...]]:
    """(text, notes): U+FFFD for every byte that is not UTF-8."""
    try:
        return line.decode(), ()
    except UnicodeDecodeError as error:
        at = f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
        return line.decode(errors="replace"), (f"replaced: {at}",)


def of_lines(stream: Iterable[bytes], name: str) -> Iterator[Asked]:
    """One request a line, whatever ends it; a mark at the beginning is none of it."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(
                    f"{name}: begins as UTF-16 does; convert it to UTF-8 (iconv -f "
                    "UTF-16 -t UTF-8)"
                )
            line = line.removeprefix(BOM)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        text, notes = decoded(line)
        yield Asked(text, f"{name}, line {number}", notes)


def of_stdin() -> Iterator[Asked]:
    """The lines of standard input, as they come."""
    stream: IO[bytes] = sys.stdin.buffer
    return of_lines(iter(stream.readline, b""), "standard input")


def of_file(path: str) -> Iterator[Asked]:
    """The requests of a file, by the end of its name: rows of a table, an image or a
    piece of music, else one a line; the images or the music of a folder. UserError if
    there is no such file.
    """
    full = paths.absolute(path)
    if os.path.isdir(full):
        return _folder(full, path)
    if not os.path.exists(full):  # a pipe is one, too
        raise UserError(f"--input_file={path}: no such file; name one, or a folder")
    kind = suffix(full)
    if kind in (*PICTURES, *MIDI):
        return iter([Asked(full, path)])
    if kind in TABLES and kind not in ROWS:
        return (Asked(row, where) for where, row in read_rows(full))
    return _lines(full, path, kind in ROWS)


def _folder(full: str, path: str) -> Iterator[Asked]:
    found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(full)
        for name in names
        if name.lower().endswith((*PICTURES, *MIDI))
    )
    if not found:
        raise UserError(
            f"--input_file={path}: a folder without images and music; name a file"
        )
    return (Asked(name, name) for name in found)


def _lines(full: str, path: str, rows: bool) -> Iterator[Asked]:
    with opened(full) as stream:
        for asked in of_lines(stream, path):
            yield _row(asked) if rows else asked


def _row(asked: Asked) -> Asked:
    """A line of JSON: an object with the columns of training, or a text."""
    try:
        value = json.loads(asked.value)
    except ValueError as error:
        return dataclasses.replace(asked, fault=f"no JSON ({error})")
    if not isinstance(value, str | dict | list):
        return dataclasses.replace(asked, fault=f"{value!r:.40} is no object or text")
    return dataclasses.replace(asked, value=value)


def gathered(asked: Iterable[Asked], kind: Requests) -> Iterator[Asked]:
    """The same; rows that are parts of one request are one, where the first stands."""
    if type(kind).owner is Requests.owner:
        yield from asked
        return
    groups: dict[str | int, list[Asked]] = {}
    for number, one in enumerate(asked):
        owner = kind.owner(one.value)
        groups.setdefault(number if owner is None else owner, []).append(one)
    for owner, parts in groups.items():
        first = parts[0]
        if isinstance(owner, str):
            try:
                value = kind.united([part.value for part in parts])
                first = dataclasses.replace(first, value=value)
            except DataError as error:
                first = dataclasses.replace(first, fault=str(error))
        yield first


def shared(requests: Iterator[Asked], size: int) -> Iterator[Asked]:
    """The requests that only the first of several processes can read, on all of them;
    up to `size` are sent together.
    """
    group = hosts.here()
    if group.count == 1:
        yield from requests
        return
    parts = chunks(requests, size) if group.is_first else iter(())
    while True:
        part = [dataclasses.astuple(asked) for asked in next(parts, ())]
        found = group.broadcast("the next requests", part, hosts.LONG)
        if not found:
            return
        for value, where, notes, fault in found:
            yield Asked(value, where, tuple(notes), fault)


def chunks(requests: Iterable[Any], size: int) -> Iterator[Sequence[Any]]:
    """Lists of up to `size` requests as they come, so that a pipe need not end."""
    part = []
    for request in requests:
        part.append(request)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
