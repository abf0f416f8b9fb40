"""Encoded once: what is cached, under which key, and the codecs of a run."""

import dataclasses
import os
import threading

import numpy as np
import pytest

from triform.data import store
from triform.data.codecs import files
from triform.data.codecs.classes import Classes
from triform.data.codecs.text import ByteTokenizer, TokenizerConfig
from triform.data.datasets import (
    Corpus,
    MixtureConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
)
from triform.data.store import Feature, open_store
from triform.input_pipeline import Split
from triform.runtime.errors import DataError

BYTES = ByteTokenizer()


def pairs(count):
    return [{"en": f"{i:03}" + "x" * (i % 5), "de": f"{i:03}"} for i in range(count)]


def config(**fields):
    return Seq2SeqConfig(**{"source": "memory", **fields})


def build_tokenizer(config, vocab_size):
    return files.build(config, {"vocab_size": vocab_size})["text"]


def opened(config, split="train", tok=BYTES):
    return open_store(config, split, tok, config.features())


# --- Reading ---


def test_a_missing_feature_is_named(sources, tmp_path):
    sources(memory=pairs(3))
    message = "data.targets: 'memory' has no feature 'fr'; expected one of de, en"
    with pytest.raises(DataError, match=message):
        opened(config(targets="fr"))
    with pytest.raises(DataError, match=message):
        build_tokenizer(config(targets="fr"), 300)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


@pytest.mark.parametrize("value", [3, ["a", "b"], b"a"])
def test_what_is_no_text_is_named(sources, value):
    sources(memory=[{"en": "a", "de": value}])
    with pytest.raises(DataError, match=r"data.targets: feature 'de' .* is no text"):
        opened(config())


def test_values_must_be_numbers_or_names(sources):
    sources(memory=[{"x": {"a": 1}}])
    feature = Feature("label", "memory", "x", is_text=False)
    with pytest.raises(DataError, match="data.label: feature 'x' .* neither numbers"):
        open_store(config(), "train", BYTES, [feature])


def test_texts_of_an_example_lie_side_by_side(sources):
    sources(memory=[{"x": ["ab", ""], "y": [1.5, 2]}, {"x": [], "y": []}, {"x": ["c"]}])
    features = [Feature("words", "memory", "x", divide=list, end=True)]
    tokens = open_store(config(), "train", BYTES, features).tokens["words"]
    assert len(tokens) == 3
    assert tokens.first.tolist() == [0, 2, 2, 3]
    assert tokens.sizes().tolist() == [3, 1, 2]
    assert tokens.ids.tolist() == [100, 101, 1, 1, 102, 1]
    assert tokens[2].tolist() == [102, 1]


def test_words_and_bytes_are_counted_in_the_raw_text(sources):
    sources(memory=[{"en": "two words\n", "de": "\u00fcber "}, {"en": "", "de": "a"}])
    found = opened(config()).tokens
    assert (found["inputs"].words, found["inputs"].bytes) == (3, 10)
    assert (found["targets"].words, found["targets"].bytes) == (2, 7)


# --- Cache ---


def test_tokens_are_computed_once(sources):
    loads = sources(memory=pairs(20))
    first = opened(config())
    second = opened(config())
    assert loads == [("memory", "train")]
    assert second.digest == first.digest
    for i, example in enumerate(pairs(20)):
        assert BYTES.decode(second.tokens["inputs"][i]) == example["en"]
        assert BYTES.decode(second.tokens["targets"][i]) == example["de"]


def test_a_torn_cache_entry_is_refused(sources, tmp_path):
    sources(memory=pairs(20))
    entry = opened(config()).digest
    os.truncate(tmp_path / "cache" / "tokens" / entry / "inputs.tokens", 10)
    with pytest.raises(DataError, match="5 tokens where .* were written; delete"):
        opened(config())


def test_what_changes_tokens_changes_the_cache_entry(sources):
    sources(memory=pairs(20), elsewhere=pairs(20))
    flipped = opened(config(inputs="de", targets="en"))
    first = opened(config())
    feature = Feature("inputs", "memory", "en")
    changes = ({}, {"prefix": "to: "}, {"divide": list}, {"end": True})
    entries = [
        first,
        flipped,
        opened(config(), "validation"),
        opened(config(), tok=ByteTokenizer(lowercase=True)),
        opened(config(), tok=ByteTokenizer(specials=["[CLS]"])),
        opened(config(source="elsewhere")),
        *(
            open_store(config(), "train", BYTES, [dataclasses.replace(feature, **x)])
            for x in changes
        ),
    ]
    assert len({entry.digest for entry in entries}) == len(entries)
    np.testing.assert_array_equal(
        flipped.tokens["inputs"].ids, first.tokens["targets"].ids
    )
    # What does not change tokens shares the entry.
    wider = config(max_len=99, batch_size=1, drop_empty=True)
    assert opened(wider).digest == first.digest


