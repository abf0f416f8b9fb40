"""Texts with gaps: MaskedLM and SpanCorruption, in exact rows and in statistics."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from data_rows import CLS, FIRST, MASK, SEP, TOK, documents, opened, rows

from triform.data.codecs.text import EOS, PAD, ByteTokenizer
from triform.data.datasets import (
    Epoch,
    MaskedLMConfig,
    SpanCorruptionConfig,
)
from triform.data.datasets.masked_lm import sentences
from triform.data.datasets.span_corruption import parted
from triform.input_pipeline import Batches, TrainBatches
from triform.runtime.errors import DataError

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
