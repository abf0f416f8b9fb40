"""A tokenizer of bytes, and rows of every kind of data made with it."""

import dataclasses
import tempfile

import numpy as np

from triform.data import datasets
from triform.data.codecs import files
from triform.data.codecs.text import EOS, PAD, ByteTokenizer
from triform.data.datasets import (
    EVALUATION,
    Epoch,
    SpanCorruptionConfig,
)
from triform.input_pipeline import Batches

TOK = ByteTokenizer(
    specials=("[CLS]", "[SEP]", "[MASK]", *SpanCorruptionConfig.SPECIALS[:20])
)
CLS, SEP, MASK = TOK.cls, TOK.sep, TOK.mask
SIZES = {"vocab_size": TOK.vocab_size, "num_types": 2, "num_labels": 3, "num_tags": 99}
FIRST = Epoch(seed=0, number=0, train=True)


def ids(text):
    """Of a byte tokenizer; upper-case letters stand for special ids."""
    special = {"C": CLS, "S": SEP, "E": EOS, "_": PAD, "M": MASK}
    return [special.get(c) if c in special else TOK.first + ord(c) for c in text]


def coded(config, tok=TOK, **sizes):
    """(codecs of a new run, sizes of its model)."""
    config.validate()
    sizes = SIZES | sizes
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder)
        return files.build(config, sizes, earlier=folder), sizes


def opened(config, split="train", tok=TOK, **sizes):
    return datasets.dataset(config, split, *coded(config, tok, **sizes))


def rows(dataset, epoch=EVALUATION):
    """Every item in a row of one batch of the longest shape, in order."""
    batches = Batches(dataset)
    items = np.arange(len(dataset))
    one = dataclasses.replace(dataset.config, batch_size=len(items))
    dataset.config = batches.config = one
    return batches.collate(len(one.shapes()) - 1, items, epoch)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def documents(count, words=40, seed=0):
    """Documents of sentences of which each names its document."""
    rng = np.random.default_rng(seed)
    texts = []
    for d in range(count):
        drawn = rng.integers(2, 9, words)
        text = " ".join(f"D{d} {'w' * n}." for n in drawn)
        texts.append({"text": text})
    return texts
