"""Rows of Parquet and Arrow files. Nothing else that reads files imports pyarrow."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from triform.data.sources.streams import CHUNK, COMPRESSED, opened, plain_name
from triform.runtime.errors import DataError

ROWS = 1000  # that become Python values at once


def rows(path: str, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, row) from a row on; DataError names a damaged file."""
    with _table(path) as (_, batches):
        first = 0
        for count, read in batches:
            if first + count > start:
                for batch in map(_with_texts, read()):
                    begin = max(0, start - first)
                    for offset in range(begin, batch.num_rows, ROWS):
                        part = batch.slice(offset, ROWS).to_pylist()
                        yield from enumerate(part, first + offset)
                    first += batch.num_rows
            else:
                first += count


def _with_texts(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Dates and times as texts of ISO 8601, as other files have them."""
    names, types = batch.schema.names, [_as_text(x) for x in batch.schema.types]
    if types == batch.schema.types:
        return batch
    columns = (x.cast(kind) for x, kind in zip(batch.columns, types, strict=True))
    return pyarrow.RecordBatch.from_arrays([*columns], names=names)


def _as_text(kind: pyarrow.DataType) -> pyarrow.DataType:
    if pyarrow.types.is_list(kind):
        part = _as_text(kind.value_type)
        return kind if part == kind.value_type else pyarrow.list_(part)
    moment = pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind)
    return pyarrow.string() if moment else kind


def classes(path: str) -> dict[str, tuple[str, ...]]:
    """{column: names} of the columns that `datasets` wrote as numbers of classes."""
    with _table(path) as (schema, _):
        known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = known.get("info", {}).get("features", {})
    return {
        column: tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


@contextlib.contextmanager
def _table(path: str) -> Iterator[tuple[pyarrow.Schema, Iterator]]:
    """(schema, (number of rows, function that gives their batches) of every part)."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_mapped(path))
            if plain_name(path).lower().endswith(".parquet"):
                yield _parquet(pyarrow.parquet.ParquetFile(file))
            else:
                yield _ipc(file)
        except (pyarrow.ArrowException, EOFError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path}: is torn or no Parquet or Arrow file ({reason:.200}); "
                "replace it"
            ) from error


def _parquet(file: pyarrow.parquet.ParquetFile) -> tuple[pyarrow.Schema, Iterator]:
    def parts() -> Iterator[tuple]:
        for i in range(file.num_row_groups):
            count = file.metadata.row_group(i).num_rows
            yield count, lambda i=i: file.iter_batches(ROWS, [i])

    return file.schema_arrow, parts()


def _ipc(file: pyarrow.NativeFile) -> tuple[pyarrow.Schema, Iterator]:
    """`datasets` writes streams, other programs files."""
    try:
        table = pyarrow.ipc.open_file(file)
        found = (table.get_batch(i) for i in range(table.num_record_batches))
    except pyarrow.ArrowInvalid:
        file.seek(0)
        table = pyarrow.ipc.open_stream(file)
        found = iter(table)
    return table.schema, ((x.num_rows, lambda x=x: [x]) for x in found)


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[pyarrow.NativeFile]:
    """The file, or a temporary one of its decompressed bytes."""
    if os.path.splitext(path)[1].lower() not in COMPRESSED:
        try:
            file = pyarrow.OSFile(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); check path and rights"
            ) from error
        with file:
            yield file
        return
    with tempfile.NamedTemporaryFile() as copy:
        with opened(path) as stream:
            shutil.copyfileobj(stream, copy, CHUNK)
        copy.flush()
        with pyarrow.OSFile(copy.name) as file:
            yield file
