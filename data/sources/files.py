"""Rows of a user's own file, for programs that read one: `read_rows`."""

import os
from collections.abc import Iterator
from typing import Any

from triform.data.sources import formats
from triform.data.sources.formats import File
from triform.data.sources.streams import plain_name
from triform.runtime import paths

# Suffix of a table -> its format.
TABLES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "arrow",
    ".arrow": "arrow",
}


def suffix(path: str) -> str:
    """'.jsonl' of 'a/b.JSONL.gz'."""
    return os.path.splitext(plain_name(path))[1].lower()


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of a file: ('in.jsonl, line 3', {'text': 'words'}).

    Tables by their suffix, compressed or not (TABLES); of every other file each line
    is the text of a row, {'text': line}. DataError names file and line.
    """
    file = File((paths.absolute(path),), TABLES.get(suffix(path), "line"))
    for row in formats.rows(file):
        yield file.where(row.number), row.values
