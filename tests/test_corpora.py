"""Laws of the corpora: official counts, file order, and what is told of bad files."""

import gzip
import json
import lzma
import pathlib
from collections import Counter

import numpy as np
import pytest

from triform.data import sources
from triform.data.sources import clinc150, mnist, mr_sentiment, wikitext2
from triform.runtime.errors import DataError

# Corpus -> features, and examples of every split.
FACTS = {
    "tinyshakespeare": (("text",), {"train": 1, "validation": 1}),
    "wikitext2": (("text",), {"train": 600, "validation": 60}),
    "classic_books": (("title", "author", "text"), {"train": 39, "validation": 3}),
    "clinc150": (
        ("text", "intent"),
        {"train": 15_000, "validation": 3_000, "test": 4_500},
    ),
    "mr_sentiment": (
        ("text", "label"),
        {"train": 8_467, "validation": 1_118, "test": 1_077},
    ),
    "movie_reviews": (
        ("text", "label"),
        {"train": 1_600, "validation": 200, "test": 200},
    ),
    "mnist": (("image", "label"), {"train": 60_000, "test": 10_000}),
    "flip_ss3": (
        ("sequence", "ss3", "mask"),
        {"train": 9_712, "validation": 1_080, "test": 364},
    ),
    "sasrec_video": (("user", "item"), {"train": 31_013}),
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> str:
    """The data_dir of all corpora: each is prepared once."""
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def corpus(prepared, shared_data):
    """(corpus, split) -> its examples, from the published files."""

    def load(name: str, split: str):
        shared_data(name)
        return sources.source(name, data_dir=prepared).examples(split)

    return load


def _lines(folder: str, name: str) -> list[str]:
    content = (pathlib.Path(folder) / name).read_bytes()
    unpack = gzip.decompress if name.endswith(".gz") else lzma.decompress
    return unpack(content).decode().removesuffix("\n").split("\n")


# The published files ----------------------------------------------------------------


@pytest.mark.parametrize("name", FACTS)
def test_splits_have_the_official_sizes(corpus, prepared, name):
    features, sizes = FACTS[name]
    for split, size in sizes.items():
        found = corpus(name, split)
        assert len(found) == size
        assert set(found[0]) == set(features)
    choices = f"expected one of {', '.join(sizes)},"
    with pytest.raises(DataError, match=choices):
        corpus(name, "dev")
    # The published files share the folder a download would use.
    assert (pathlib.Path(prepared) / name).is_dir()


def test_tinyshakespeare_is_cut_as_nanogpt_does(corpus, shared_data):
    splits = ("train", "validation")
    parts = [corpus("tinyshakespeare", split)[0]["text"] for split in splits]
    assert [len(part) for part in parts] == [1_003_854, 111_540]
    file = pathlib.Path(shared_data("tinyshakespeare")) / "input.txt"
    assert "".join(parts) == file.read_bytes().decode()


@pytest.mark.parametrize(
    ("split", "file", "tokens"),
    [
        ("train", "train.txt.gz", 2_088_628),
        ("validation", "valid.txt.gz", 217_646),
    ],
)
def test_wikitext2_has_the_official_tokens(corpus, shared_data, split, file, tokens):
    texts = [example["text"] for example in corpus("wikitext2", split)]
    assert sum(len(text.split()) + text.count("\n") for text in texts) == tokens
    lines = _lines(shared_data("wikitext2"), file)
    assert "".join(texts) == "".join(f"{line}\n" for line in lines)
    assert all(wikitext2.TITLE.fullmatch(text.split("\n")[0]) for text in texts[1:])


def test_classic_books_are_in_file_order(corpus, shared_data):
    lines = _lines(shared_data("classic_books"), "books.jsonl.xz")
    books = [json.loads(line) for line in lines]
    for split, part in (("train", "train"), ("validation", "valid")):
        expected = [
            {
                "title": book["title"],
                "author": book["author"],
                "text": "\n".join(book["paragraphs"]),
            }
            for book in books
            if book["split"] == part
        ]
        assert list(corpus("classic_books", split)) == expected


def test_clinc150_is_in_file_order(corpus, shared_data, prepared):
    lines = _lines(shared_data("clinc150"), "data_full.json.gz")
    parts = json.loads("\n".join(lines))
    for split, part in clinc150.PARTS.items():
        found = list(corpus("clinc150", split))
        names = sources.source("clinc150", data_dir=prepared).classes("intent")
        assert [[e["text"], names[e["intent"]]] for e in found] == parts[part]
        # As many of each intent: 100, 20 and 30.
        assert set(Counter(e["intent"] for e in found).values()) == {len(found) // 150}
    assert len(names) == 150
    assert list(names) == sorted(names)


def test_mr_sentiment_loses_nothing_and_splits_no_text(corpus, shared_data, prepared):
    sizes = FACTS["mr_sentiment"][1]
    splits = {split: list(corpus("mr_sentiment", split)) for split in sizes}
    names = sources.source("mr_sentiment", data_dir=prepared).classes("label")
    assert names == ("negative", "positive")
    home = {e["text"]: split for split, part in splits.items() for e in part}
    for label, file in enumerate(mr_sentiment.MrSentiment.files):
        lines = [line.strip() for line in _lines(shared_data("mr_sentiment"), file)]
        assert len(lines) == 5_331
        for split, part in splits.items():
            found = [e["text"] for e in part if e["label"] == label]
            assert found == [line for line in lines if home[line] == split]


def test_mnist_is_in_the_official_order(corpus, shared_data):
    path = pathlib.Path(shared_data("mnist")) / mnist.NAME
    with np.load(path) as arrays:
        for split in mnist.STEMS:
            images, labels = zip(
                *((e["image"], e["label"]) for e in corpus("mnist", split)), strict=True
            )
            images = np.stack(images)
            assert images.dtype == np.uint8
            assert images.shape[1:] == (28, 28, 1)
            np.testing.assert_array_equal(images[..., 0], arrays[f"{split}_images"])
            np.testing.assert_array_equal(labels, arrays[f"{split}_labels"])


def test_flip_ss3_has_a_state_for_every_residue(corpus, shared_data):
    rows = [line.split("\t") for line in _lines(shared_data("flip_ss3"), "ss3.tsv.xz")]
    chains = {split: list(corpus("flip_ss3", split)) for split in FACTS["flip_ss3"][1]}
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        expected = [tuple(row[2:]) for row in rows[1:] if row[1] == part]
        found = [(e["sequence"], e["ss3"], e["mask"]) for e in chains[split]]
        assert found == expected
    assert sum(len(e["ss3"]) for part in chains.values() for e in part) == 2_845_094


def test_label_names_of_what_has_none(corpus, prepared):
    corpus("tinyshakespeare", "train")
    assert sources.source("tinyshakespeare", data_dir=prepared).classes("text") == ()
    assert sources.source("tinyshakespeare", data_dir=prepared).classes("other") == ()
    assert sources.source("cldr").classes("en") == ()
