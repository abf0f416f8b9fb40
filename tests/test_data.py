"""Text: what every kind of data writes, in exact rows and in statistics."""

import dataclasses
import itertools
import math
import re
import tempfile
from collections import Counter

import numpy as np
import pytest

from triform.data import batch as descriptions
from triform.data import datasets
from triform.data.codecs import files
from triform.data.codecs import text as tokenizer
from triform.data.codecs.framing import around
from triform.data.codecs.text import EOS, PAD, ByteTokenizer, TokenizerConfig
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
from triform.data.datasets.masked_lm import sentences
from triform.data.datasets.span_corruption import parted
from triform.input_pipeline import Batches, Split, TrainBatches
from triform.runtime.errors import DataError

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


# --- MaskedLM ---


def test_sentences_by_rule():
    text = (
        'Mr. A went. "Why?" she said. "So." He left (at last.) Then J. Doe came!\n\nOk'
    )
    assert sentences(text) == [
        "Mr. A went.",
        '"Why?" she said.',
        '"So."',
        "He left (at last.)",
        "Then J. Doe came!",
        "Ok",
    ]


def unmasked(batch):
    """The inputs with what was predicted put back."""
    out = batch["inputs"].copy()
    r, p = np.nonzero(batch["weights"])
    out[r, batch["masked_positions"][r, p]] = batch["targets"][r, p]
    return out


def masked(sources, docs=None, tok=TOK, **fields):
    sources(m=docs or documents(12))
    fields = {"max_len": 64, "batch_size": 16, **fields}
    return TrainBatches(
        Batches(opened(MaskedLMConfig(source="m", **fields), tok=tok)), 0
    )


def test_a_masked_row_is_written_as_documented(sources):
    """Two sentences a document: A, then B from here or from there."""
    docs = [{"text": "aaaa.\nbbbb."}, {"text": "cccc.\ndddd."}]
    train = masked(sources, docs, max_len=13, short_rate=0.0)
    seen = set()
    for step in range(40):
        batch = train[step]
        for row in range(2):
            shown = unmasked(batch)[row].tolist()
            label = int(batch["label"][row])
            at = [i for i, x in enumerate(shown) if x == SEP]
            assert shown[0] == CLS and shown.count(CLS) == 1 and len(at) == 2
            assert batch["token_type_ids"][row].tolist() == [
                int(at[0] < i <= at[1]) for i in range(13)
            ]
            assert batch["segments"][row].tolist() == [
                int(i <= at[1]) for i in range(13)
            ]
            first, second = (
                TOK.decode(shown[a + 1 : b]) for a, b in ((0, at[0]), (at[0], at[1]))
            )
            pair = (first[:1], second[:1])
            assert label == int(pair not in {("a", "b"), ("c", "d")})
            seen.add((pair, label))
    others = {("a", "c"), ("a", "d"), ("c", "a"), ("c", "b")}
    assert seen == {(("a", "b"), 0), (("c", "d"), 0), *((p, 1) for p in others)}


def test_masking_statistics(sources):
    train = masked(sources, documents(12, words=120))
    positions = chosen = 0
    kinds = Counter()
    for step in range(3 * train.per_epoch):
        batch = train[step]
        r, p = np.nonzero(batch["weights"])
        at = batch["masked_positions"][r, p]
        assert not np.isin(batch["targets"][r, p], (CLS, SEP, MASK, PAD, EOS)).any()
        shown = batch["inputs"][r, at]
        masked_out, kept = shown == MASK, shown == batch["targets"][r, p]
        kinds += Counter({"mask": masked_out.sum(), "kept": kept.sum()})
        kinds["other"] += (~masked_out & ~kept).sum()
        real = (batch["segments"] > 0).sum(1)
        positions += (real - 3)[real > 0].sum()
        chosen += len(r)
        for row, count in enumerate((batch["weights"] > 0).sum(1).tolist()):
            if count:
                assert count == max(1, round(0.15 * (real[row] - 3)))
                own = batch["masked_positions"][row, :count]
                assert (np.diff(own) > 0).all()
    assert chosen / positions == pytest.approx(0.15, abs=0.01)
    for name, share in (("mask", 0.8), ("kept", 0.1), ("other", 0.1)):
        bound = 4 * math.sqrt(chosen * share * (1 - share))
        slack = chosen / 256  # a random id may be the old one
        assert abs(kinds[name] - chosen * share) <= bound + slack, name


