"""What a trained model is asked: as a split would hold it, cut, repaired, refused."""

import os
import tempfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from triform.answers import inputs
from triform.data import datasets
from triform.data.codecs import files
from triform.data.codecs.classes import Classes
from triform.data.codecs.text import ByteTokenizer
from triform.data.datasets import (
    EVALUATION,
    CaptionedImagesConfig,
    CausalLMConfig,
    Corpus,
    ImagesConfig,
    InteractionsConfig,
    MaskedLMConfig,
    MixtureConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    SpanCorruptionConfig,
    TokenClassificationConfig,
)
from triform.data.datasets.requests import Item
from triform.data.lines import for_terminal, one_line
from triform.input_pipeline import Batches
from triform.runtime.errors import DataError, UserError

TOK = ByteTokenizer(
    specials=("[CLS]", "[SEP]", "[MASK]", *SpanCorruptionConfig.SPECIALS[:4])
)
SIZES = {"vocab_size": TOK.vocab_size, "num_types": 2, "num_labels": 3, "num_tags": 3}
TEXTS = ["ab", "c", "defghi"]
PIXELS = np.ones((2, 2), np.uint8)


def kind(config, **codecs):
    return datasets.requests(config, {"text": TOK, **codecs}, SIZES)


def split_rows(config):
    """(all items of the training split in one batch as in evaluation, codecs)."""
    with tempfile.TemporaryDirectory() as folder:
        TOK.save(folder)
        codecs = files.build(config, SIZES, earlier=folder)
    dataset = datasets.dataset(config, "train", codecs, SIZES)
    config.batch_size = len(dataset)
    batches = Batches(dataset)
    items = np.arange(len(dataset))
    return batches.collate(len(config.shapes()) - 1, items, EVALUATION), codecs


