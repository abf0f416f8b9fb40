"""Long inputs: ListOps and its grammar, film reviews, and how texts are shortened."""

import hashlib
import io
import json
import lzma
import pathlib
import random
import re
import statistics
import zipfile
from collections import Counter

import numpy as np
import pytest

from triform.configs import listops as listops_config
from triform.data import datasets, sources
from triform.data.codecs import files
from triform.data.codecs.classes import Classes
from triform.data.codecs.text import EOS, ByteTokenizer
from triform.data.datasets import SequenceClassificationConfig
from triform.data.sources import listops, movie_reviews
from triform.input_pipeline import Batches, TrainBatches, report
from triform.runtime.errors import DataError

# ListOps ----------------------------------------------------------------------------

INNERMOST = re.compile(r"([_^+-])(\d{2,10})\]")
RESULTS = {
    "_": min,
    "^": max,
    "-": lambda digits: int(statistics.median(digits)),
    "+": lambda digits: sum(digits) % 10,
}
FIRST_100 = {
    "train": "217ae506769272a6049a56f76ff3780784afe84fca2bf5810f29f16f147bce9c",
    "validation": "71c4d7d0a0070df384daac9af7088ca61cb5b5f0424997324c46d019d3e41288",
    "test": "5197ae4abd1346b0426eac4cf8d41842d7c880a1c5803dc7064a76f599bbd260",
}


@pytest.fixture(scope="module")
def expressions() -> list[dict]:
    return list(sources.source("listops").examples("validation"))


def rewritten(text: str) -> tuple[int, int]:
    """(value, depth), by replacing all innermost expressions until none is left."""

    def result(found: re.Match) -> str:
        return str(RESULTS[found[1]](list(map(int, found[2]))))

    depth = 1
    while len(text) > 1:
        shorter = INNERMOST.sub(result, text)
        assert shorter != text, f"no expression: {text}"
        text, depth = shorter, depth + 1
    return int(text), depth


def test_listops_has_the_published_sizes_and_bounds(expressions):
    sizes = {
        split: len(sources.source("listops").examples(split))
        for split in listops.SPLITS
    }
    assert sizes == {"train": 96_000, "validation": 2_000, "test": 2_000}
    lengths = [len(e["text"]) for e in expressions]
    assert 500 < min(lengths) < 510 and 1950 < max(lengths) < 2000
    assert set("".join(e["text"] for e in expressions)) == set("0123456789_^-+]")
    assert len({e["text"] for e in expressions}) == len(expressions)


def test_listops_labels_are_the_values(expressions):
    """Also: 2 to 10 arguments, of which the expression of the test knows."""
    found = [rewritten(e["text"]) for e in expressions[:500]]
    assert [value for value, _ in found] == [e["label"] for e in expressions[:500]]
    assert max(depth for _, depth in found) == listops.MAX_DEPTH
    assert rewritten("_2+75]9]") == (2, 3)
    assert rewritten("-97+22]1]") == (5, 3)  # the median of 9, 7, 4 and 1 is 5.5


def published(rng: random.Random, depth: int, room: int) -> str:
    """One draw of the grammar as it is published; longer than `room`: given up."""
    if depth == 10 or rng.random() > 0.25:
        return str(rng.randrange(10))
    text = rng.choice("_^-+")
    for _ in range(rng.randint(2, 10)):
        if len(text) > room:
            return text
        text += published(rng, depth + 1, room)
    return text + "]"


def test_listops_is_distributed_as_the_published_grammar(expressions):
    rng, drawn = random.Random(0), []
    while len(drawn) < 400:
        text = published(rng, 1, room=2000)
        if 500 < len(text) < 2000:
            drawn.append(text)
    ours = [e["text"] for e in expressions]

    def differ(measure) -> float:
        """The difference of the means in standard errors."""
        a, b = ([measure(t) for t in texts] for texts in (drawn, ours))
        error = np.hypot(np.std(a) / len(a) ** 0.5, np.std(b) / len(b) ** 0.5)
        return abs(np.mean(a) - np.mean(b)) / error

    assert differ(len) < 3
    assert differ(lambda t: t.count("]") / len(t)) < 3
    assert differ(lambda t: len(INNERMOST.findall(t)) / len(t)) < 3
    assert differ(lambda t: t[1:3].isdigit()) < 3
    ours = ours[:400]
    assert differ(lambda t: rewritten(t)[0] in (0, 9)) < 3


def test_listops_symbols_and_classes_are_balanced(expressions):
    counts = Counter("".join(e["text"] for e in expressions))
    for symbols in ("_^-+", "0123456789"):
        found = [counts[symbol] for symbol in symbols]
        assert max(found) < 1.01 * min(found)
    labels = Counter(e["label"] for e in expressions)
    # Minima and maxima favour the ends.
    assert sorted(labels) == list(range(10))
    assert all(0.05 < labels[i] / len(expressions) < 0.12 for i in range(1, 9))
    assert all(0.14 < labels[i] / len(expressions) < 0.20 for i in (0, 9))


@pytest.mark.parametrize("split", FIRST_100)
def test_listops_is_the_same_everywhere(split):
    found = sources.source("listops").examples(split)
    content = repr([found[i] for i in range(100)])
    assert hashlib.sha256(content.encode()).hexdigest() == FIRST_100[split]