def test_half_of_the_rows_go_on_and_never_from_the_same_document(sources):
    train = masked(sources, documents(12, words=120), short_rate=0.0)
    labels = []
    for step in range(4 * train.per_epoch):
        batch = train[step]
        for row in np.flatnonzero(batch["label_weights"]).tolist():
            text = TOK.show(unmasked(batch)[row])
            a, b = text.split("[CLS]")[1].split("[SEP]")[:2]
            first, second = (set(re.findall(r"D(\d+) w", x)) for x in (a, b))
            if first and second:
                assert len(first) == len(second) == 1
                assert (first != second) == batch["label"][row]
            labels.append(int(batch["label"][row]))
    n = len(labels)
    assert n > 300
    assert abs(sum(labels) - n / 2) <= 4 * math.sqrt(n) / 2 + 0.02 * n


def test_rows_do_not_give_the_label_away_by_their_length(sources):
    train = masked(sources, documents(12, words=120))
    lengths = [], []
    for step in range(6 * train.per_epoch):
        batch = train[step]
        real = (batch["segments"] > 0).sum(1)
        for row in np.flatnonzero(batch["label_weights"]).tolist():
            lengths[batch["label"][row]].append(real[row])
    means = [np.mean(x) for x in lengths]
    assert abs(means[0] - means[1]) < 3


def test_masking_changes_from_epoch_to_epoch_and_runs_do_not(sources):
    train = masked(sources, next_sentence=False)
    dataset = train.batches.dataset
    assert "label" not in dataset.spec
    first, second = (
        rows(dataset, Epoch(seed=0, number=e, train=True)) for e in range(2)
    )
    np.testing.assert_array_equal(unmasked(first), unmasked(second))
    changed = (first["inputs"] != second["inputs"]).any(1)
    assert changed.mean() > 0.9
    # Every token of the split is in one of the runs, unless a run was shortened.
    total = (first["segments"] > 0).sum() - 2 * len(dataset)
    assert total >= 0.85 * len(dataset.tokens.ids)


def test_whole_words_are_masked_whole(sources):
    train = masked(sources, documents(12, words=60), whole_word=True)
    for step in range(train.per_epoch):
        batch = train[step]
        for row in np.flatnonzero(batch["label_weights"]).tolist():
            whole = unmasked(batch)[row]
            count = int(batch["weights"][row].sum())
            real = int((batch["segments"][row] > 0).sum()) - 3
            assert 1 <= count <= max(1, round(0.15 * real))
            chosen = set(batch["masked_positions"][row, :count].tolist())
            if count < 2:
                continue
            for p in chosen:
                for q in (p - 1, p + 1):
                    later = max(p, q)
                    text = not {whole[p], whole[q]} & {CLS, SEP}
                    if text and TOK.continues[whole[later]]:
                        assert q in chosen


def test_where_all_words_are_long_a_part_of_one_is_masked(sources):
    docs = [{"text": f"{c * 9} {c * 9}"} for c in "abcdef"]
    train = masked(sources, docs, max_len=22, whole_word=True, next_sentence=False)
    batch = train[0]
    assert batch["weights"][:6].sum(1).tolist() == [3.0] * 6
    assert len(set(batch["masked_positions"][:6, 0].tolist())) == 2


def test_masking_needs_its_tokens_and_two_documents(sources):
    with pytest.raises(DataError, match="no token for cls, sep, mask; name ids"):
        masked(sources, tok=ByteTokenizer())
    with pytest.raises(DataError, match="single document, and sentences of another"):
        masked(sources, documents(1))
    assert masked(sources, documents(1), next_sentence=False).per_epoch


# --- SpanCorruption ---


@pytest.mark.parametrize(
    ("length", "chunk", "target"),
    [(512, 568, 114), (114, 126, 26), (256, 284, 58)],  # 512: Raffel et al.'s
)
def test_chunks_fill_the_rows(length, chunk, target):
    config = SpanCorruptionConfig(max_len=length)
    assert (config.chunk(), config.target_length()) == (chunk, target)
    noise, spans = config.noise(chunk)
    assert chunk - noise + spans + 1 == length


