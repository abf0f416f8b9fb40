"""From examples to batches: what is visited, in which order, and what is refused."""

import dataclasses
import itertools
import threading
from collections import Counter

import numpy as np
import pytest

from triform.data import datasets
from triform.data.batch import Field, abstract, check, count, resolved, zeros
from triform.data.codecs.text import EOS, PAD, ByteTokenizer
from triform.data.datasets import Epoch, Seq2SeqConfig
from triform.input_pipeline import Batches, Prefetch, Split, TrainBatches, report
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
    sizes = {"vocab_size": vocab}
    return Batches(datasets.dataset(config, split, {"text": BYTES}, sizes))


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
        # As many positions in all as batch_size rows of max_len have.
        assert len(batch["inputs"]) == 4 * 16 // length
        for i in numbers(batch):
            longest = max(len(x) for x in examples[i].values()) + 1
            assert length == min(n for n in (6, 10, 16) if n >= longest)
    lengths = [config.shapes()[i] for i in train.shapes()]
    assert lengths == [{"S": n, "L": n} for n in (6, 10, 16)]


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
    assert "1 of 21 are longer than S=12, L=12, left out of training:" in report(train)


def test_the_reported_fill_is_the_share_of_positions_that_items_need(corpus):
    config = corpus(sentences(50), max_len=16, batch_size=4, buckets=(8,))
    train = TrainBatches(batches(config), seed=0)
    epoch = [train[step] for step in range(train.per_epoch)]
    needed = sum(
        np.sum(b["encoder_segments"]) + np.sum(b["weights"] > 0) for b in epoch
    )
    total = sum(b["encoder_inputs"].size + b["inputs"].size for b in epoch)
    assert train.fill() == pytest.approx(needed / total)
    assert f"{train.fill():.1%} of their positions are in use" in report(train)
    counted = sum(train.batches.real(batch) for batch in epoch)
    assert counted == needed


def test_source_and_target_lengths_may_differ(corpus):
    examples = [
        {"en": f"{i:03}" + "x" * (i % 20), "de": f"{i:03}" + "y" * (i % 7)}
        for i in range(50)
    ]
    fields = {"max_len": 12, "buckets": (6,), "max_source_len": 24, "batch_size": 4}
    config = corpus(examples, **fields)
    shapes = ({"S": 12, "L": 6}, {"S": 24, "L": 12})
    assert config.shapes() == shapes
    train = TrainBatches(batches(config), seed=0)
    seen = []
    for step in range(train.per_epoch):
        batch, (index, _) = train[step], train.ids(step)
        shape, rows = shapes[index], config.rows(shapes[index])
        assert batch["encoder_inputs"].shape == (rows, shape["S"])
        for name in ("inputs", "targets", "weights"):
            assert batch[name].shape == (rows, shape["L"])
        seen += (found := numbers(batch))
        for i in found:
            source, target = (len(examples[i][k]) + 1 for k in ("en", "de"))
            assert index == (source > 12 or target > 6)
    assert sorted(seen) == list(range(50))
    # Evaluation shortens each side by itself.
    config = corpus([{"en": "a" * 30, "de": "b" * 5}], **fields)
    ((_, batch),) = batches(config).evaluation()
    assert (batch["encoder_segments"].sum(), batch["weights"].sum()) == (24, 6)
    assert batch["encoder_inputs"][0, -1] == EOS


def test_rows_of_a_batch_do_not_depend_on_which_of_them_are_made(corpus):
    config = corpus(sentences(30), max_len=16, batch_size=8)
    store, train = batches(config), TrainBatches(batches(config), seed=1)
    for step in range(train.per_epoch):
        index, items = train.ids(step)
        epoch = Epoch(seed=1, number=0, train=True)
        parts = [
            store.collate(index, items, epoch, slice(start, start + 2))
            for start in range(0, 8, 2)
        ]
        joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        equal(joined, train[step])


# --- What a batch says of itself ---

SPEC = {
    "inputs": Field("BL", below="vocab_size", counts="segments"),
    "segments": Field("BL"),
    "side": Field("BS", below=3, counts="weights"),
    "label": Field("BV", "float32"),
    "weights": Field("B", "float32"),
}
SHAPE = {"B": 2, "L": 3, "S": 4, "V": 5}


