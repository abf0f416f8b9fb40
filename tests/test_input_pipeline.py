"""From examples to batches: what is visited, in which order, and what is refused."""

import dataclasses
import itertools
import re
import threading
from collections import Counter

import numpy as np
import pytest

from triform.data import datasets
from triform.data.codecs.text import EOS, PAD, ByteTokenizer
from triform.data.datasets import Seq2SeqConfig
from triform.input_pipeline import Batches, Prefetch, TrainBatches, check_batch, report
from triform.runtime.errors import DataError

BYTES = ByteTokenizer()


@pytest.fixture
def corpus(sources):
    """(examples, Seq2SeqConfig fields) -> config of a source that holds them."""

    def make(examples, **fields):
        sources(memory=examples)
        return Seq2SeqConfig(**{"source": "memory", **fields})

    return make


def sentences(count, longest=14, seed=0):
    """Seq2Seq of which each names its number; lengths are spread up to `longest`."""
    rng = np.random.default_rng(seed)

    def text(i):
        return f"{i:03}" + "x" * rng.integers(0, longest - 2)

    return [{"en": text(i), "de": text(i)} for i in range(count)]


def batches(config, split="train", vocab=259):
    config.validate()
    limits = dict.fromkeys(("encoder_inputs", "inputs", "targets"), vocab)
    return Batches(datasets.open(config, split, BYTES, limits))


def numbers(batch, field="encoder_inputs"):
    """Which examples a batch holds, read from their text."""
    rows = batch[field][(batch["encoder_segments"] > 0).any(-1)]
    return [int(BYTES.decode(row)[:3]) for row in rows]


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("buckets", [(), (6, 10)])
def test_an_epoch_visits_every_example_once(corpus, buckets):
    config = corpus(sentences(53), max_len=16, batch_size=4, buckets=buckets)
    train = TrainBatches(batches(config), seed=3)
    assert train.left_out == 0
    orders = []
    for epoch in range(3):
        steps = range(epoch * train.per_epoch, (epoch + 1) * train.per_epoch)
        seen = [n for step in steps for n in numbers(train[step])]
        assert sorted(seen) == list(range(53))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    config = corpus(sentences(41), max_len=16, batch_size=4, buckets=(8,))
    store = batches(config)
    first = TrainBatches(store, seed=5)
    steps = list(range(3 * first.per_epoch))
    expected = [first[step] for step in steps]
    for step in np.random.default_rng(0).permutation(steps):
        equal(first[int(step)], expected[step])
    for step in (len(steps) - 1, 0, first.per_epoch):
        equal(TrainBatches(batches(config), seed=5)[step], expected[step])
    other = TrainBatches(store, seed=6)
    assert [numbers(other[s]) for s in steps] != [numbers(b) for b in expected]


def test_each_pair_is_in_the_shortest_bucket_that_holds_it(corpus):
    examples = sentences(60)
    config = corpus(examples, max_len=16, batch_size=4, buckets=(6, 10))
    train = TrainBatches(batches(config), seed=0)
    for step in range(train.per_epoch):
        batch = train[step]
        length = batch["inputs"].shape[1]
        # As many places in all as batch_size rows of max_len have.
        assert len(batch["inputs"]) == 4 * 16 // length
        for i in numbers(batch):
            longest = max(len(x) for x in examples[i].values()) + 1
            assert length == min(n for n in (6, 10, 16) if n >= longest)
    assert train.shapes() == [6, 10, 16]