def cases():
    one, two = {"source": "m", "max_len": 9}, {"source": "m", "max_len": 19}
    return {
        "source": (Seq2SeqConfig(inputs="x", targets="y", **one), "encoder_inputs"),
        "text": (SequenceClassificationConfig(first="x", **one), "inputs"),
        "texts": (
            SequenceClassificationConfig(
                first="x", second="y", global_tokens="question", **two
            ),
            "inputs",
        ),
        "words": (TokenClassificationConfig(tokens="w", tags="t", **two), "inputs"),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("form", ["text", "columns", "fields"])
def test_a_request_is_what_a_split_holds(sources, name, form):
    """Ids, types and marks as of an example with the same values; targets are zero."""
    examples = [
        {"x": x, "y": x + "z", "label": i, "w": [x, "q"], "t": [i, 0]}
        for i, x in enumerate(TEXTS)
    ]
    sources(m=examples)
    config, read = cases()[name]
    expected, codecs = split_rows(config)
    requests = {
        "text": [
            {"texts": f"{e['x']}\t{e['y']}", "words": f"{e['x']} q"}.get(name, e["x"])
            for e in examples
        ],
        "columns": examples,
        "fields": [
            {"source": {"inputs": e["x"]}, "words": {"tokens": e["w"]}}.get(
                name, {"first": e["x"], "second": e["y"]}
            )
            for e in examples
        ],
    }[form]
    asked = datasets.requests(config, codecs, SIZES)
    items = [asked.read(request) for request in requests]
    batch, left_out = asked.batch(items, 4)
    assert left_out == [0] * 3
    assert {len(x) for x in batch.values()} == {4}
    length = batch[read].shape[1]
    assert not expected[read][:, length:].any()
    names = {read, read.replace("inputs", "segments")}
    for field in names | (batch.keys() & {"token_type_ids", "global_attention_mask"}):
        np.testing.assert_array_equal(batch[field][:3], expected[field][:, :length])
    for field in batch.keys() & {"targets", "label", "label_weights"}:
        assert not batch[field].any()
    if name == "words":  # where tags are looked for
        np.testing.assert_array_equal(
            batch["weights"][:3], expected["weights"][:, :length]
        )


@pytest.mark.parametrize(
    "config",
    [
        Seq2SeqConfig(max_len=9, buckets=(6,)),
        MixtureConfig(corpora=(Corpus("m", "x", "y", "to: "),), max_len=9),
        SpanCorruptionConfig(max_len=9),
        SequenceClassificationConfig(max_len=9),
        TokenClassificationConfig(max_len=9),
        MaskedLMConfig(max_len=9, next_sentence=False),
        CausalLMConfig(max_len=9),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 10, 40])
def test_nothing_vanishes_without_being_counted(config, size):
    """What is in the row and what is left out make up the request."""
    asked = kind(config)
    item = asked.read("x" * size)
    batch, (left_out,) = asked.batch([item], 1)
    inputs = batch["encoder_inputs" if asked.axis == "S" else "inputs"][0]
    kept = int((inputs == TOK.first + ord("x")).sum())
    assert kept + left_out == size
    assert kept == min(size, 9 - asked.framing.added(1))


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (Seq2SeqConfig(max_len=9), "x"),
        (CausalLMConfig(max_len=9), "x"),
        (TokenClassificationConfig(max_len=9), "x"),
        (ImagesConfig(size=2), PIXELS),
        (CaptionedImagesConfig(size=2), {"text": "x", "image": PIXELS}),
        (InteractionsConfig(), ["b"]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_cannot_be_read_is_a_row_of_padding_beside_others(config, value):
    asked = kind(config, items=Classes(["a", "b"]))
    item, none = asked.read(value), Item([], "")
    batch, left_out = asked.batch([none, item, none], 4)
    alone, _ = asked.batch([asked.read(value)], 1)
    assert left_out == [0, 0, 0]
    for name, x in batch.items():
        np.testing.assert_array_equal(x[1], alone[name][0])
        assert not x[[0, 2, 3]].any()


def test_a_request_takes_the_shortest_row_that_holds_all():
    config = Seq2SeqConfig(max_len=12, buckets=(4, 8), max_source_len=6)
    for lines, source, target in (
        (["a"], 2, 4),
        (["a", "abc"], 4, 8),
        (["abcde"], 6, 12),
        (["abcdefgh"], 6, 12),
    ):
        asked = kind(config)
        batch, _ = asked.batch([*map(asked.read, lines)], 3)
        assert batch["encoder_inputs"].shape == (3, source)
        assert batch["inputs"].shape == (3, target)
        assert (batch["inputs"][:, 0] == TOK.start).all()


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (Seq2SeqConfig(max_len=6, buckets=(4,)), "data.max_len=6"),
        (Seq2SeqConfig(max_len=60, max_source_len=6), "data.max_source_len=6"),
        (SequenceClassificationConfig(max_len=6), "data.max_len=6"),
    ],
)
def test_a_batch_refuses_what_it_would_cut(config, limit):
    lines = ["a", "x" * 7, "b"]
    with pytest.raises(DataError) as caught:
        datasets.request_batch(config, lines, 4, {"text": TOK}, SIZES)
    for part in ("request 2 ('xxxxxxx')", "tokens", limit, "shorten or split it"):
        assert part in str(caught.value)
    batch = datasets.request_batch(config, ["a"], 4, {"text": TOK}, SIZES)
    assert batch.keys() == config.spec().keys()


def test_a_second_text_may_hold_tabs_and_may_not_be_missing():
    asked = kind(SequenceClassificationConfig(first="x", second="y", max_len=16))
    assert [x.tolist() for x in asked.read("a\tb\tc").parts] == [
        [TOK.first + ord("a")],
        [TOK.first + ord(c) for c in "b\tc"],
    ]
    for request, part in (("no tab", "tab between"), ({"x": "a"}, "'y' or 'second'")):
        with pytest.raises(DataError, match=part):
            asked.read(request)


@pytest.mark.parametrize(
    ("request_", "part"),
    [({"z": "a"}, "it has no 'x' or 'first' but 'z'"), ({"x": 3}, "3 is no text")]
    + [(7, "int 7 is no request"), ({}, "nothing")],
)
def test_what_cannot_be_read_says_why(request_, part):
    with pytest.raises(DataError, match=part):
        kind(SequenceClassificationConfig(first="x")).read(request_)


def test_what_is_no_text_is_replaced_and_told():
    for config in (Seq2SeqConfig(), CausalLMConfig(), SequenceClassificationConfig()):
        item = kind(config).read("a\udc9f\ud800b")
        assert item.notes
        assert item.shown.encode() == "a\ufffd\ufffdb".encode()
        assert not kind(config).read("a\u200c\U0001f468\u200d\0b").notes