@pytest.mark.parametrize("fields", [{}, {"noise_rate": 0.5, "span_length": 2.0}])
def test_spans_put_back_give_the_text(sources, fields):
    sources(m=documents(5, words=30))
    dataset = opened(SpanCorruptionConfig(source="m", max_len=32, **fields))
    batch = rows(dataset, FIRST)
    sentinels = dataset.sentinels.tolist()
    text = []
    for row in range(len(dataset)):
        real = batch["encoder_segments"][row] > 0
        source = batch["encoder_inputs"][row][real].tolist()
        target = batch["targets"][row][batch["weights"][row] > 0].tolist()
        assert source.pop() == target.pop() == EOS
        used = [x for x in source if x in sentinels]
        assert used == sentinels[: len(used)] == [x for x in target if x in sentinels]
        parts = {}
        for x in target:
            if x in sentinels:
                parts[x] = spans = []
            else:
                spans.append(x)
        assert all(parts.values())
        assert source[0] not in sentinels  # text first
        for x in source:
            text += parts.get(x, [x])
    assert text == dataset.ids[: len(text)].tolist()
    assert len(dataset.ids) - len(text) <= 1
    full = batch["encoder_segments"][:-1]
    assert full.all()
    assert batch["weights"][:-1].all()
    later = batch["weights"][:, 1:] > 0
    np.testing.assert_array_equal(
        batch["inputs"][:, 1:][later], batch["targets"][:, :-1][later]
    )


def test_spans_change_from_epoch_to_epoch(sources):
    sources(m=documents(5, words=30))
    dataset = opened(SpanCorruptionConfig(source="m", max_len=32))
    first, second = (rows(dataset, Epoch(0, e, True))["targets"] for e in range(2))
    assert (first != second).any(1).mean() > 0.8


def test_spans_are_equally_likely_parts():
    parts = Counter(tuple(parted(5, 3, FIRST.rng(i)).tolist()) for i in range(1200))
    assert set(parts) == {
        p for p in itertools.product((1, 2, 3), repeat=3) if sum(p) == 5
    }
    assert all(abs(n - 200) < 4 * math.sqrt(200) for n in parts.values())


def test_too_few_sentinels_are_named(sources):
    sources(m=documents(2))
    with pytest.raises(DataError, match="its rows have 28 spans, but .* 20 sentinels"):
        opened(SpanCorruptionConfig(source="m", max_len=512))


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
        for row, ids in zip(
            marked["global_attention_mask"], marked["inputs"], strict=True
        ):
            np.testing.assert_array_equal(row, expected[tokens](ids), name)
    # Without [CLS], the first token and the text before the first end.
    config = KINDS["labelled, question"]
    row = rows(opened(config, tok=ByteTokenizer()))
    assert (
        row["global_attention_mask"][3].sum()
        == row["inputs"][3].tolist().index(EOS)
        == 5
    )


def test_classes_come_from_the_source_or_the_training_split(sources):
    train = [{"text": "x", "label": y} for y in ("b", "a", "b")]
    other = [{"text": "x", "label": "b"}]
    numbers = [{"text": "x", "label": y} for y in (1, 3)]
    sources(m={"train": train, "test": other}, n=numbers)
    test = opened(SequenceClassificationConfig(source="m"), "test")
    assert test.codecs["label"].names == ("a", "b")
    assert rows(test)["label"].tolist() == [1]
    numbered = opened(SequenceClassificationConfig(source="n"))
    assert numbered.codecs["label"].names == ("0", "1", "2", "3")
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
    batch = rows(datasets.dataset(config, "train", codecs, sizes))
    assert batch["label"].dtype == np.float32
    assert batch["label"].tolist() == [2.5, 1.0]
    with pytest.raises(DataError, match=r'example 0: .* 2.5.*data.target="number"'):
        opened(SequenceClassificationConfig(source="m"))
    sources(m=[{"text": "x", "label": "2.5"}])  # as CSV has them
    assert rows(opened(config))["label"].tolist() == [2.5]


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
    sources(m={"train": [good], "test": [{"text": "x", "label": "good"}]})
    with pytest.raises(DataError, match='m test: .*holds texts.*data.target="class"'):
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
    equal(rows(opened(dataclasses.replace(config, mask="mask"))), expected)
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


# --- Texts that are not from a split ---


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
