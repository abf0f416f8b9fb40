"""Files that cannot be used: one line each, with file and line, before any training."""

import gzip
import io
import json
import lzma
import os
import re

import own_files
import pytest
from PIL import Image

from triform.data.codecs import files as codec_files
from triform.data.datasets import (
    CausalLMConfig,
    ImagesConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
)
from triform.input_pipeline import Split
from triform.runtime.errors import DataError

SIZES = {"vocab_size": 1000, "num_labels": 9, "num_types": 1}
LABELLED = ("".join(f"text {i},{i % 2}\n" for i in range(40))).encode()
CSV = b"text,label\n" + LABELLED
LINES = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(40)]


def picture(**options) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png", **options)
    return file.getvalue()


def lines(*changed: str) -> bytes:
    """JSON lines of which the last ones are these."""
    return "\n".join([*LINES[: -len(changed)], *changed]).encode()


def pictured(**files: bytes) -> dict[str, bytes]:
    good = {f"p/{c}/{i}.png": picture() for c in "ab" for i in range(3)}
    return good | {name.replace("__", "/"): x for name, x in files.items()}


def cells(*pictures: bytes) -> bytes:
    """A Parquet file of pictures with labels."""
    rows = [{"image": x, "label": i % 2} for i, x in enumerate(pictures)]
    file = io.BytesIO()
    own_files.parquet(file, rows)
    return file.getvalue()