def test_a_mask_is_one_however_it_is_called():
    asked = kind(MaskedLMConfig(max_len=12, next_sentence=False))
    item = asked.read("a[MASK]b[MASK]")
    none = asked.read("abc")
    batch, _ = asked.batch([item, none], 2)
    a, b, c = (TOK.first + ord(x) for x in "abc")
    row = [TOK.cls, a, TOK.mask, b, TOK.mask, TOK.sep]
    assert batch["inputs"][0, :6].tolist() == row
    assert batch["masked_positions"].tolist() == [[2, 4], [0, 0]]
    rows = {
        "candidates": np.array([[b, c], [c, b]]),
        "shares": np.array([[0.5, 0.25], [0.75, 0.125]], np.float32),
    }
    answer = asked.answer(item, rows)
    assert answer["filled"] == [{"b": 0.5, "c": 0.25}, {"c": 0.75, "b": 0.125}]
    assert answer["text"] == "abbc"
    assert answer["score"] == pytest.approx(np.log(0.375))
    assert asked.answer(none, rows) == {"text": "abc", "score": 0, "filled": []}
    assert "no [MASK]" in none.notes[0]


def test_sentinels_of_a_request_are_sentinels():
    asked = kind(SpanCorruptionConfig(max_len=12))
    (ids,) = asked.read("a<extra_id_0>b<extra_id_1>").parts
    first, second = TOK.sentinels()[:2]
    assert ids.tolist() == [TOK.first + 97, first, TOK.first + 98, second]
    shown = asked.decode(np.array([first, TOK.first + 99, TOK.eos, first, 0]))
    assert shown.split() == ["<extra_id_0>", "c"]


def test_words_keep_their_tags_and_lose_none():
    asked = kind(TokenClassificationConfig(max_len=6), tags=Classes(["A", "B", "C"]))
    item = asked.read(["ab", "", "c", "defg", "h"])
    batch, left_out = asked.batch([item], 1)
    assert left_out == [4]  # of "defg" one token is read, of "h" none
    targets = np.zeros(6, np.int32)
    targets[1], targets[3], targets[4] = 1, 2, 1
    assert asked.answer(item, {"targets": targets})["tags"] == [
        ("ab", "B"),
        ("", None),
        ("c", "C"),
        ("defg", "B"),
        ("h", None),
    ]
    by_character = TokenClassificationConfig(max_len=9)
    by_character.tokenizer.kind = "chars"
    assert kind(by_character).read("MKV").shown == ["M", "K", "V"]
    assert kind(TokenClassificationConfig()).read("Ann ran").shown == ["Ann", "ran"]


def test_an_image_is_the_same_from_any_hand(tmp_path, sources):
    """A file, Pillow's image, an array, a column: as the split has it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    sources(m=[{"image": image, "label": 1}])
    config = ImagesConfig(source="m", size=8, crop="resized", mean=(0.4,), std=(0.3,))
    expected, _ = split_rows(config)
    asked = datasets.requests(config, {"label": Classes("abc")}, SIZES)
    Image.fromarray(image).save(tmp_path / "a.png")
    forms = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(image)]
    forms += [image, {"image": image}, {"image": str(tmp_path / "a.png")}]
    batch, left_out = asked.batch([*map(asked.read, forms)], len(forms))
    assert left_out == [0] * len(forms)
    for row in batch["image"]:
        np.testing.assert_array_equal(row, expected["image"][0])
    (tmp_path / "b.png").write_bytes(b"no image")
    for bad in (tmp_path / "b.png", tmp_path / "none.png", np.zeros((2, 2))):
        with pytest.raises(DataError, match="image"):
            asked.read(bad)


# --- Lines ---


def test_a_pipe_is_a_file_with_a_request_a_line():
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    found = [x.value for x in inputs.of_file(f"/dev/fd/{reading}")]
    os.close(reading)
    assert found == ["one", "two"]
    with pytest.raises(UserError, match="no such file"):
        inputs.of_file("/dev/fd/none")


def test_only_what_breaks_a_line_is_replaced():
    """Unicode's own word for it: control characters, line and paragraph separators."""
    for code in range(0x110000):
        c = chr(code)
        breaks = unicodedata.category(c) in ("Cc", "Zl", "Zp")
        assert one_line(c) == (" " if breaks else c)
        kept = breaks and c not in "\n\t"
        assert for_terminal(c) == (" " if kept else c)
