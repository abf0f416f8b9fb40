"""A user's own files: every format gives the same rows, splits follow the content."""

import json
import os
import pathlib
import shutil

import numpy as np
import own_files
import pytest

from triform.data.codecs import files as codec_files
from triform.data.datasets import (
    CausalLMConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
)
from triform.data.sources import absolute, formats, is_path
from triform.data.sources.files import read_rows
from triform.data.sources.formats import File
from triform.data.sources.locate import TABLES, suffix
from triform.input_pipeline import Split, TrainBatches, report

ROWS = own_files.rows()
SIZES = {"vocab_size": 300, "num_labels": 3, "num_types": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def labelled(path, **fields):
    made = SequenceClassificationConfig(
        source=str(path), max_len=48, batch_size=8, held_out=0.2, **fields
    )
    made.tokenizer.kind = "bytes"
    return made


def batches(config, split="train", sizes=SIZES):
    """Training batches of one epoch, and the codecs."""
    codecs = codec_files.build(config, sizes)
    train = TrainBatches(Split.open(config, codecs, split, sizes).batches, seed=0)
    return [train[step] for step in range(train.per_epoch)], codecs, train


# Formats ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", own_files.WRITERS)
def test_the_same_rows_give_the_same_batches(folder, tmp_path, name):
    expected, codecs, _ = batches(labelled(own_files.write(tmp_path, "a.jsonl", ROWS)))
    found, same, _ = batches(labelled(own_files.write(folder, name, ROWS)))
    assert {k: c.digest() for k, c in found_digests(same)} == {
        k: c.digest() for k, c in found_digests(codecs)
    }
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)


def found_digests(codecs):
    return sorted(codecs.items())


@pytest.mark.parametrize("name", own_files.WRITERS)
def test_reading_can_go_on_anywhere(folder, name):
    path = own_files.write(folder, name, ROWS)
    file = File((path,), TABLES[suffix(path)])
    every = list(formats.rows(file))
    assert [row.values["text"] for row in every] == [row["text"] for row in ROWS]
    for number in (0, 1, 16, 17, 39, 59):
        rest = list(formats.rows(file, every[number].position))
        assert rest == every[number:], number


def test_rows_keep_what_is_nested(folder):
    nested = [{"messages": [{"role": "user", "content": "é", "x": None}]}] * 2
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    own_files.parquet(folder / "b.parquet", nested)
    for name, unit in (("a.jsonl", "line"), ("b.parquet", "row")):
        path = str(folder / name)
        assert list(read_rows(path)) == [
            (f"{path}, {unit} {i}", row) for i, row in enumerate(nested, 1)
        ]


def test_lines_of_any_other_file_are_rows(folder):
    (folder / "notes").write_bytes(b"\xef\xbb\xbfa\r\n\r\nb")
    found = [row for _, row in read_rows(str(folder / "notes"))]
    assert found == [{"text": "a"}, {"text": ""}, {"text": "b"}]


def test_text_files_are_documents_passages_or_lines(folder):
    long = "".join(f"line {i}\n" for i in range(6000))
    (folder / "a.txt").write_text(long)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfx\r\ny\r\n")

    def read(what):
        source = own_files.source(folder, labels=(), txt_example=what, held_out=0.0)
        return [row["text"] for row in source.examples("train")]

    assert read("file") == [long, "x\ny\n"]
    passages = read("passage")
    assert "".join(passages) == long + "x\ny\n"
    assert len(passages) == 5
    assert all(p.endswith("\n") for p in passages)
    assert read("line") == [*long.removesuffix("\n").split("\n"), "x", "y"]


def test_a_text_file_beyond_all_measure_is_read_in_parts(folder, monkeypatch):
    monkeypatch.setattr(formats, "WHOLE", 50)
    text = "é" * 49 + "\n" + "b" * 10
    (folder / "a.txt").write_text(text)
    source = own_files.source(folder / "a.txt", labels=(), held_out=0.0)
    assert [x["text"] for x in source.examples("train")] == [text[:50], text[50:]]


