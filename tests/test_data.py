"""Text: what every kind of data writes, in exact rows and in statistics."""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
import pytest
from data_rows import (
    SEP,
    SIZES,
    TOK,
    documents,
    equal,
    ids,
    opened,
    rows,
)

from triform.data import batch as descriptions
from triform.data.codecs import text as tokenizer
from triform.data.codecs.framing import around
from triform.data.codecs.text import EOS, ByteTokenizer, TokenizerConfig
from triform.data.datasets import (
    EVALUATION,
    CausalLMConfig,
    Corpus,
    Epoch,
    MaskedLMConfig,
    MixtureConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    SpanCorruptionConfig,
    TokenClassificationConfig,
)
from triform.input_pipeline import Batches, TrainBatches

# --- What holds for all kinds ---


KINDS = {
    "pairs": Seq2SeqConfig(
        source="a", inputs="x", targets="y", max_len=16, batch_size=4
    ),
    "mixture": MixtureConfig(
        corpora=(Corpus("a", "x", "y"), Corpus("b", "x", "y", "to: ")),
        max_len=16,
        batch_size=4,
    ),
    "joined": CausalLMConfig(source="docs", max_len=16, batch_size=4, eval_stride=5),
    "separate": CausalLMConfig(
        source="docs", max_len=16, batch_size=4, documents="separate"
    ),
    "masked": MaskedLMConfig(source="docs", max_len=32, batch_size=4),
    "masked words": MaskedLMConfig(
        source="docs",
        max_len=32,
        batch_size=4,
        whole_word=True,
        next_sentence=False,
        buckets=(8, 16),
    ),
    "spans": SpanCorruptionConfig(source="docs", max_len=32, batch_size=4),
    "labelled": SequenceClassificationConfig(
        source="a", first="x", second="y", max_len=24, batch_size=4
    ),
    "tagged": TokenClassificationConfig(
        source="a", tokens="x", tags="x", max_len=16, batch_size=4
    ),
}
KINDS |= {
    f"{name}, {tokens}": dataclasses.replace(KINDS[name], global_tokens=tokens)
    for name, tokens in (
        *(("masked", "first"), ("masked words", "first"), ("tagged", "first")),
        *(("labelled", "first"), ("labelled", "question")),
    )
}


@pytest.fixture
def corpora(sources):
    def some(count, shift):
        return [
            {"x": f"{i:02}" + "x" * (i % 4), "y": f"{i + shift:02}", "label": i % 3}
            for i in range(count)
        ]

    return sources(a=some(21, 0), b=some(10, 50), docs=documents(4))


def kind(name):
    return opened(dataclasses.replace(KINDS[name]))


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_a_function_of_seed_and_step(corpora, name):
    first = TrainBatches(Batches(kind(name)), seed=5)
    steps = list(range(2 * first.per_epoch))
    expected = [first[step] for step in steps]
    for step in np.random.default_rng(0).permutation(steps):
        equal(first[int(step)], expected[step])
    again = TrainBatches(Batches(kind(name)), seed=5)
    equal(again[steps[-1]], expected[-1])
    other = TrainBatches(Batches(kind(name)), seed=6)
    assert any(
        (other[s]["inputs"].shape != expected[s]["inputs"].shape)
        or (other[s]["inputs"] != expected[s]["inputs"]).any()
        for s in steps
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_epoch_has_as_many_rows(corpora, name):
    train = TrainBatches(Batches(kind(name)), seed=0)
    counts = [sorted((i, len(x)) for i, x in train.plan(e)) for e in range(4)]
    assert counts[0] == counts[1] == counts[2] == counts[3]
    if name not in ("mixture", "joined"):
        for epoch in range(2):
            seen = [i for _, items in train.plan(epoch) for i in items.tolist()]
            assert sorted(seen) == list(range(len(seen)))


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_visits_every_item_once_and_is_fixed(corpora, name):
    batches = Batches(kind(name))
    seen = []
    for (items, batch), (_, again) in zip(
        batches.evaluation(), batches.evaluation(), strict=True
    ):
        equal(batch, again)
        seen += items.tolist()
        for key, x in batch.items():
            assert not x[len(items) :].any(), key
    assert sorted(seen) == list(range(len(batches.dataset)))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_is_what_is_promised(corpora, name):
    dataset = kind(name)
    batches, config = Batches(dataset), dataset.config
    for index, items in batches.buckets(truncate=True).items():
        shape = config.shapes()[index]
        batch = batches.collate(index, items[: config.rows(shape)], EVALUATION)
        shape = {"B": config.rows(shape), **descriptions.resolved(shape, SIZES)}
        promised = descriptions.zeros(config.spec(), shape)
        assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
            k: (x.shape, x.dtype) for k, x in promised.items()
        }
        real = batches.real(batch)
        assert real == descriptions.count(batch, config.spec())
        assert 0 < real <= sum(x.size for k, x in batch.items() if "inputs" in k)
    assert dataset.preview(batch).count("\n") >= 1
    assert dataset.describe(0).split(" train, ")[0] in dataset.title()