# What is wrong -> (files, source, what the line says).
TEXT = {
    "no UTF-8": (
        {"a.txt": b"good\nb\xe4d\n"},
        "a.txt",
        r"a.txt, line 2: byte 6 \(0xe4\)",
    ),
    "UTF-16": ({"a.txt": "x\n".encode("utf-16")}, "a.txt", "line 1: .*UTF-16"),
    "UTF-16 without a mark": (
        {"a.txt": "x\n".encode("utf-16-le")},
        "a.txt",
        r"a.txt, line 1: holds the character NUL .*UTF-16",
    ),
    "NUL": ({"a.jsonl": lines('{"text": "x\\u0000"}')}, "a.jsonl", "line 40: .*NUL"),
    "half a character": (
        {"a.jsonl": lines('{"text": "x \\ud83d y"}')},
        "a.jsonl",
        r"a.jsonl, line 40: .*U\+D83D",
    ),
    "torn gzip": (
        {"a.txt.gz": gzip.compress(CSV)[:-9]},
        "a.txt.gz",
        "a.txt.gz: is torn",
    ),
    "no gzip": ({"a.csv.gz": CSV}, "a.csv.gz", "a.csv.gz: is torn or not gzip"),
    "torn xz": ({"a.txt.xz": lzma.compress(CSV)[:-9]}, "a.txt.xz", "is torn or not xz"),
    "torn zst": (
        {"a.txt.zst": own_files.COMPRESS["zst"](CSV * 99)[:-9]},
        "a.txt.zst",
        "a.txt.zst: is torn or not zstandard",
    ),
    "an empty file": ({"a.txt": b""}, "a.txt", "a.txt: holds no examples"),
    "an empty table": ({"a.csv": b"text,label\n"}, "a.csv", "a.csv: holds no examples"),
    "an empty folder": ({"x/.hidden": b""}, "x", "x: holds no file"),
    "no such file": ({}, "a.txt", "a.txt: no such file or folder"),
    "a pattern of nothing": ({}, "*.txt", r"\*.txt: no such file or folder"),
    "one example": (
        {"a.txt": b"x"},
        "a.txt",
        "1 different examples are too few.*txt_example",
    ),
    "unknown suffixes": ({"x/a.exe": b"x"}, "x", "x: no file in it has a suffix"),
    "tables and texts": (
        {"x/a.csv": CSV, "x/a.txt": b"x"},
        "x",
        "a.csv.*a.txt.*pattern",
    ),
    "files of no split": (
        {"x/train.csv": CSV, "x/more.csv": CSV},
        "x",
        "more.csv: names no split, and .*train.csv is the training data",
    ),
}
TABLES = {
    "a ragged row": (
        {"a.csv": CSV + b"x,1,2\n"},
        "a.csv",
        "line 42: has 3 cells, the header 2",
    ),
    "a short row": ({"a.csv": CSV + b"x\n"}, "a.csv", "line 42: has 1 cells"),
    "an open quote": ({"a.csv": CSV + b'"x,1\ny,0\n'}, "a.csv", "line 42: is no CSV"),
    "bare carriage returns": (
        {"a.csv": CSV.replace(b"\n", b"\r")},
        "a.csv",
        "line 1: is no CSV.*carriage return",
    ),
    "a missing column": (
        {"a.csv": CSV.replace(b"label", b"class")},
        "a.csv",
        "data.label='label': .*a.csv, line 2 has no such column; it has 'text', 'cla",
    ),
    "a missing key": (
        {"a.jsonl": lines('{"text": "x"}')},
        "a.jsonl",
        "data.label='label': .*line 40 has no such column; it has 'text'",
    ),
    "a column twice": ({"a.csv": b"text,label,text\n"}, "a.csv", "line 1: two columns"),
    "a key twice": (
        {"a.jsonl": lines('{"text": "x", "text": "y", "label": 1}')},
        "a.jsonl",
        "line 40: .*'text' comes twice",
    ),
    "no JSON": ({"a.jsonl": lines('{"text": "x"')}, "a.jsonl", "line 40: is no JSON"),
    "no object": (
        {"a.jsonl": lines('["x", 1]')},
        "a.jsonl",
        r"line 40: holds \['x', 1\]",
    ),
    "a JSON of no list": (
        {"a.json": b'{\n"text": ["x"]}'},
        "a.json",
        "a.json, line 1: is no JSON.*list of objects",
    ),
    "the label -1": (
        {"a.csv": CSV + b"x,-1\n"},
        "a.csv",
        r"a.csv, line 42 \(.*data.label='label' is -1, none of the 2 classes; correct",
    ),
    "the label NaN": (
        {"a.jsonl": lines('{"text": "x", "label": NaN}')},
        "a.jsonl",
        r"a.jsonl, line 40 \(.*is nan, none of the",
    ),
    "an unknown label in test": (
        {"x/train.csv": CSV, "x/test.csv": b"text,label\nx,1\ny,7\n"},
        "x",
        r"test.csv, line 3 \(test, example 1\).*is 7, none of the 2 classes; correct",
    ),
    "no label": (
        {"a.csv": CSV + b"x,\n"},
        "a.csv",
        "line 42: data.label='label' is empty",
    ),
    "mixed labels": (
        {"a.jsonl": lines('{"text": "x", "label": "yes"}')},
        "a.jsonl",
        "line 40: .*'yes'|line 1: .*'yes'",
    ),
    "several labels": (
        {"a.jsonl": lines('{"text": "x", "label": [1, 0]}')},
        "a.jsonl",
        r"line 40: data.label='label' is the list \[1, 0\], and an example has one cl",
    ),
    "a label that is an object": (
        {"a.jsonl": lines('{"text": "x", "label": {"a": 1}}')},
        "a.jsonl",
        r"line 40: data.label='label' is {'a': 1}, neither number nor name",
    ),
    "a number as text": (
        {"a.jsonl": lines('{"text": 5, "label": 1}')},
        "a.jsonl",
        "line 40: data.first='text' is 5, no text",
    ),
    "one class": (
        {"a.csv": b"text,label\n" + b"".join(b"t %d,x\n" % i for i in range(9))},
        "a.csv",
        "data.label='label': all .* labels of .*a.csv train are 'x'",
    ),
    "an empty text": ({"a.csv": CSV + b",1\n"}, "a.csv", "line 42 .*a text is empty"),
    "no Parquet": (
        {"a.parquet": b"PAR1"},
        "a.parquet",
        "a.parquet: is torn or no Parquet",
    ),
    "no Arrow": (
        {"a.arrow": b"ARROW1"},
        "a.arrow",
        "a.arrow: is torn or no Parquet or A",
    ),
}
PAIRS = {
    "unequal files": (
        {"t.en": b"a\nb\nc\n", "t.de": b"a\nb\n"},
        "t.en,t.de",
        "t.en has 3 lines and .*t.de has 2 lines",
    ),
    "one side only": (
        {"x/a.en": b"a\n", "x/a.de": b"a\n", "x/b.en": b"b\n"},
        "x",
        "b.en: no file of the same name ends in .de",
    ),
}
PICTURES = {
    "a torn picture": (
        pictured(p__b__3=b"", **{"p__b__3.png": picture()[:-200]}),
        "p",
        "p/b/3.png: is torn or no picture",
    ),
    "no picture": (
        pictured(**{"p__a__x.jpg": b"text"}),
        "p",
        "x.jpg: is torn or no pic",
    ),
    "a picture of no class": (
        pictured(**{"p__x.png": picture()}),
        "p",
        "p/x.png: lies in no folder of a class",
    ),
    "a picture that is not there": (
        pictured(**{"p__metadata.csv": b"file_name,label\na/0.png,1\na/9.png,1\n"}),
        "p",
        "metadata.csv, line 3: .*9.png is no picture there",
    ),
    "a picture that has no row": (
        pictured(**{"p__metadata.csv": b"file_name,label\na/0.png,1\n"}),
        "p",
        "a/1.png: .*metadata.csv has no row for it",
    ),
    "pictures of one class": (
        {f"p/a/{i}.png": picture() for i in range(9)},
        "p",
        "p has one class, 'a'",
    ),
    "paths in a table that is not beside pictures": (
        {"own.csv": b"image,label\na/0.png,1\n"},
        "own.csv",
        r"own.csv, line 2: data.image='image' is 'a/0.png', not the bytes .*metadata.c",
    ),
    "a table without the picture": (
        {"own.csv": CSV},
        "own.csv",
        "data.image='image': .*own.csv, line 2 has no such column; it has 'text', 'la",
    ),
    "a torn picture in a table": (
        {"own.parquet": cells(*[picture()] * 5, picture()[:-200])},
        "own.parquet",
        "own.parquet, row 6: is torn or no picture",
    ),
    "another table": (pictured(**{"p__own.csv": CSV}), "p", "own.csv.*called metadata"),
}
KINDS = {
    "text": (TEXT, CausalLMConfig(max_len=16)),
    "table": (TABLES, SequenceClassificationConfig(max_len=16)),
    "pair": (PAIRS, Seq2SeqConfig(inputs="en", targets="de", max_len=16)),
    "picture": (PICTURES, ImagesConfig(size=8)),
}
CASES = [(kind, name) for kind, (table, _) in KINDS.items() for name in table]