def test_aligned_files_are_pairs(folder):
    for split, count in (("train", 30), ("test", 4)):
        for side in ("en", "de"):
            lines = [f"{split} {side} {i}\r\n" if i else "\r\n" for i in range(count)]
            (folder / f"{split}.{side}").write_bytes("".join(lines).encode())
    parts = [str(folder / f"train.{x}") for x in ("en", "de")]
    for path in (folder, ",".join(parts), str(folder / "train.*")):
        source = own_files.source(path, ("en", "de"), (), held_out=0.0)
        rows = list(source.examples("train"))
        assert rows[:2] == [
            {"en": "", "de": ""},
            {"en": "train en 1", "de": "train de 1"},
        ]
        assert source.where("train", 1).endswith(", line 2")
    renamed = [shutil.copy(p, f"{p.replace('train', 'x')}.txt") for p in parts]
    source = own_files.source(",".join(renamed), ("en", "de"), (), held_out=0.0)
    assert list(source.examples("train")) == rows
    config = Seq2SeqConfig(source=str(folder), max_len=32, batch_size=8)
    config.drop_empty, config.tokenizer.kind = True, "bytes"
    assert batches(config)[0][0]["encoder_inputs"].shape == (8, 32)


def test_folders_of_save_to_disk(folder):
    """As `datasets` writes them: state.json lists the files, numbers have names."""
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, part in (("train", ROWS[:40]), ("test", ROWS[40:])):
        (folder / split).mkdir()
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
        (folder / split / "dataset_info.json").write_text("{}")
        own_files.arrow(folder / split / "data-00000-of-00001.arrow", part)
    source = own_files.source(folder)
    assert list(source.examples("test")) == ROWS[40:]
    assert source.splits() == ("train", "validation", "test", "all")


def test_names_of_classes_in_arrow_files(folder):
    import pyarrow as pa

    feature = {"_type": "ClassLabel", "names": ["no", "yes", "maybe"]}
    known = json.dumps({"info": {"features": {"label": feature}}})
    table = pa.Table.from_pylist(ROWS).replace_schema_metadata({"huggingface": known})
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as f:
        f.write_table(table)
    config = labelled(folder)
    assert batches(config)[1]["label"].names == ("no", "yes", "maybe")


# Splits -----------------------------------------------------------------------------


def split_of(source):
    """Text -> the splits that it is in."""
    found = {}
    for split in source.splits()[:-1]:
        for row in source.examples(split):
            found.setdefault(row["text"], set()).add(split)
    return found