def test_a_spec_and_a_shape_give_the_arrays():
    sizes = {"num_labels": 5, "vocab_size": 9}
    assert resolved({"L": 3, "V": "num_labels"}, sizes) == {"L": 3, "V": 5}
    batch = zeros(SPEC, SHAPE)
    assert {k: (x.shape, str(x.dtype)) for k, x in batch.items()} == {
        "inputs": ((2, 3), "int32"),
        "segments": ((2, 3), "int32"),
        "side": ((2, 4), "int32"),
        "label": ((2, 5), "float32"),
        "weights": ((2,), "float32"),
    }
    assert not any(x.any() for x in batch.values())
    promised = abstract(SPEC, SHAPE)
    assert promised.keys() == batch.keys()
    for name, x in batch.items():
        assert (x.shape, x.dtype) == (promised[name].shape, promised[name].dtype)


def test_real_positions_are_the_nonzero_entries_of_what_counts():
    batch = zeros(SPEC, SHAPE)
    assert count(batch, SPEC) == 0
    batch["segments"][0] = (1, 2, 0)
    batch["weights"][1] = 0.5
    batch["label"][:] = batch["inputs"][:] = 1
    assert count(batch, SPEC) == 3
    other = SPEC | {"targets": Field("BL", counts="segments")}  # counted once
    assert count(batch | {"targets": batch["inputs"]}, other) == 3


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("inputs", 9, ("inputs=9", "[0, 9)", "raise model.vocab_size or use the tok")),
        ("inputs", -1, ("inputs=-1", "[0, 9)", "correct or remove the example")),
        ("side", 3, ("side=3", "[0, 3)", "correct the data")),
        ("side", -2, ("side=-2", "[0, 3)", "correct or remove the example")),
        ("label", np.nan, ("label=nan", "not finite", "correct or remove the ex")),
        ("weights", np.inf, ("weights=inf", "not finite", "correct or remove the ex")),
    ],
)
def test_what_a_batch_may_not_hold_names_example_value_and_fix(key, value, parts):
    batch = zeros(SPEC, SHAPE)
    batch["inputs"][:], batch["side"][:], batch["segments"][:] = 8, 2, -7
    check(batch, SPEC, {"vocab_size": 9}, str)
    batch[key].reshape(2, -1)[1, -1] = value
    with pytest.raises(DataError) as caught:
        check(batch, SPEC, {"vocab_size": 9}, lambda row: f"m train, example {row + 6}")
    for part in ("m train, example 7: ", *parts):
        assert part in str(caught.value)


# --- Law 10: what is refused ---


def test_an_id_outside_the_vocabulary_names_its_example(corpus):
    examples = [*sentences(9), {"en": "009", "de": "zz"}]
    config = corpus(examples, max_len=16, batch_size=4)
    train = TrainBatches(batches(config, vocab=BYTES.encode_batch(["z"])[0][0]), seed=0)
    with pytest.raises(DataError) as caught:
        for step in range(train.per_epoch):
            train[step]
    message = (
        "memory train, example 9: inputs=125 is outside [0, 125); raise model.vocab_"
    )
    assert message in str(caught.value)
    assert "or use the tokenizer of this model" in str(caught.value)


@pytest.mark.parametrize("side", ["en", "de"])
def test_an_empty_side_names_its_example(corpus, side):
    examples = sentences(7)
    examples[4][side] = ""
    config = corpus(examples, max_len=16, batch_size=4)
    with pytest.raises(DataError, match="memory train, example 4: a text is empty"):
        Split.open(config, {"text": BYTES}, "train", {"vocab_size": 259})
    train = TrainBatches(batches(dataclasses.replace(config, drop_empty=True)), seed=0)
    seen = [n for step in range(train.per_epoch) for n in numbers(train[step])]
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]


def test_nothing_that_fits_is_an_error(corpus):
    config = corpus(sentences(5), max_len=3, batch_size=4)
    message = "memory train: none of its 5 items fits .* S=3, L=3; raise data.max_len"
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
    assert [shape["L"] for shape in config.shapes()] == [20, 36, 64]
    assert [config.rows(shape) for shape in config.shapes()] == [3, 1, 1]


def test_counts_are_of_examples_not_batches(corpus):
    config = corpus(sentences(53), max_len=16, batch_size=4)
    train = TrainBatches(batches(config), seed=0)
    sizes = Counter(len(train.ids(step)[1]) for step in range(train.per_epoch))
    assert sizes == {4: 13, 1: 1}