def test_several_at_once_share_one_entry(sources, monkeypatch, tmp_path):
    sources(memory=pairs(20))
    together, rename = threading.Barrier(4), os.rename

    def rename_together(*args):  # all have found the cache empty and written theirs
        together.wait(timeout=30)
        rename(*args)

    monkeypatch.setattr(store.os, "rename", rename_together)
    stores = []

    def run():
        stores.append(opened(config()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(stores) == 4
    (digest,) = {store.digest for store in stores}
    assert os.listdir(tmp_path / "cache" / "tokens") == [digest]
    assert {len(store.tokens["inputs"]) for store in stores} == {20}


def test_a_failed_computation_leaves_no_entry(sources):
    sources(memory=[*pairs(5), {"en": "no German"}])
    with pytest.raises(DataError, match="has no feature 'de'"):
        opened(config())
    sources(memory=pairs(5))
    assert len(opened(config()).tokens["inputs"]) == 5


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("TRIFORM_CACHE", raising=False)
    home = os.path.join(os.path.expanduser("~"), ".cache", "triform")
    assert store.cache_root(Seq2SeqConfig()) == home
    monkeypatch.setenv("TRIFORM_CACHE", "from-environment")
    here = os.path.abspath("from-environment")
    assert store.cache_root(Seq2SeqConfig()) == here
    monkeypatch.setenv("TRIFORM_CACHE", "~/cache")
    assert store.cache_root(Seq2SeqConfig()) == os.path.expanduser("~/cache")
    assert store.cache_root(Seq2SeqConfig(cache_dir="given")) == os.path.abspath(
        "given"
    )


# --- The codecs of a run ---


def test_a_given_or_saved_tokenizer_is_not_trained_again(sources, tmp_path):
    loads = sources(memory=pairs(20))
    first = build_tokenizer(config(), 300)
    assert loads == [("memory", "train")]
    path = first.save(str(tmp_path))
    given = config(tokenizer=TokenizerConfig(path=path))
    assert build_tokenizer(given, 300).digest() == first.digest()
    assert files.load(str(tmp_path), config())["text"].digest() == first.digest()
    other = files.build(config(), {"vocab_size": 300}, earlier=str(tmp_path))
    assert other["text"].digest() == first.digest()
    assert loads == [("memory", "train")]


def test_a_tokenizer_is_trained_on_what_it_will_encode(sources):
    sources(a=[{"x": "ab", "y": "c"}], b=[{"x": "d", "y": "e"}], c=[{"z": "f"}])
    corpora = (Corpus("a", "x", "y", "to: "), Corpus("b", "y", "x"))
    kind = TokenizerConfig("chars", corpora=("c:z",))
    tok = build_tokenizer(MixtureConfig(corpora=corpora, tokenizer=kind), 99)
    assert "".join(tok.pieces[3:]) == " :abcdefot"


def test_a_tokenizer_that_is_not_there_or_broken_is_an_error(tmp_path):
    given = config(tokenizer=TokenizerConfig(path="no/such.json"))
    with pytest.raises(DataError, match="no such file; leave it empty to train"):
        build_tokenizer(given, 300)
    with pytest.raises(DataError, match="its tokenizer is gone"):
        files.load(str(tmp_path), config())
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{")
        with pytest.raises(DataError, match="not a tokenizer file"):
            files.load(str(tmp_path), config())
        (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_too_small_a_vocabulary_is_an_error(sources, kind):
    sources(memory=pairs(5))
    message = f"model.vocab_size=100: the tokenizer {kind} has 259 ids; raise it"
    with pytest.raises(DataError, match=message):
        build_tokenizer(config(tokenizer=TokenizerConfig(kind)), 100)


def test_classes_round_trip():
    classes = Classes(["no", "yes", "m\u00e4h"])
    assert classes.size == 3
    ids = classes.encode(["yes", "m\u00e4h", "no", "yes"])
    assert (ids.dtype, ids.tolist()) == (np.int32, [1, 2, 0, 1])
    assert classes.decode(ids) == ["yes", "m\u00e4h", "no", "yes"]
    for numbers in (np.array([2, 0]), np.uint8([2, 0]), np.array([2.0, 0.0])):
        assert classes.encode(numbers).tolist() == [2, 0]
    assert classes.encode(["maybe", "Yes", ""]).tolist() == [-1] * 3
    assert classes.encode([-1, 3, 0.5, np.nan, np.inf, 1e30]).tolist() == [-1] * 6
    assert classes.digest() == Classes(("no", "yes", "m\u00e4h")).digest()
    others = (["yes", "no", "m\u00e4h"], ["no", "yes"], ["no", "yesm\u00e4h"])
    assert len({Classes(names).digest() for names in (classes.names, *others)}) == 4


def test_names_of_classes_are_saved_with_a_run(sources, tmp_path):
    train = [{"text": "x", "label": y} for y in ("b", "\u00e4", "b")]
    loads = sources(memory={"train": train, "test": train[:1]})
    made = SequenceClassificationConfig(source="memory")
    codecs = files.build(made, {"vocab_size": 300, "num_labels": 2})
    assert codecs["label"].names == ("b", "\u00e4")
    assert files.class_counts(made, codecs) == {"num_labels": 2}
    files.save(codecs, str(tmp_path))
    loads.clear()
    found = files.load(str(tmp_path), made)
    assert found.keys() == codecs.keys()
    assert {k: c.digest() for k, c in found.items()} == {
        k: c.digest() for k, c in codecs.items()
    }
    assert not loads  # nothing of the source is read
    sizes = {"vocab_size": 300, "num_labels": 2}
    test = Split.open(made, found, "test", sizes)
    assert next(test.batches.evaluation())[1]["label"].tolist()[0] == 0
    assert loads == [("memory", "test")]
    (tmp_path / "classes.json").unlink()
    with pytest.raises(DataError, match=r"data.label=.*restore classes.json"):
        Split.open(made, files.load(str(tmp_path), made), "test", sizes)
    # Numbers are not classes: nothing is to be saved but the tokenizer.
    number = dataclasses.replace(made, target="number")
    assert files.class_counts(number, codecs) == {}
    assert files.load(str(tmp_path), number).keys() == {"text"}