def read_all(config):
    """What a run does with its data before the first step."""
    config.validate()
    codecs = codec_files.build(config, SIZES)
    for split in ("train", "validation", "test"):
        Split.open(config, codecs, split, SIZES)


def given(tmp_path, monkeypatch, files):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    for name, content in files.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, kind, name):
    table, config = KINDS[kind]
    files, source, message = table[name]
    given(tmp_path, monkeypatch, files)
    parts = [str(tmp_path / "own" / part) for part in source.split(",")]
    config = type(config)(**vars(config) | {"source": ",".join(parts)})
    if hasattr(config, "tokenizer"):
        config.tokenizer.kind = "bytes"
    with pytest.raises(DataError) as error:
        read_all(config)
    text = str(error.value)
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_rights_is_named(tmp_path, monkeypatch):
    given(tmp_path, monkeypatch, {"a.txt": b"x"})
    (tmp_path / "own" / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(Permission denied"):
        read_all(CausalLMConfig(source=str(tmp_path / "own" / "a.txt")))


def test_a_failing_disk_is_told_as_such(tmp_path, monkeypatch):
    given(tmp_path, monkeypatch, {"a.txt.gz": gzip.compress(b"x\n" * 9)})

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "readinto", fail, raising=False)
    with pytest.raises(DataError, match=r"cannot be read \(Input/output error"):
        read_all(CausalLMConfig(source=str(tmp_path / "own" / "a.txt.gz")))


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + CSV, CSV.replace(b"\n", b"\r\n")]
)
def test_marks_and_line_ends_of_windows_are_no_text(tmp_path, monkeypatch, content):
    given(tmp_path, monkeypatch, {"a.csv": content, "b.csv": CSV})
    found, plain = (
        list(own_files.source(tmp_path / "own" / name).examples("all"))
        for name in ("a.csv", "b.csv")
    )
    assert found == plain


def test_a_line_of_ten_megabytes_is_a_text(tmp_path, monkeypatch):
    long = "word " * 2_000_000
    given(tmp_path, monkeypatch, {"a.jsonl": lines(json.dumps({"text": long}))})
    config = CausalLMConfig(source=str(tmp_path / "own" / "a.jsonl"), max_len=16)
    config.tokenizer.kind = "bytes"
    read_all(config)
    found = own_files.source(config.source, labels=()).examples("all")
    assert found[39]["text"] == long