def test_listops_by_index_is_what_iteration_gives(expressions):
    found = sources.source("listops").examples("validation")
    for i in (1999, 0, 1000, 999, -1, -2000):
        assert found[i] == expressions[i]
    found[0]["text"] = "spoilt"
    assert found[0] == expressions[0]
    with pytest.raises(IndexError, match="the split has 2000 examples"):
        found[2000]


def test_listops_has_one_id_a_symbol(expressions, tmp_path):
    config = listops_config.get_config().data
    config.train_split, config.cache_dir = "validation", str(tmp_path)
    sizes = {"vocab_size": 20, "num_types": 2, "num_labels": 10}
    codecs = files.build(config, sizes)
    tok = codecs["text"]
    assert tok.vocab_size == 20
    dataset = datasets.dataset(config, "validation", codecs, sizes)
    assert codecs["label"].names == tuple("0123456789")
    assert dataset.sizes["L"].max() <= config.max_len
    batch = TrainBatches(Batches(dataset), seed=0)[0]
    sizes = batch["segments"].sum(-1)
    texts = {e["text"]: e["label"] for e in expressions}
    for row, size, label in zip(batch["inputs"], sizes, batch["label"], strict=True):
        assert row[0] == tok.cls and row[size - 1] == tok.sep
        text = "".join(tok.pieces[i] for i in row[1 : size - 1])
        assert texts[text] == label


# Film reviews -----------------------------------------------------------------------


def local_reviews(folder: str) -> list[dict]:
    content = (pathlib.Path(folder) / movie_reviews.NAME).read_bytes()
    lines = lzma.decompress(content).decode().removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


def archive(reviews: list[dict]) -> bytes:
    """As the original: a file each, among others."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("movie_reviews/", "")
        members.writestr("movie_reviews/README", "folds")
        for x in reviews:
            name = f"movie_reviews/{x['label']}/{x['id']}.txt"
            members.writestr(name, x["text"])
    return file.getvalue()


def test_movie_reviews_are_in_folds(tmp_path, shared_data):
    reviews = local_reviews(shared_data("movie_reviews"))
    reviewed = sources.source("movie_reviews", str(tmp_path))
    found = reviewed.examples("train+validation+test")
    for fold in range(10):
        expected = [
            {"text": x["text"], "label": int(x["label"] == "pos")}
            for x in reviews
            if x["fold"] == fold + 1
        ]
        assert [found[i] for i in range(200 * fold, 200 * fold + 200)] == expected
        assert [x["label"] for x in expected] == [0] * 100 + [1] * 100
    assert reviewed.classes("label") == ("negative", "positive")


def given(folder: pathlib.Path, content: bytes) -> dict[str, str]:
    """Folders of a source with that archive, and no local copy."""
    (folder / movie_reviews.ZIP).write_bytes(content)
    return {"data_dir": str(folder / "prepared"), "manual_dir": str(folder)}


def test_the_archive_has_the_reviews_of_the_local_copy(tmp_path, shared_data):
    reviews = local_reviews(shared_data("movie_reviews"))
    options = given(tmp_path, archive(reviews[::-1]))
    found = sources.source("movie_reviews", **options).examples("validation")
    expected = [x["text"] for x in reviews if x["fold"] == 9]
    assert [x["text"] for x in found] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            archive([{"label": "neg", "id": "cv000_1", "text": "bad"}]),
            "has other reviews than v2.0",
        ),
        (b"torn", "is not the archive it should be"),
    ],
    ids=["another", "torn"],
)
def test_another_archive_is_refused(tmp_path, content, message):
    options = given(tmp_path, content)
    with pytest.raises(DataError, match=f"movie_reviews.zip {message}"):
        sources.source("movie_reviews", **options).examples("train")


# Texts that are longer than a row ---------------------------------------------------


def test_longer_texts_are_trained_on_if_they_are_to_be_shortened(sources):
    texts = ["a", "abcd", "abcdefghi"]
    sources(m=[{"text": text, "label": i} for i, text in enumerate(texts)])
    tok = ByteTokenizer()

    def train(**fields):
        config = SequenceClassificationConfig(
            source="m", max_len=6, batch_size=1, buckets=(3,)
        )
        for name, value in fields.items():
            setattr(config, name, value)
        config.validate()
        sizes = {"vocab_size": tok.vocab_size, "num_types": 2, "num_labels": 3}
        codecs = {"text": tok, "label": Classes("012")}
        dataset = datasets.dataset(config, "train", codecs, sizes)
        return TrainBatches(Batches(dataset), seed=0)

    left, short = train(), train(truncate=True)
    assert (left.left_out, short.left_out) == (1, 0)
    assert "1 of 3 are longer than L=6, left out of training: " in report(left)
    assert "left out" not in report(short)
    assert "1 of 3 are longer than L=6, shortened: " in report(short)
    assert short.fill() == pytest.approx((2 + 5 + 6) / (6 + 6 + 6))
    rows = {}
    for step in range(short.per_epoch):
        batch = short[step]
        real = batch["label_weights"] > 0
        labels = batch["label"][real].tolist()
        rows |= dict(zip(labels, batch["inputs"][real].tolist(), strict=True))
    ids = [tok.first + ord(c) for c in "abcde"]
    assert rows == {
        0: [ids[0], EOS, 0],
        1: [*ids[:4], EOS, 0],
        2: [*ids, EOS],
    }
    # Evaluation shortens in any case, and says so.
    assert left.batches.truncated() == short.batches.truncated() == 1
