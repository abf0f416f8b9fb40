"""What one pass over the rows of files finds out: contents, faults, positions."""

import array
import bisect
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform.data import progress
from triform.data.sources import formats
from triform.data.sources.base import LABEL, TEXT, Column
from triform.data.sources.formats import File, Row
from triform.data.sources.streams import COMPRESSED
from triform.runtime.errors import DataError
from triform.runtime.files import replacing

# The position of one row in so many is kept: reading starts there.
STRIDE = 256
KEY = b"triform: which split"  # of the hash of contents: never changes
INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
SEEN = 10_000  # labels that are remembered as read


@dataclasses.dataclass
class Index:
    """The rows of all files of a source, numbered over all of them."""

    hashes: np.ndarray  # uint64 [N], of the texts of a row
    empty: np.ndarray  # bool [N]: a text of the row is empty
    starts: np.ndarray  # int64 [files + 1]: the first row of every file, and the end
    marks: np.ndarray  # int64 [M, 1 + width]: row, where reading can start for it
    kinds: dict[str, str]  # column of labels -> 'int', 'float', 'bool' or 'text'

    def save(self, path: str) -> None:
        """Writes it; a reader sees all or nothing."""
        arrays = {k: getattr(self, k) for k in ("hashes", "empty", "starts", "marks")}
        with replacing(path, binary=True) as f:
            np.savez(f, **arrays, kinds=np.array(json.dumps(self.kinds)))

    @classmethod
    def load(cls, path: str) -> "Index | None":
        """What `save` wrote; None if it is not there or damaged."""
        try:
            with np.load(path) as found:
                values = {name: found[name] for name in found.files}
            return cls(**values | {"kinds": json.loads(str(values["kinds"]))})
        except (OSError, ValueError, KeyError, EOFError, TypeError):
            return None

    def mark(self, row: int) -> tuple[int, tuple[int, ...]]:
        """(row, position in its file) of the last mark that is not behind `row`."""
        at = bisect.bisect_right(self.marks[:, 0], row) - 1
        number, *position = self.marks[at].tolist()
        return number, tuple(x for x in position if x >= 0)

    def file(self, row: int) -> int:
        """The number of the file that holds a row."""
        return int(np.searchsorted(self.starts, row, "right")) - 1


class Cursor:
    """Rows of files by number; going on is cheap, going back reads from a mark."""

    def __init__(self, files: Sequence[File], index: Index):
        self.files, self.index = files, index
        self._next, self._end = -1, -1  # the row that comes next, the end of its file
        self._rows: Iterator[Row] = iter(())

    def __getitem__(self, row: int) -> tuple[File, Row]:
        file = self.files[self.index.file(row)]
        ahead = row - self._next
        jumps = not any(p.endswith(tuple(COMPRESSED)) for p in file.paths)
        if ahead < 0 or row >= self._end or (jumps and ahead > 2 * STRIDE):
            self._next, position = self.index.mark(row)
            self._end = int(self.index.starts[self.index.file(row) + 1])
            self._rows = formats.rows(file, position)
        while True:
            found = next(self._rows, None)
            if found is None:
                raise DataError(
                    f"{file.name}: has become shorter; start again with its new content"
                )
            self._next += 1
            if self._next > row:
                return file, found


def scan(
    files: Sequence[File],
    columns: Sequence[Column],
    classes: Mapping[str, Sequence[str]],
) -> Index:
    """The index of files; DataError with file and line for what cannot be used.

    `classes` holds columns of numbers that stand for names, which may be read as text.
    """
    texts = sorted({c.name for c in columns if c.kind == TEXT})
    labels = {c.name: Labels(c) for c in columns if c.kind == LABEL}
    hashes, empty, starts, marks = array.array("Q"), bytearray(), [0], []
    with progress.Bar("reading files", unit="rows") as bar:
        for file in files:
            first = len(hashes)
            for row in formats.rows(file):
                if (len(hashes) - first) % STRIDE == 0:
                    marks.append((len(hashes), *row.position))
                    bar.update(len(hashes) - bar.done)
                check_columns(columns, row, file)
                values = [row.values[name] for name in texts]
                for name, value in zip(texts, values, strict=True):
                    if type(value) is not str:
                        check_text(name, value, columns, classes, row, file)
                content = _content(values if texts else [row.values], row, file)
                digest = hashlib.blake2b(content, digest_size=8, key=KEY).digest()
                hashes.append(int.from_bytes(digest))
                empty.append(any(x is None or x == "" for x in values))
                for name, known in labels.items():
                    known.add(row.values[name], row, file)
            starts.append(len(hashes))
    width = max(map(len, marks), default=2)
    filled = [(*mark, *[-1] * (width - len(mark))) for mark in marks]
    return Index(
        np.frombuffer(hashes, np.uint64),
        np.frombuffer(empty, np.uint8).astype(bool),
        np.array(starts, np.int64),
        np.array(filled, np.int64).reshape(-1, width),
        {name: known.kind() for name, known in labels.items()},
    )


def cleaned(value: Any) -> Any:
    """A text as it is encoded: LF ends its lines; None is empty.

    Also inside lists; there keys without a value are left out, which a table has in
    every row and JSON has not.
    """
    return "" if value is None else _with_line_feeds(value)


