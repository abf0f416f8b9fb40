"""The same rows in files of every format."""

import csv
import gzip
import json
import lzma
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from triform.data import sources, store
from triform.data.sources import Column, Reading

COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def rows(count=60):
    """Texts with quotes, line breaks and other alphabets; labels 0 to 2; a repeat."""
    found = [
        {"text": f'Row {i}, "so"\nÄ {chr(0x3042 + i)}; {"x" * (i % 7)}', "label": i % 3}
        for i in range(count - 1)
    ]
    return [*found, dict(found[0])]


def jsonl(path, found):
    """An object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    path.write_bytes("".join(lines).encode())


def as_json(path, found):
    """A list of objects."""
    path.write_text(json.dumps(found, indent=1))


def separated(path, found, delimiter=",", end="\r\n", mark=b""):
    """A table with a header."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, found[0], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(found)
    path.write_bytes(mark + path.read_bytes())


def parquet(path, found):
    """In groups of 17 rows."""
    pq.write_table(pa.Table.from_pylist(found), path, row_group_size=17)


def arrow(path, found, writer=pa.ipc.new_stream):
    """In batches of 13 rows."""
    table = pa.Table.from_pylist(found)
    with writer(path, table.schema) as f:
        for batch in table.to_batches(max_chunksize=13):
            f.write_batch(batch)


WRITERS = {
    "a.jsonl": jsonl,
    "a.json": as_json,
    "a.csv": separated,
    "lf.csv": lambda path, found: separated(path, found, end="\n"),
    "semicolons.csv": lambda path, found: separated(path, found, ";"),
    "mark.csv": lambda path, found: separated(path, found, mark=b"\xef\xbb\xbf"),
    "a.tsv": lambda path, found: separated(path, found, "\t"),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "file.arrow": lambda path, found: arrow(path, found, pa.ipc.new_file),
    **{
        f"{name}.{end}": (name, end)
        for name in ("a.jsonl", "a.csv", "a.parquet")
        for end in COMPRESS
    },
}


def write(folder: pathlib.Path, name: str, found) -> str:
    """A file of these rows, in the format that its name says; its path."""
    path, writer = folder / name, WRITERS[name]
    if isinstance(writer, tuple):
        plain, end = writer
        WRITERS[plain](folder / f"plain-{plain}", found)
        path.write_bytes(COMPRESS[end]((folder / f"plain-{plain}").read_bytes()))
        (folder / f"plain-{plain}").unlink()
    else:
        writer(path, found)
    return str(path)


def source(path, texts=("text",), labels=("label",), **options):
    """A source of such files."""
    columns = [Column(name, name) for name in texts]
    columns += [Column(name, name, "label") for name in labels]
    return sources.source(str(path), reading=Reading(tuple(columns), **options))


def opened(config, split, tok):
    """Tokens and values of a split."""
    return store.open_store(config, split, tok, config.features())