def test_rows_are_written_as_documented(corpus):
    config = corpus([{"en": "ab", "de": "xyz"}], max_len=6, batch_size=2)
    batch = TrainBatches(batches(config), seed=0)[0]
    a, b, x, y, z = (BYTES.encode_batch([c])[0][0] for c in "abxyz")
    none = [0] * 6
    expected = {
        "encoder_inputs": [[a, b, EOS, PAD, PAD, PAD], none],
        "encoder_segments": [[1, 1, 1, 0, 0, 0], none],
        "inputs": [[PAD, x, y, z, PAD, PAD], none],
        "targets": [[x, y, z, EOS, PAD, PAD], none],
        "weights": [[1, 1, 1, 1, 0, 0], none],
    }
    equal(batch, {k: np.array(v) for k, v in expected.items()})
    dtypes = {k: v.dtype for k, v in batch.items()}
    assert dtypes.pop("weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_inputs_are_targets_shifted_right(corpus):
    config = corpus(sentences(30), max_len=16, batch_size=8)
    train = TrainBatches(batches(config), seed=0)
    for step in range(train.per_epoch):
        batch = train[step]
        assert (batch["inputs"][:, 0] == PAD).all()
        later = batch["weights"][:, 1:] > 0
        np.testing.assert_array_equal(
            batch["inputs"][:, 1:][later], batch["targets"][:, :-1][later]
        )


@pytest.mark.parametrize("buckets", [(), (6, 10)])
@pytest.mark.parametrize("count", [1, 8, 29])
def test_evaluation_visits_every_example_once(corpus, buckets, count):
    # Some of them are longer than max_len.
    examples = sentences(count, longest=30)
    config = corpus(examples, max_len=16, batch_size=8, buckets=buckets)
    seen, texts = [], {}
    for ids, batch in batches(config, "validation").evaluation():
        assert numbers(batch) == ids.tolist()
        assert (batch["weights"][len(ids) :] == 0).all()
        seen += ids.tolist()
        rows = zip(ids, batch["targets"], strict=False)
        texts |= {int(i): BYTES.decode(row) for i, row in rows}
    assert sorted(seen) == list(range(count))
    for i, text in texts.items():
        assert text == examples[i]["de"][:15]


def test_training_leaves_long_pairs_out_and_says_so(corpus):
    examples = [*sentences(20, longest=10), {"en": "020" + "x" * 20, "de": "020"}]
    train = TrainBatches(batches(corpus(examples, max_len=12, batch_size=4)), seed=0)
    seen = [n for step in range(train.per_epoch) for n in numbers(train[step])]
    assert sorted(seen) == list(range(20))
    assert train.left_out == 1
    assert "1 longer than data.max_len=12 or empty" in report(train)


def test_the_reported_fill_is_the_share_of_places_that_items_need(corpus):
    config = corpus(sentences(50), max_len=16, batch_size=4, buckets=(8,))
    train = TrainBatches(batches(config), seed=0)
    epoch = [train[step] for step in range(train.per_epoch)]
    needed = sum(
        np.maximum(b["encoder_segments"].sum(1), b["weights"].sum(1)).sum()
        for b in epoch
    )
    assert train.fill() == pytest.approx(needed / sum(b["inputs"].size for b in epoch))


# --- Law 10: what is refused ---


def test_an_id_outside_the_vocabulary_names_its_example(corpus):
    examples = [*sentences(9), {"en": "009", "de": "zz"}]
    config = corpus(examples, max_len=16, batch_size=4)
    train = TrainBatches(batches(config, vocab=BYTES.encode_batch(["z"])[0][0]), seed=0)
    message = (
        "memory train, example 9: id 125 in 'inputs' is outside the vocabulary of 125; "
        "raise model.vocab_size or use the tokenizer of this model"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        for step in range(train.per_epoch):
            train[step]


def test_a_negative_id_is_outside_too():
    batch = {"targets": np.array([[3, 4], [3, -1]]), "weights": np.array([[-1, 9]])}
    with pytest.raises(DataError, match="row 1: id -1 in 'targets' is outside"):
        check_batch(batch, {"targets": 5}, lambda row: f"row {row}")
    check_batch({"targets": np.array([[0, 4]])}, {"targets": 5}, str)


@pytest.mark.parametrize("side", ["en", "de"])
def test_an_empty_side_names_its_example(corpus, side):
    examples = sentences(7)
    examples[4][side] = ""
    config = corpus(examples, max_len=16, batch_size=4)
    with pytest.raises(DataError, match="memory train, example 4: a text is empty"):
        batches(config)
    train = TrainBatches(batches(dataclasses.replace(config, drop_empty=True)), seed=0)
    seen = [n for step in range(train.per_epoch) for n in numbers(train[step])]
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]


def test_nothing_that_fits_is_an_error(corpus):
    config = corpus(sentences(5), max_len=3, batch_size=4)
    message = "memory train: none of its 5 items fits into data.max_len=3; raise it"
    with pytest.raises(DataError, match=message):
        TrainBatches(batches(config), seed=0)


# --- Prefetch ---


def test_prefetch_gives_all_items_in_order():
    assert list(Prefetch(range(100), depth=3)) == list(range(100))


def test_prefetch_is_at_most_depth_ahead():
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    source = Prefetch(items(), depth=2)
    for i in range(5):
        assert next(source) == i
        # One more may be in the thread's hand.
        assert len(made) <= i + 1 + 2 + 1
    source.close()
    assert not source._thread.is_alive()


def test_prefetch_passes_an_error_on_where_it_occurred():
    def items():
        yield 1
        raise DataError("example 2 is broken")

    source = Prefetch(items(), depth=4)
    assert next(source) == 1
    with pytest.raises(DataError, match="example 2 is broken"):
        next(source)
    source.close()


@pytest.mark.parametrize("fails", [False, True])
def test_prefetch_keeps_saying_that_it_is_over(fails):
    def items():
        yield 1
        if fails:
            raise DataError("broken")

    source, answers = Prefetch(items(), depth=1), []

    def read():
        for _ in range(3):
            try:
                answers.append(next(source))
            except (StopIteration, DataError) as error:
                answers.append(type(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=5)
    over = DataError if fails else StopIteration
    assert answers[:2] == [1, over]
    assert not reader.is_alive(), "the reader waits for ever for what cannot come"


# --- Configuration ---


def test_every_row_length_has_rows():
    config = Seq2SeqConfig(max_len=64, batch_size=1, buckets=(20, 36))
    assert config.lengths() == (20, 36, 64)
    assert [config.rows(n) for n in config.lengths()] == [3, 1, 1]


def test_counts_are_of_examples_not_batches(corpus):
    config = corpus(sentences(53), max_len=16, batch_size=4)
    train = TrainBatches(batches(config), seed=0)
    sizes = Counter(len(train.ids(step)[1]) for step in range(train.per_epoch))
    assert sizes == {4: 13, 1: 1}