def _with_line_feeds(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n") if "\r\n" in value else value
    if isinstance(value, list):
        return [_with_line_feeds(x) for x in value]
    if isinstance(value, dict):
        given = {key: x for key, x in value.items() if x is not None}
        return {key: _with_line_feeds(x) for key, x in given.items()}
    return value


def encoded(values: Sequence[Any]) -> bytes:
    """Texts as bytes, one after another; equal ones give equal bytes."""
    if len(values) == 1 and isinstance(values[0], str):
        return cleaned(values[0]).encode()
    parts = []
    for value in map(cleaned, values):
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)
        part = value.encode()
        parts.append(b"%d:%b" % (len(part), part))
    return b"".join(parts)


def _content(values: Sequence[Any], row: Row, file: File) -> bytes:
    """What is hashed; DataError for characters that no tokenizer takes."""
    try:
        content = encoded(values)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{file.where(row.number)}: holds half of a character "
            f"(U+{ord(error.object[error.start]):04X}, a lone surrogate); correct it"
        ) from error
    if b"\0" in content or (b"\\u0000" in content and _has_nul(values)):
        raise DataError(
            f"{file.where(row.number)}: holds the character NUL (U+0000); remove it, "
            "or convert the file if it is UTF-16"
        )
    return content


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nul, value.values()))
    return any(map(_has_nul, value)) if isinstance(value, list) else "\0" in str(value)


def check_columns(columns: Sequence[Column], row: Row, file: File) -> None:
    """DataError if a row lacks one of them."""
    for column in columns:
        if column.name not in row.values:
            raise DataError(
                f"data.{column.key}={column.name!r}: {file.where(row.number)} has no "
                f"such column; it has {', '.join(map(repr, row.values)) or 'none'}"
            )


def check_text(
    name: str,
    value: Any,
    columns: Sequence[Column],
    classes: Mapping[str, Sequence[str]],
    row: Row,
    file: File,
) -> None:
    """DataError if a value of the column `name` is neither text nor a list of such."""
    numbered = isinstance(value, int) and name in classes
    if not (value is None or isinstance(value, list | dict) or numbered):
        key = next(c.key for c in columns if c.name == name)
        raise DataError(
            f"{file.where(row.number)}: data.{key}={name!r} is {value!r:.40}, no text; "
            "write it in quotes or name another column"
        )


class Labels:
    """What the labels of one column are: numbers or names, in all files alike."""

    def __init__(self, column: Column):
        self.column = column
        self.seen: set = set()
        # kind -> (place, value) of the first; kinds that a text spells and others.
        self.spelled: dict[str, tuple[str, Any]] = {}
        self.typed: dict[str, tuple[str, Any]] = {}

    def add(self, value: Any, row: Row, file: File) -> None:
        """Takes the labels of a row; DataError if one is missing or is neither."""
        value = divided(value, self.column)
        several = self.column.many or self.column.divided
        if isinstance(value, list) and not several:
            raise DataError(
                f"{file.where(row.number)}: data.{self.column.key}="
                f"{self.column.name!r} is the list {value!r:.40}, and an example has "
                "one class; name another column, or train a model for every class"
            )
        for x in value if isinstance(value, list) else [value]:
            key = type(x), x if isinstance(x, str | int | float) else None
            if key in self.seen:
                continue
            if len(self.seen) < SEEN:
                self.seen.add(key)
            where = file.where(row.number)
            if x is None or x == "":
                raise DataError(
                    f"{where}: data.{self.column.key}={self.column.name!r} is empty; "
                    "give the row one or remove it"
                )
            if not isinstance(x, str | int | float):
                raise DataError(
                    f"{where}: data.{self.column.key}={self.column.name!r} is "
                    f"{x!r:.40}, neither number nor name; name another column"
                )
            table = self.spelled if isinstance(x, str) else self.typed
            table.setdefault(kind_of(x), (where, x))
            self._check()

    def _check(self) -> None:
        """Numbers and names do not mix; nor do truth values and numbers."""
        typed = dict(self.typed)
        names = [self.spelled["text"]] if "text" in self.spelled else []
        truth = typed.pop("bool", None)
        found = [*names, *list(typed.values())[:1], *([truth] if truth else [])]
        if len(found) > 1 and (typed or truth):
            (first, a), (second, b) = found[:2]
            raise DataError(
                f"{second}: data.{self.column.key}={self.column.name!r} is {b!r:.40}, "
                f"and {a!r:.40} in {first}: numbers and names are mixed; write all of "
                "them alike"
            )

    def kind(self) -> str:
        """'int', 'float', 'bool' or 'text'."""
        kinds = {*self.spelled, *self.typed}
        return next((k for k in ("text", "float", "int", "bool") if k in kinds), "text")


def kind_of(value: str | int | float) -> str:
    """What a label is; a text may spell a number, as all cells of CSV do."""
    if isinstance(value, bool):
        return "bool"
    if not isinstance(value, str):
        return "int" if isinstance(value, int) else "float"
    if INTEGER.fullmatch(value):
        return "int"
    if value.isdecimal():  # "007" is a name: as a number it would be that of "7"
        return "text"
    try:
        float(value)
    except ValueError:
        return "text"
    return "text" if "_" in value else "float"


CONVERT = {"int": int, "float": float, "bool": bool, "text": str}


def divided(value: Any, column: Column) -> Any:
    """The value of a row; a text that has a label in each character as a list."""
    return list(value) if column.divided and isinstance(value, str) else value


def converted(value: Any, kind: str) -> Any:
    """A label, or a list of them, as its column's kind has it."""
    if isinstance(value, list):
        return [CONVERT[kind](x) for x in value]
    return CONVERT[kind](value)