def test_a_share_is_held_out_by_content(folder):
    rows = [{"text": f"text {i % 900}", "label": i} for i in range(1000)]
    own_files.jsonl(folder / "a.jsonl", rows)
    source = own_files.source(folder / "a.jsonl", labels=(), held_out=0.1)
    before = split_of(source)
    assert all(len(splits) == 1 for splits in before.values())  # equal texts together
    sizes = {split: len(source.examples(split)) for split in source.splits()}
    assert sizes["all"] == 1000
    assert sizes["train"] + sizes["validation"] + sizes["test"] == 1000
    # Binomial: 5 standard deviations.
    assert all(abs(sizes[x] - 100) < 50 for x in ("validation", "test"))
    report = " ".join(source.report("train"))
    assert "data.held_out=0.1" in report
    assert "repeat another one" in report

    more = [{"text": f"new {i}", "label": 0} for i in range(300)]
    own_files.jsonl(folder / "0.jsonl", more)  # read before the others
    after = split_of(own_files.source(folder, labels=(), held_out=0.1))
    assert {text: after[text] for text in before} == before


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_shares_are_the_same_in_every_format(folder, tmp_path, name):
    first = own_files.source(own_files.write(tmp_path, "a.jsonl", ROWS), held_out=0.2)
    other = own_files.source(own_files.write(folder, name, ROWS), held_out=0.2)
    assert split_of(first) == split_of(other)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train.jsonl", "test.jsonl"), "test"),
        (("train-00000-of-00002.jsonl", "validation-00000-of-00001.jsonl"), "val"),
        (("my_train.jsonl", "my.dev.jsonl"), "val"),
        (("training/a.jsonl", "valid/a.jsonl"), "val"),
        (("deep/train/a.jsonl", "deep/test/a.jsonl"), "test"),
        (("plain.jsonl", "test.jsonl"), "test"),
    ],
)
def test_names_of_files_and_folders_are_splits(folder, names, split):
    for name, part in zip(names, (ROWS[:40], ROWS[40:]), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        own_files.jsonl(folder / name, part)
    listed = ",".join(str(folder / name) for name in names)
    for path in (folder, listed, str(folder / "**" / "*.jsonl")):
        source = own_files.source(path, held_out=0.1)
        held = "validation" if split == "val" else "test"
        assert list(source.examples(held)) == ROWS[40:]
        assert len(source.examples("train")) < 40  # the other one is held out of it
        assert len(source.examples("all")) == len(ROWS)


def test_few_rows_leave_none_of_the_splits_empty(folder):
    own_files.jsonl(folder / "a.jsonl", ROWS[:3])
    source = own_files.source(folder / "a.jsonl", held_out=0.01)
    assert [len(source.examples(x)) for x in ("train", "validation", "test")] == [1] * 3


def test_slices_are_those_of_tfds(folder):
    own_files.jsonl(folder / "a.jsonl", ROWS)
    source = own_files.source(folder / "a.jsonl", held_out=0.0)
    texts = [row["text"] for row in ROWS]
    for split, expected in (
        ("train[:10]", texts[:10]),
        ("train[-5:]", texts[-5:]),
        ("train[25%:50%]", texts[15:30]),
        ("train[50:]+train[:10]", texts[50:] + texts[:10]),
        ("all[3:4]", texts[3:4]),
    ):
        found = source.examples(split)
        assert [row["text"] for row in found] == expected
        assert [found[i]["text"] for i in range(len(found))] == expected
    assert source.splits() == ("train", "all")


def test_rows_are_found_in_any_order(folder):
    own_files.separated(folder / "a.csv", own_files.rows(2000))
    source = own_files.source(folder / "a.csv", held_out=0.1)
    rows = source.examples("train")
    every = list(rows)
    order = np.random.default_rng(0).permutation(len(rows))[:40]
    assert [rows[int(i)] for i in order] == [every[i] for i in order]


# Paths and identity ------------------------------------------------------------------


def test_what_a_path_is(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for name in (
        "a.csv",
        "./mnist",
        "~/x",
        "x/*",
        "a.en,a.de",
        str(folder),
        "a.csv.gz",
    ):
        assert is_path(name), name
        assert all(map(os.path.isabs, absolute(name).split(","))), name
    (folder / "cldr").mkdir()
    (folder / "notes").mkdir()
    assert is_path("notes")
    for name in ("cldr", "mnist", "wmt14_translate/de-en", "mr_sentiment", ""):
        assert not is_path(name), name
        assert absolute(name) == name
    assert absolute("~/x, a.de") == f"{folder}/x,{folder}/a.de"


def test_data_are_known_by_their_content(folder, tmp_path):
    path = pathlib.Path(own_files.write(folder, "a.csv", ROWS))
    cache = str(tmp_path / "found")
    first = own_files.source(path, cache=cache).fingerprint("train")
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert own_files.source(moved / "a.csv", cache=cache).fingerprint("train") == first
    state = path.stat()
    path.write_text(path.read_text().replace("Row 7,", "Row 8,"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert own_files.source(path, cache=cache).fingerprint("train") != first


def test_another_test_file_leaves_the_training_data_as_they_are(folder):
    own_files.jsonl(folder / "train.jsonl", ROWS)
    own_files.jsonl(folder / "test.jsonl", ROWS[:5])
    first = own_files.source(folder)
    before = [first.fingerprint(x) for x in ("train", "validation", "test")]
    own_files.jsonl(folder / "test.jsonl", ROWS[:9])
    after = [own_files.source(folder).fingerprint(x) for x in ("train", "validation")]
    assert after == before[:2]
    assert own_files.source(folder).fingerprint("test") != before[2]


# What is said ------------------------------------------------------------------------


def test_the_report_counts(folder):
    rows = [*ROWS, {"text": "", "label": 1}, {"text": "y" * 60, "label": 1}]
    path = own_files.write(folder, "a.csv", rows)
    config = labelled(path, drop_empty=True)
    text = report(batches(config, "all")[2])
    for part in (
        "1 of 62 examples repeat another one",
        "examples with an empty text: 1",
        "the longest needs L=62",
        "1 of 62 are longer than L=48, left out of training: ",
        "1 of 62 are empty",
        "validation and test by content, data.held_out=0.2",
    ):
        assert part in text, (part, text)


def test_examples_of_other_splits_are_counted(folder):
    own_files.jsonl(folder / "train.jsonl", ROWS)
    own_files.jsonl(folder / "test.jsonl", ROWS[:5])
    lines = own_files.source(folder, held_out=0.0).report("train")
    assert "5 examples of test are in train, too" in lines


def test_a_gpt_reads_a_folder(folder):
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document {i}\n" * 9)
    config = CausalLMConfig(source=str(folder), max_len=16, batch_size=4)
    config.tokenizer.kind = "bytes"
    found, _, train = batches(config)
    assert found[0]["inputs"].shape == (4, 16)
    assert "train 8, validation 3, test 1 examples" in report(train)
