"""Texts and words with labels: what is written, what is refused."""

import dataclasses
import math
import re

import numpy as np
import pytest
from data_rows import (
    coded,
    equal,
    ids,
    opened,
    rows,
)

from triform.data import datasets
from triform.data.codecs import text as tokenizer
from triform.data.codecs.text import EOS, ByteTokenizer, TokenizerConfig
from triform.data.datasets import (
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from triform.input_pipeline import Split
from triform.runtime.errors import DataError

# --- SequenceClassification ---


def test_labelled_rows_are_written_as_documented(sources):
    sources(m=[{"a": "pq", "b": "rst", "l": "no"}, {"a": "u", "b": "v", "l": "yes"}])
    config = SequenceClassificationConfig(
        source="m", first="a", second="b", label="l", max_len=8
    )
    dataset = opened(config)
    assert dataset.codecs["label"].names == ("no", "yes")
    equal(
        rows(dataset),
        {
            "inputs": np.array([ids("CpqSrstS"), ids("CuSvS___")]),
            "segments": np.array([[1] * 8, [1] * 5 + [0] * 3]),
            "token_type_ids": np.array([[0] * 4 + [1] * 4, [0, 0, 0, 1, 1, 0, 0, 0]]),
            "label": np.array([0, 1]),
            "label_weights": np.array([1, 1]),
        },
    )
    one = dataclasses.replace(config, second="")
    assert rows(opened(one))["inputs"][0].tolist() == ids("CpqS____")
    # In evaluation the longer side is shortened first.
    short = dataclasses.replace(config, max_len=6)
    assert rows(opened(short))["inputs"][0].tolist() == ids("CpqSrS")
    plain = ByteTokenizer()
    p, q, r, s, t = (plain.first + ord(x) for x in "pqrst")
    batch = rows(opened(config, tok=plain))
    assert batch["inputs"][0].tolist() == [p, q, EOS, r, s, t, EOS, 0]


def test_classes_come_from_the_source_or_the_training_split(sources):
    train = [{"text": "x", "label": y} for y in ("b", "a", "b")]
    other = [{"text": "x", "label": "b"}]
    numbers = [{"text": "x", "label": y} for y in (1, 2)]
    sources(m={"train": train, "test": other}, n=numbers)
    test = opened(SequenceClassificationConfig(source="m"), "test")
    assert test.codecs["label"].names == ("a", "b")
    assert rows(test)["label"].tolist() == [1]
    numbered = opened(SequenceClassificationConfig(source="n"))
    assert numbered.codecs["label"].names == ("0", "1", "2")
    named = {"n:label": ("no", "yes", "maybe")}
    sources(n=[{"text": "x", "label": 1}], classes=named)
    dataset = opened(SequenceClassificationConfig(source="n"))
    assert dataset.codecs["label"].names == named["n:label"]
    assert dataset.preview(rows(dataset)).endswith("yes")


def test_more_classes_than_the_model_knows_are_refused(sources):
    sources(m=[{"text": "x", "label": y} for y in "abcd"])
    message = "model.num_labels=3: 'm' has 4 classes in data.label='label'; raise it"
    with pytest.raises(DataError, match=re.escape(message)):
        opened(SequenceClassificationConfig(source="m"))


def test_numbers_are_regression(sources):
    sources(m=[{"text": "x", "label": 2.5}, {"text": "y", "label": 1}])
    config = SequenceClassificationConfig(source="m", target="number")
    codecs, sizes = coded(config)
    assert codecs.keys() == {"text"}
    dataset = datasets.dataset(config, "train", codecs, sizes)
    batch = rows(dataset)
    assert batch["label"].dtype == np.float32
    assert batch["label"].tolist() == [2.5, 1.0]
    said = "data.label='label': from 1 to 2.5, mean 1.75, standard deviation 0.75"
    assert dataset.remarks() == [said]
    with pytest.raises(DataError, match=r'example 0: .* 2.5.*data.target="number"'):
        opened(SequenceClassificationConfig(source="m"))
    sources(m=[{"text": "x", "label": "2.5"}])  # as CSV has them
    assert rows(opened(config))["label"].tolist() == [2.5]
    sources(m=[{"text": "x", "label": x} for x in (70, 80)])
    assert opened(config).remarks()[0].endswith("1 training takes fewer steps")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        *(((0, 1), bad) for bad in (-1, 2, 0.5, math.nan, math.inf)),
        *(((True, False), bad) for bad in (-1, 2, math.nan)),
        *((np.uint8([0, 1]), bad) for bad in (-1, 2, math.nan)),
        *((("a", "b"), bad) for bad in (-1, "c", math.nan)),
    ],
    ids=str,
)
def test_a_label_that_is_no_class_is_refused_when_the_split_is_opened(
    sources, good, bad
):
    train = [{"text": "x", "label": x} for x in good]
    sources(m={"train": train, "test": [*train, {"text": "x", "label": bad}]})
    config = SequenceClassificationConfig(source="m")
    codecs, sizes = coded(config)
    with pytest.raises(DataError) as caught:
        Split.open(config, codecs, "test", sizes)
    for part in ("m test, example 2", "none of the 2 classes", "correct or remove"):
        assert part in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nan"])