@pytest.mark.parametrize("name", KINDS)
def test_equal_items_have_equal_digests(corpora, name):
    assert kind(name).digest == kind(name).digest
    digests = {opened(config).digest for config in KINDS.values()}
    # joined and separate, the two ways of masking, and all marks read the same text
    assert len(digests) == len([name for name in KINDS if "," not in name]) - 2


def test_random_streams_of_items_and_of_the_epoch_differ():
    streams = [Epoch(1, 2, True).rng(*index) for index in ((), (0,), (1,), (0, 0))]
    assert len({rng.integers(1 << 62) for rng in streams}) == 4


# --- Seq2Seq and mixtures ---


def test_a_foreign_tokenizer_starts_and_ends_with_its_own_ids(sources, tmp_path):
    sources(m=[{"en": "ab", "de": "c"}])
    core = tokenizer.train(TokenizerConfig("chars"), ["abc"], 9)
    core.save(str(tmp_path))
    (tmp_path / "special_tokens.json").write_text('{"eos": 0, "start": 2, "pad": 1}')
    tok = tokenizer.load(str(tmp_path / "tokenizer.json"))
    batch = rows(opened(Seq2SeqConfig(source="m", max_len=4), tok=tok))
    assert batch["encoder_inputs"].tolist() == [[3, 4, 0, 0]]
    assert batch["inputs"].tolist() == [[2, 5, 0, 0]]
    assert batch["targets"].tolist() == [[5, 0, 0, 0]]


def mixture(sources, sizes, **fields):
    found = {}
    for name, size in sizes.items():
        found[name] = [{"x": f"{name}{i:03}", "y": "t"} for i in range(size)]
    sources(**found)
    corpora = tuple(Corpus(name, "x", "y") for name in sizes)
    config = MixtureConfig(corpora=corpora, max_len=8, batch_size=8, **fields)
    return TrainBatches(Batches(opened(config)), seed=0)


def visited(train, epoch):
    """Items of an epoch in the order of their visits."""
    return [i for _, x in train.plan(epoch) for i in x.tolist()]


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({}, (100, 25, 4)),
        ({"limit": 25}, (25, 25, 4)),
        ({"temperature": 2.0}, (10, 5, 2)),
        ({"weights": (1.0, 1.0, 2.0)}, (1, 1, 2)),
        ({"weights": (1.0, 4.0, 9.0), "temperature": 2.0}, (1, 2, 3)),
    ],
)
def test_corpora_have_their_shares_of_every_epoch(sources, fields, shares):
    train = mixture(sources, {"a": 100, "b": 25, "c": 4}, **fields)
    for epoch in range(3):
        items = np.concatenate([x for _, x in train.plan(epoch)])
        counts = np.bincount(np.searchsorted([100, 125], items, "right"), minlength=3)
        assert abs(len(items) - 129) <= 1
        expected = 129 * np.array(shares) / sum(shares)
        assert (np.abs(counts - expected) <= 0.5).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 7.0), (9.0, 1.0)])
def test_nothing_comes_again_before_all_of_its_corpus_came(sources, weights):
    train = mixture(sources, {"a": 31, "b": 7}, weights=weights)
    total = Counter()
    for epoch in range(12):
        total.update(visited(train, epoch))
        for items in (range(31), range(31, 38)):
            seen = [total[i] for i in items]
            assert max(seen) - min(seen) <= 1


def test_a_mixture_of_row_lengths_keeps_its_shares(sources):
    sources(
        a=[{"x": "x" * (i % 12), "y": "t"} for i in range(1, 61)],
        b=[{"x": "x" * (i % 5 + 1), "y": "t"} for i in range(30)],
    )
    config = MixtureConfig(
        corpora=(Corpus("a", "x", "y"), Corpus("b", "x", "y")),
        weights=(1, 1),
        max_len=16,
        buckets=(4, 8),
        batch_size=4,
        drop_empty=True,
    )
    train = TrainBatches(Batches(opened(config)), seed=0)
    for epoch in range(3):
        items = np.array(visited(train, epoch))
        assert abs((items < 60).sum() - (items >= 60).sum()) <= 3
        assert abs(len(items) - 85) <= 2


