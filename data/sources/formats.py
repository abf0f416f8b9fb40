"""The rows of one file, whatever its format: mappings from column to value.

A format is a function from the lines of its files to (number of the line where a row
begins, row). What follows the header of a file is read row by row, so that a reader can
jump to any position that `rows` has given before.
"""

import contextlib
import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from triform.data.sources import fasta
from triform.data.sources.streams import LONGEST, Lines, opened, plain_name
from triform.runtime.errors import DataError

TXT_EXAMPLES = ("file", "passage", "line", "choice")
PASSAGE = 16_384  # characters: a passage ends with the line that reaches them
WHOLE = LONGEST  # characters: a longer file is read as several documents
TEXT = "text"  # the column of text files
CHOICE = ("user", "item", "time")  # the columns of text files of choices

Position = tuple[int, ...]  # lines (or rows) read, then bytes read of every file
Numbered = Iterator[tuple[int, dict[str, Any]]]


class Row(NamedTuple):
    """One example of a file."""

    position: Position  # where reading can go on with it
    number: int  # of its first line, or of the row, from 1
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class File:
    """One file, or several whose lines belong together."""

    paths: tuple[str, ...]
    format: str  # a key of FORMATS, or 'arrow'
    columns: tuple[str, ...] = ()  # of aligned files and FASTA's labels, one a path
    split: str = ""  # which split its name says; '': none

    @property
    def name(self) -> str:
        """For messages."""
        return " + ".join(self.paths)

    def where(self, number: int) -> str:
        """'data.csv, line 7'."""
        form = FORMATS.get(self.format)
        return f"{self.name}, {form.unit if form else 'row'} {number}"


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kind of file is read."""

    # Lines of every path, the file -> rows. It reads a header before it returns.
    parse: Callable[[Sequence[Lines], File], Numbered]
    unit: str = "line"  # what `number` counts
    longest: int = -1  # bytes after which a line is cut; -1: never
    jumps: bool = True  # can go on at any line


def rows(file: File, position: Position = ()) -> Iterator[Row]:
    """The rows of a file from a position on; DataError names the file and the line."""
    form = FORMATS.get(file.format)
    if form is None:
        # Not at the top: pyarrow costs 0.2 s, which no other format needs.
        from triform.data.sources import arrow

        for i, values in arrow.rows(file.paths[0], *position):
            yield Row((i,), i + 1, values)
        return
    with contextlib.ExitStack() as stack:
        lines = [
            Lines(stack.enter_context(opened(path)), path, form.longest)
            for path in file.paths
        ]
        parsed = form.parse(lines, file)
        if not form.jumps:
            start = position[0] if position else 0
            for i, found in enumerate(itertools.islice(parsed, start, None), start):
                yield Row((i,), *found)
            return
        if position:
            for one, offset in zip(lines, position[1:], strict=True):
                one.jump(offset, position[0])
        while True:
            at = (lines[0].number, *(one.offset for one in lines))
            found = next(parsed, None)
            if found is None:
                return
            yield Row(at, *found)


def listed(files: Sequence[File]) -> str:
    """'a.csv and 3 more'."""
    first, *others = (file.name for file in files)
    return f"{first} and {len(others):,} more" if others else first


def classes(files: Sequence[File]) -> Mapping[str, tuple[str, ...]]:
    """{column: names} that `datasets` gives classes in Arrow files."""
    first = next((f for f in files if f.format == "arrow"), None)
    if first is None:
        return {}
    from triform.data.sources import arrow  # as above

    return arrow.classes(first.paths[0])


# Text


def _whole(lines: Sequence[Lines], file: File) -> Numbered:
    return _joined(lines[0], WHOLE)


def _passages(lines: Sequence[Lines], file: File) -> Numbered:
    return _joined(lines[0], PASSAGE)


def _joined(lines: Lines, limit: int) -> Numbered:
    """Lines put together until they have `limit` characters."""
    parts, size, first = [], 0, 1
    for line in lines:
        if not parts:
            first = lines.number
        parts.append(line)
        size += len(line)
        if size >= limit:
            yield first, {TEXT: "".join(parts)}
            parts, size = [], 0
    if parts:
        yield first, {TEXT: "".join(parts)}


def _lines(lines: Sequence[Lines], file: File) -> Numbered:
    for line in lines[0]:
        yield lines[0].number, {TEXT: line.removesuffix("\n")}


def _choices(lines: Sequence[Lines], file: File) -> Numbered:
    """'user item' or 'user item time' a line, all alike; blank ones are left out."""
    count = 0
    for line in lines[0]:
        words = line.split()
        if not words:
            continue
        count = count or len(words)
        if len(words) != count or count not in (2, 3):
            raise DataError(
                f"{file.where(lines[0].number)}: has {len(words)} words where "
                f"{count if count in (2, 3) else '2 or 3'} are expected: "
                f"{' '.join(CHOICE[: min(count, 3)])}; correct the line, or give a "
                "table with a header"
            )
        yield lines[0].number, dict(zip(CHOICE, words, strict=False))


def _aligned(lines: Sequence[Lines], file: File) -> Numbered:
    """One row a line number; blank lines count."""
    while True:
        found = [next(one, None) for one in lines]
        if None in found:
            if any(x is not None for x in found):
                raise _unequal(lines)
            return
        texts = (x.removesuffix("\n") for x in found)
        yield lines[0].number, dict(zip(file.columns, texts, strict=True))


def _unequal(lines: Sequence[Lines]) -> DataError:
    for one in lines:
        for _ in one:
            pass
    counts = " and ".join(f"{one.path} has {one.number:,} lines" for one in lines)
    return DataError(f"{counts}: line n of each must say the same; correct the files")


# Sequences


def _fasta(lines: Sequence[Lines], file: File) -> Numbered:
    """Records, each with the labels that the other paths have for its id.

    A path with a column is FASTA, whose texts are the column's values; else a table.
    """
    first, *others = lines
    labels = [
        _labels(one, column)
        for one, column in zip(others, file.columns[1:], strict=True)
    ]
    return _labelled(first, others, labels)


def _labels(lines: Lines, column: str) -> dict[str, dict[str, Any]]:
    """{id: values}."""
    if column:
        return {
            header.split()[0]: {column: text}
            for _, header, text in fasta.records(lines)
        }
    table, found = File((lines.path,), "tsv"), {}
    delimiter = "\t" if plain_name(lines.path).lower().endswith(".tsv") else ","
    for number, row in _separated(lines, table, delimiter):
        name = row.pop("id", None)
        if name is None or name in found:
            rule = "has no column 'id'" if name is None else f"has {name!r} twice"
            raise DataError(f"{table.where(number)}: {rule}; correct the labels")
        found[name] = row
    return found


def _labelled(
    lines: Lines, others: Sequence[Lines], labels: Sequence[dict[str, dict[str, Any]]]
) -> Numbered:
    for number, row in fasta.sequences(lines):
        for one, known in zip(others, labels, strict=True):
            if row["id"] not in known:
                raise DataError(
                    f"{lines.path}, line {number}: {row['id']!r} is not in {one.path}; "
                    "add its labels or remove the record"
                )
            row |= known[row["id"]]
        yield number, row


# Tables


def _csv(lines: Sequence[Lines], file: File) -> Numbered:
    return _separated(lines[0], file, ",")


def _tsv(lines: Sequence[Lines], file: File) -> Numbered:
    return _separated(lines[0], file, "\t")


def _separated(lines: Lines, file: File, delimiter: str) -> Numbered:
    """CSV as RFC 4180 has it, with a header, by Python's reader.

    (pyarrow's is faster, but names neither a ragged row nor an open quote by its line.)
    """
    csv.field_size_limit(1 << 40)  # of all cells: a text may have any length
    first = next(lines, "")
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"  # as spreadsheets write it where the comma is decimal
    content = itertools.chain([first] if first else [], lines)
    table = csv.reader(content, delimiter=delimiter, strict=True)
    with _csv_errors(file, 1):
        header = next(table, [])
    if twice := sorted({x for x in header if header.count(x) > 1}):
        raise DataError(f"{file.where(1)}: two columns are {twice[0]!r}; rename one")
    return _cells(table, header, lines, file)


def _cells(
    table: Iterator[list[str]], header: list[str], lines: Lines, file: File
) -> Numbered:
    while True:
        number = lines.number + 1
        with _csv_errors(file, number):
            row = next(table, None)
        if row is None:
            return
        if not row:  # a blank line
            continue
        if len(row) != len(header):
            raise DataError(
                f"{file.where(number)}: has {len(row)} cells, the header "
                f"{len(header)} ({', '.join(header):.60}); correct the row, or quote "
                "a cell that holds the separator"
            )
        yield number, dict(zip(header, row, strict=True))


@contextlib.contextmanager
def _csv_errors(file: File, number: int) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        reason = str(error).split(" - ")[0]
        raise DataError(
            f"{file.where(number)}: is no CSV ({reason}); a quote may be open, or "
            "lines may end in a bare carriage return"
        ) from error


def _jsonl(lines: Sequence[Lines], file: File) -> Numbered:
    """An object a line; blank lines are passed over."""
    return _objects(lines[0], lines[0], file)


def _objects(texts: Iterable[str], lines: Lines, file: File) -> Numbered:
    for text in texts:
        if not text.isspace():
            where = f"{file.name}, line {lines.number}"
            yield lines.number, _object(_parsed(text, where), where)


def _json(lines: Sequence[Lines], file: File) -> Numbered:
    """One list of objects, or an object a line."""
    first = next((line for line in lines[0] if not line.isspace()), "")
    if first.lstrip()[:1] != "[":
        yield from _objects(
            itertools.chain([first][: len(first)], lines[0]), lines[0], file
        )
        return
    items = _parsed(first + "".join(lines[0]), file.name)
    for i, item in enumerate(items, 1):
        yield i, _object(item, file.where(i))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}"
        if error.lineno > 1:
            at = f"line {error.lineno}, {at}"
        raise DataError(
            f"{where}: is no JSON ({error.msg}, {at}); correct it. A .jsonl file has "
            "an object a line, a .json file a list of objects"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON ({error}); correct it") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError if a key comes twice, of which JSON keeps the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} comes twice")
    return found


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: holds {value!r:.40} where an object such as "
            '{"text": "..."} is expected'
        )
    return value


FORMATS = {
    "file": Format(_whole, longest=LONGEST),
    "passage": Format(_passages, longest=LONGEST),
    "line": Format(_lines),
    "choice": Format(_choices),
    "aligned": Format(_aligned),
    "fasta": Format(_fasta),
    "csv": Format(_csv),
    "tsv": Format(_tsv),
    "jsonl": Format(_jsonl),
    "json": Format(_json, unit="item", jumps=False),
}