def test_a_number_that_is_not_finite_is_refused_when_the_split_is_opened(sources, bad):
    good = {"text": "x", "label": 1.5}
    sources(m={"train": [good], "test": [good, good, {"text": "x", "label": bad}]})
    config = SequenceClassificationConfig(source="m", target="number")
    codecs, sizes = coded(config)
    with pytest.raises(DataError, match="m test, example 2: .*(nan|inf), not finite"):
        Split.open(config, codecs, "test", sizes)
    rows = [{"text": "x", "label": x} for x in ("-2.5e3", "good")]
    sources(m={"train": [good], "test": rows})
    said = """m test, example 1: .* 'good', no number; .*data.target="class\""""
    with pytest.raises(DataError, match=said):
        Split.open(config, codecs, "test", sizes)


def test_tagged_rows_are_written_as_documented(sources):
    words, tags = ["ab", "", "cde", "f"], ["X", "Y", "Z", "X"]
    sources(m=[{"tokens": words, "tags": tags, "mask": [1, 1, 0, 1]}])
    config = TokenClassificationConfig(source="m", max_len=9)
    expected = {
        "inputs": np.array([ids("CabcdefS_")]),
        "segments": np.array([[1] * 8 + [0]]),
        "targets": np.array([[0, 0, 0, 2, 0, 0, 0, 0, 0]]),
        "weights": np.array([[0, 1, 0, 1, 0, 0, 1, 0, 0]]),
    }
    dataset = opened(config)
    assert dataset.codecs["tags"].names == ("X", "Y", "Z")
    equal(rows(dataset), expected)
    expected["weights"][0, 3] = 0
    masked = opened(dataclasses.replace(config, mask="mask"))
    equal(rows(masked), expected)
    # What is true stands in the order of what is decoded.
    assert dataset.truth(0) == {"true_tags": ["X", "Z", "X"]}
    shown = {k: expected[k][0] for k in ("targets", "weights")}
    assert masked.decoded(shown)["tags"] == masked.truth(0)["true_tags"] == ["X", "X"]
    short = rows(opened(dataclasses.replace(config, max_len=6)))
    assert short["inputs"].tolist() == [ids("CabcdS")]
    assert short["weights"].tolist() == [[0, 1, 0, 1, 0, 0]]


def test_tags_may_be_numbers(sources):
    good = {"tokens": ["ab", "c"], "tags": [0.5, -2.0]}
    sources(m=[good], bad=[good, {"tokens": ["a", "b"], "tags": [1.0, math.nan]}])
    config = TokenClassificationConfig(source="m", target="number", max_len=6)
    assert config.classes() == {}
    dataset = opened(config)
    batch = rows(dataset)
    assert batch["targets"].dtype == np.float32
    assert batch["targets"].tolist() == [[0, 0.5, 0, -2.0, 0, 0]]
    assert dataset.preview(batch).endswith("0.5 -2.0")
    with pytest.raises(DataError, match="bad train, example 1: .* nan, not finite"):
        opened(dataclasses.replace(config, source="bad"))


def test_tags_of_characters(sources):
    sources(m=[{"tokens": "MKV", "tags": "HEC", "mask": "101"}])
    tok = tokenizer.train(
        TokenizerConfig("chars"), ["KMV"], 9, TokenClassificationConfig.SPECIALS
    )
    batch = rows(
        opened(TokenClassificationConfig(source="m", mask="mask", max_len=6), tok=tok)
    )
    assert batch["inputs"].tolist() == [[tok.cls, 6, 5, 7, tok.sep, 0]]
    assert batch["targets"].tolist() == [[0, 2, 1, 0, 0, 0]]
    assert batch["weights"].tolist() == [[0, 1, 0, 1, 0, 0]]


def test_tags_that_do_not_match_their_words_are_named(sources):
    good = {"tokens": ["a", "b"], "tags": ["X", "Y"]}
    sources(m=[good, {"tokens": ["a"], "tags": ["X", "Y"]}])
    with pytest.raises(DataError, match="m train, example 1: 2 in .* for 1 words"):
        opened(TokenClassificationConfig(source="m"))
    sources(n=[good])
    with pytest.raises(DataError, match="model.num_tags=1: 'n' has 2 classes"):
        opened(TokenClassificationConfig(source="n"), num_tags=1)