def test_evaluation_sees_all_corpora_with_their_prefixes(sources):
    sources(
        a=[{"x": "ab", "y": "c"}, {"x": "d", "y": "e"}],
        b=[{"x": "f", "label": 1}],
        classes={"b:label": ("bad", "ok")},
    )
    corpora = (Corpus("a", "x", "y", "p:"), Corpus("b", "x", "label", "is it? "))
    dataset = opened(MixtureConfig(corpora=corpora, max_len=12))
    batch = rows(dataset)
    shown = [TOK.decode(x) for x in batch["encoder_inputs"]]
    assert shown == ["p:ab", "p:d", "is it? f"]
    assert [TOK.decode(x) for x in batch["targets"]] == ["c", "e", "ok"]
    assert dataset.text(2) == ("is it? f", "ok")
    assert dataset.describe(2) == "b train, example 0"
    assert [dataset.group(i) for i in range(3)] == [
        ("p", 0),
        ("p", 1),
        ("is_it?", 0),
    ]


def test_corpora_may_come_as_json_has_them():
    corpora = KINDS["mixture"].corpora
    dicts = tuple(dataclasses.asdict(corpus) for corpus in corpora)
    assert MixtureConfig(corpora=dicts).corpora == corpora


# --- CausalLM ---


def test_windows_are_written_as_documented(sources):
    sources(m=[{"text": "abc"}, {"text": ""}, {"text": "defgh"}])
    batch = rows(opened(CausalLMConfig(source="m", max_len=6)))
    equal(
        batch,
        {
            "inputs": np.array([ids("EabcEE"), ids("defgh_")]),
            "targets": np.array([ids("abcEEd"), ids("efghE_")]),
            "weights": np.array([[1] * 6, [1] * 5 + [0]]),
        },
    )
    batch = rows(opened(CausalLMConfig(source="m", max_len=6, documents="separate")))
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 2, 3], [1, 1, 1, 1, 1, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize("puts", [False, True])
def test_a_stream_starts_with_what_the_tokenizer_puts_before_a_text(sources, puts):
    """Not with a token that it merely has."""
    sources(m=[{"text": "ab"}, {"text": "c"}])
    tok = ByteTokenizer(specials=["<s>"])
    if puts:
        template = around([tok.bos], (), ())
        tok.specials = dataclasses.replace(tok.specials, template=template)
    a, b, c = (tok.first + ord(x) for x in "abc")
    batch = rows(opened(CausalLMConfig(source="m", max_len=8), tok=tok))
    first = tok.bos if puts else EOS
    assert batch["inputs"][0, :6].tolist() == [first, a, b, EOS, c, 0]
    assert batch["targets"][0, :6].tolist() == [a, b, EOS, c, EOS, 0]


@pytest.mark.parametrize("stride", [0, 1, 3, 7])
@pytest.mark.parametrize("length", [7, 20, 1000])
def test_every_target_counts_once_with_its_context(sources, length, stride):
    sources(m=documents(3, words=12))
    config = CausalLMConfig(source="m", max_len=length, eval_stride=stride)
    dataset = opened(config)
    stream = np.concatenate([[EOS], dataset.store.ids])
    counted = np.zeros(len(stream), int)
    for item, (row, weights) in enumerate(
        zip(*(rows(dataset)[k] for k in ("inputs", "weights")), strict=True)
    ):
        start = item * (stride or length)
        n = min(length, len(stream) - 1 - start)
        np.testing.assert_array_equal(row[:n], stream[start : start + n])
        positions = np.flatnonzero(weights)
        counted[start + 1 + positions] += 1
        if item:
            assert positions.min() == length - (stride or length)
    assert counted[0] == 0 and (counted[1:] == 1).all()


@pytest.mark.parametrize("length", [7, 20, 1000])
def test_an_epoch_of_windows_shows_all_but_a_part_of_one(sources, length):
    sources(m=documents(3, words=12))
    config = CausalLMConfig(source="m", max_len=length, batch_size=4)
    train = TrainBatches(Batches(opened(config)), seed=0)
    stream = train.batches.dataset.store.ids
    ring = {(int(a), int(b)) for a, b in zip(np.roll(stream, 1), stream, strict=True)}
    starts = set()
    for epoch in range(3):
        count = 0
        for step in range(epoch * train.per_epoch, (epoch + 1) * train.per_epoch):
            batch = train[step]
            real = batch["weights"] > 0
            pairs = zip(batch["inputs"][real], batch["targets"][real], strict=True)
            assert {(int(a), int(b)) for a, b in pairs} <= ring
            count += real.sum()
            starts.add(tuple(batch["inputs"][0].tolist()))
        assert len(stream) - length < count <= len(stream)
    assert len(starts) >= 3  # another beginning every epoch


def test_separate_documents_of_a_window_do_not_see_each_other(sources):
    sources(m=documents(30, words=1))
    config = CausalLMConfig(source="m", max_len=32, batch_size=8, documents="separate")
    batch = TrainBatches(Batches(opened(config)), seed=0)[0]
    for x, segments, positions in zip(
        *(batch[k] for k in ("inputs", "segments", "positions")), strict=True
    ):
        for s in range(1, segments.max() + 1):
            own = segments == s
            assert positions[own].tolist() == list(range(own.sum()))
            assert EOS not in x[own][1:]
        assert (np.diff(segments) >= 0).all()


def test_units_of_the_raw_text(sources):
    sources(m=[{"text": "two words\n"}, {"text": "über"}])
    scalars = opened(CausalLMConfig(source="m", max_len=16)).scalars(8.0)
    assert scalars["word_perplexity"] == pytest.approx(math.exp(8 / 4))
    assert scalars["bits_per_byte"] == pytest.approx(8 / math.log(2) / 15)


def test_global_tokens_are_marked_and_change_nothing_else(corpora):
    expected = {
        "first": lambda ids: [1] + [0] * (len(ids) - 1),
        "question": lambda ids: np.arange(len(ids)) < ids.tolist().index(SEP),
    }
    for name in [name for name in KINDS if ", " in name]:
        plain, tokens = name.split(", ")
        marked, bare = TrainBatches(Batches(kind(name)), 3)[0], {}
        bare |= {key: x for key, x in marked.items() if key != "global_attention_mask"}
        equal(bare, TrainBatches(Batches(kind(plain)), 3)[0])
        assert marked["global_attention_mask"].dtype == np.int32
        for row, given in zip(
            marked["global_attention_mask"], marked["inputs"], strict=True
        ):
            np.testing.assert_array_equal(row, expected[tokens](given), name)
    # Without [CLS], the first token and the text before the first end.
    config = KINDS["labelled, question"]
    row = rows(opened(config, tok=ByteTokenizer()))
    assert (
        row["global_attention_mask"][3].sum()
        == row["inputs"][3].tolist().index(EOS)
        == 5
    )


def test_items_are_found_in_their_source(sources):
    corpus = [{"x": "ab", "y": "c", "label": 0}, {"x": "d", "y": "ef", "label": 1}]
    sources(a=corpus, b=corpus[1:], docs=documents(4))
    for name, text in (("pairs", "d"), ("mixture", "d"), ("labelled", "d\tef")):
        dataset = kind(name)
        assert dataset.example(1) == corpus[1]
        assert dataset.input_text(1) == text
    assert kind("mixture").input_text(2) == "to: d"
    # A row of these is not an example.
    for name in ("joined", "masked", "spans"):
        dataset = kind(name)
        assert (dataset.example(0), dataset.input_text(0)) == ({}, "")


# --- Configurations ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Seq2SeqConfig(max_source_len=1), "data.max_source_len=1: must be 0"),
        (Seq2SeqConfig(max_source_len=-1), "data.max_source_len=-1: must be 0"),
        (
            SequenceClassificationConfig(target="x"),
            "data.target='x': expected one of class, number",
        ),
        (
            TokenClassificationConfig(target="x"),
            "data.target='x': expected one of class, number",
        ),
        (MixtureConfig(source="a"), "data.source='a': must be empty; a mixture's are"),
        (MixtureConfig(), "data.corpora=(): must name at least one corpus"),
        (CausalLMConfig(buckets=(8,)), "data.buckets=(8,): must be (): all rows"),
        (SpanCorruptionConfig(buckets=(8,)), "data.buckets=(8,): must be (): all rows"),
        (CausalLMConfig(documents="x"), "data.documents='x': expected one of joined"),
        (CausalLMConfig(eval_stride=65), "data.eval_stride=65: must lie between 1 and"),
        (MaskedLMConfig(max_len=4), "data.max_len=4: rows must have at least 5 pos"),
        (MaskedLMConfig(mask_rate=0.0), "data.mask_rate=0.0: must lie between 0 and 1"),
        (MaskedLMConfig(short_rate=1.5), "data.short_rate=1.5: must lie in [0, 1]"),
        (SpanCorruptionConfig(max_len=3), "data.max_len=3: must be at least 4"),
        (
            SpanCorruptionConfig(noise_rate=1.0),
            "data.noise_rate=1.0: must lie between 0 and 1",
        ),
        (
            SpanCorruptionConfig(span_length=0.5),
            "data.span_length=0.5: must be at least 1",
        ),
        *(
            (dataclasses.replace(KINDS["mixture"], **{name: value}), f"data.{name}=")
            for name, value in (
                ("weights", (1.0,)),
                ("weights", (1.0, 0.0)),
                ("limit", -1),
                ("temperature", 0.0),
            )
        ),
        (
            dataclasses.replace(KINDS["mixture"], limit=1, weights=(1.0, 1.0)),
            "data.limit=1: bounds sizes, which data.weights replace",
        ),
    ],
)
def test_impossible_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config.validate()
