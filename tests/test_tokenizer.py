"""Tokenizers: ids, round trips, files."""

import os
import re
import unicodedata

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings

from triform.data.codecs import text as tokenizer
from triform.data.codecs.text import EOS, PAD, SPECIALS, UNK, TokenizerConfig

# Those of texts; the alphabet of residues is fixed, see test_proteins.py.
KINDS = tuple(kind for kind in tokenizer.KINDS if kind != "residues")

WORDS = ("The", "the", "quick", "brown", "Fox", "jumps", "over", "12", "lazy", "dogs")
WORDS += ("naïve", "café", "über", "straße", "3.5")
LOSSLESS = ("bpe", "bytes")
SIZES = {"bpe": 320, "wordpiece": 120, "unigram": 80, "bytes": 259, "chars": 60}
EXTRA = ("[CLS]", "[SEP]", "[MASK]", "<extra_id_0>", "<extra_id_1>")
TRICKY = (
    "",
    " ",
    "  two  spaces ",
    "tab\tnew\nline\r\n",
    "naïve café straße İI",
    "\u65e5\u672c\u8a9e",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "a\u200bb\ufeffc\u2028d",
    "\U0010ffff\x00\x7f",
    "العربية עברית",
    "1234567890 ١٢٣",
)


def corpus():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 6)) + "." for _ in range(200)]


@pytest.fixture(scope="module")
def trained():
    return {kind: train(kind) for kind in KINDS}


def train(kind, lowercase=False):
    config = TokenizerConfig(kind, lowercase)
    config.validate()
    return tokenizer.train(config, iter(corpus()), SIZES[kind])


def encode(tok, text):
    return tok.encode_batch([text])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_lie_in_the_vocabulary_and_are_never_special(trained, kind):
    tok = trained[kind]
    assert len(SPECIALS) < tok.vocab_size <= SIZES[kind]
    for ids in tok.encode_batch(corpus()):
        assert ids.dtype == np.int32
        assert ids.min() >= len(SPECIALS)
        assert ids.max() < tok.vocab_size


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "chars"])
def test_special_ids_of_a_tokenizer_json(trained, kind):
    core = trained[kind].core
    assert [core.token_to_id(s) for s in SPECIALS] == [PAD, EOS, UNK] == [0, 1, 2]


def test_special_ids_of_sentencepiece(trained):
    core = trained["unigram"].core
    assert (core.pad_id(), core.eos_id(), core.unk_id()) == (0, 1, 2)
    assert [core.id_to_piece(i) for i in range(3)] == list(SPECIALS)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "chars"])
def test_what_was_never_seen_is_unknown(trained, kind):
    assert UNK in encode(trained[kind], "\u65e5\u672c")


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_the_corpus_comes_back(trained, kind):
    tok = trained[kind]
    for text in corpus()[:20]:
        assert tok.decode(encode(tok, text)).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.sampled_from(TRICKY) | st.text())
def test_bpe_and_bytes_lose_nothing(trained, kind, text):
    tok = trained[kind]
    # BPE composes characters first, as most text is written.
    expected = unicodedata.normalize("NFC", text) if kind == "bpe" else text
    assert tok.decode(encode(tok, text)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", SPECIALS)
def test_text_that_looks_like_a_special_token_is_text(trained, kind, special):
    """An EOS in the middle of a sentence would end it there."""
    tok = trained[kind]
    ids = encode(tok, f"the {special} dogs")
    assert not {PAD, EOS} & set(ids.tolist())
    assert tok.decode(ids).endswith("dogs")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "wordpiece"])
def test_digits_are_spelled(trained, kind):
    tok = trained[kind]
    separate = {i for d in "0123456789" for i in encode(tok, d).tolist()}
    ids = [i for i in encode(tok, "312").tolist() if i in separate]
    assert len([i for i in ids if tok.decode([i]).strip()]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_lowercase(kind):
    tok = train(kind, lowercase=True)
    upper, lower = tok.encode_batch(["The Quick FOX", "the quick fox"])
    np.testing.assert_array_equal(upper, lower)
    assert tok.decode(upper) == "the quick fox"
    assert tok.lowercase
    assert not train(kind).lowercase


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(trained, kind):
    assert train(kind).to_bytes() == trained[kind].to_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lowercase", [False, True])
def test_saved_is_loaded(tmp_path, kind, lowercase):
    tok = train(kind, lowercase)
    assert tokenizer.find(str(tmp_path)) is None
    path = tok.save(str(tmp_path))
    assert tokenizer.find(str(tmp_path)) == path
    # No temporary file is left.
    assert sorted(os.listdir(tmp_path)) == sorted([tokenizer.SIDECAR, tok.filename])
    again = tokenizer.load(path)
    assert again.digest() == tok.digest()
    assert again.specials == tok.specials
    assert again.vocab_size == tok.vocab_size
    texts = [*corpus()[:5], *TRICKY]
    for a, b in zip(tok.encode_batch(texts), again.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(a, b)
        assert tok.decode(a) == again.decode(b)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_stops_at_the_end_and_drops_padding(trained, kind):
    tok = trained[kind]
    first, second = tok.encode_batch(["quick", "dogs"])
    ids = [PAD, *first, PAD, EOS, *second, EOS, PAD]
    assert tok.decode(ids) == tok.decode(np.array(ids)) == tok.decode(first) == "quick"
    assert tok.decode([EOS]) == tok.decode([]) == tok.decode([PAD]) == ""


def test_bytes_cut_in_the_middle_of_a_character_decode(trained):
    tok = trained["bytes"]
    ids = encode(tok, "é")
    assert tok.decode(ids[:1]) == "\ufffd"
    assert tok.decode([*ids, UNK]) == "é"


def test_a_vocabulary_is_filled_from_a_rich_corpus():
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghij"))
    texts = [" ".join("".join(rng.choice(letters, 5)) for _ in range(5))] * 3
    texts += [
        " ".join("".join(rng.choice(letters, 5)) for _ in range(5)) for _ in range(300)
    ]
    for kind, size in (("bpe", 400), ("wordpiece", 150), ("unigram", 150)):
        assert tokenizer.train(TokenizerConfig(kind), texts, size).vocab_size == size


# --- Special ids ---


@pytest.mark.parametrize("kind", KINDS)
def test_further_specials_come_next_and_are_never_text(tmp_path, kind):
    tok = tokenizer.train(
        TokenizerConfig(kind), corpus(), SIZES[kind] + len(EXTRA), EXTRA
    )
    assert (tok.pad, tok.eos, tok.unk, tok.start) == (PAD, EOS, UNK, PAD)
    assert (tok.cls, tok.sep, tok.mask, tok.bos) == (3, 4, 5, None)
    assert tok.sentinels().tolist() == [6, 7]
    ids = encode(tok, "the [MASK] <extra_id_0> dogs")
    assert not set(ids.tolist()) & {*range(8)} - {UNK}
    first, second = tok.encode_batch(["quick", "dogs"])
    row = [tok.cls, *first, tok.mask, 6, *second, tok.sep, PAD]
    expected = tok.decode([*first, *second])
    assert tok.decode(row) == expected
    shown = tok.show([*row, EOS])
    assert shown.replace(" ", "") == ("[CLS]quick[MASK]<extra_id_0>dogs[SEP]<pad></s>")
    again = tokenizer.load(tok.save(str(tmp_path)))
    assert again.specials == tok.specials
    assert again.digest() == tok.digest()
    assert encode(again, "the quick").tolist() == encode(tok, "the quick").tolist()


def published(tmp_path, pieces, sidecar=None):
    """A word-level tokenizer.json with these pieces, as one from elsewhere."""
    vocabulary = {p: i for i, p in enumerate(pieces)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=pieces[0])
    core = tokenizers.Tokenizer(model)
    core.add_special_tokens([p for p in pieces if p[0] in "<["])
    path = str(tmp_path / "tokenizer.json")
    core.save(path)
    if sidecar:
        (tmp_path / tokenizer.SIDECAR).write_text(sidecar)
    return tokenizer.load(path)


@pytest.mark.parametrize(
    ("pieces", "sidecar", "expected"),
    [
        # GPT-2: the end also pads.
        (["a", "b", "<|endoftext|>"], "", {"pad": 2, "eos": 2, "start": 2}),
        # BERT: nothing but [SEP] ends a text.
        (
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"],
            "",
            {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "eos": 3, "mask": 4, "start": 0},
        ),
        # RoBERTa, BART: <s> and </s> are at the ends of an encoder's row too.
        (
            ["<s>", "<pad>", "</s>", "<unk>", "a", "<mask>"],
            '{"start": 2}',
            {
                **{"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 5},
                **{"cls": 0, "sep": 2, "start": 2},
            },
        ),
        # LLaMA: no pad, and no cls though there is <s>.
        (
            ["<unk>", "<s>", "</s>", "a"],
            "",
            {"unk": 0, "bos": 1, "eos": 2, "pad": 2, "start": 2},
        ),
        # Names of one's own.
        (["x", "y", "z"], '{"eos": 1, "pad": 0}', {"eos": 1, "pad": 0, "start": 0}),
        # T5: sentinels descend.
        (
            ["<pad>", "</s>", "<unk>", "a", "<extra_id_1>", "<extra_id_0>"],
            "",
            {"pad": 0, "eos": 1, "unk": 2, "start": 0, "sentinels": (5, 4)},
        ),
    ],
)
def test_published_special_ids_are_recognised(tmp_path, pieces, sidecar, expected):
    tok = published(tmp_path, pieces, sidecar)
    assert tok.specials == tokenizer.Specials(**expected)
    assert tok.vocab_size == len(pieces)
    copy = tmp_path / "copy"
    copy.mkdir()
    assert tokenizer.load(tok.save(str(copy))).specials == tok.specials


def test_sentinels_may_follow_the_last_piece(tmp_path):
    """T5's published model file does not list them."""
    path = train("unigram").save(str(tmp_path))
    size = tokenizer.load(path).vocab_size
    ids = list(range(size + 2, size - 1, -1))
    (tmp_path / tokenizer.SIDECAR).write_text(f'{{"sentinels": {ids}}}')
    tok = tokenizer.load(path)
    assert tok.vocab_size == size + 3
    assert tok.sentinels().tolist() == ids
    assert tok.show([ids[0], *encode(tok, "dogs"), ids[2]]) == (
        "<extra_id_0> dogs <extra_id_2>"
    )
    assert tok.decode([ids[0], *encode(tok, "dogs")]) == "dogs"


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"no token ends a text .* write {\"eos\": ID}"
    ):
        published(tmp_path, ["<unk>", "a"])
    with pytest.raises(ValueError, match="not a tokenizer file .*'nosuch'"):
        published(tmp_path, ["<unk>", "a"], '{"eos": 0, "nosuch": 1}')


@pytest.mark.parametrize("kind", KINDS)
def test_which_pieces_continue_a_word(trained, kind):
    """Rejoining what continues gives the words, in each kind's idea of them."""
    tok = trained[kind]
    text = "The quick brown dogs."
    words = []
    for i in encode(tok, text).tolist():
        if words and tok.continues[i]:
            words[-1].append(i)
        else:
            words.append([i])
    expected = text.split()
    if kind == "wordpiece":
        expected = [*expected[:-1], "dogs", "."]
    assert [tok.decode(word).strip() for word in words] == expected
    assert not tok.continues[list(tok.names)].any()


def test_characters_are_one_id_each():
    text = "aé\u0301\n\tb \U0001f600"
    tok = tokenizer.train(TokenizerConfig("chars"), [text], 99)
    assert encode(tok, text).tolist() == [3 + sorted(text).index(c) for c in text]
    assert tok.vocab_size == 3 + len(text)
    assert tok.decode(encode(tok, text)) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "bpee"},
            "data.tokenizer.kind='bpee': expected one of bpe, wordpiece",
        ),
        (
            {"corpora": ("cldr",)},
            "data.tokenizer.corpora=('cldr',): must be a tuple of 'source:feature'",
        ),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenizerConfig(**fields).validate()


# --- Continuations ---


def fallback(tmp_path):
    """Letters and, for all else, bytes one by one, as LLaMA's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    model = tokenizers.models.BPE(
        {p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    core = tokenizers.Tokenizer(model)
    core.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("\u2581"),
            tokenizers.normalizers.Replace(" ", "\u2581"),
        ]
    )
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(pieces[:3])
    core.save(str(tmp_path / "tokenizer.json"))
    return tokenizer.load(str(tmp_path / "tokenizer.json"))


LIVE = ("the 🙂👍 dogs", "日本語 naïve", "the quick", "👩‍👩‍👧‍👦", "a\ufffdb")
BROKEN = (
    b"\xf0\x9f\x99",
    b"\xf0\x9f\x99\x82\xf0 a",
    b"\xff\xfe",
    b"a\xe2\x82",
    b"\x80a",
)


@pytest.mark.parametrize("kind", [*KINDS, "fallback"])
def test_a_continuation_is_what_the_prompt_s_text_gains(trained, kind, tmp_path):
    tok = fallback(tmp_path) if kind == "fallback" else trained[kind]
    for text in (*LIVE, *corpus()[:3]):
        ids = encode(tok, text).tolist()
        whole = tok.decode([i for i in ids if i not in tok.names])
        for at in range(len(ids) + 1):
            prompt, new = ids[:at], [*ids[at:], tok.eos, *ids]
            before = tok.decode(prompt)
            if whole.startswith(before):  # no character was cut in two
                assert before + tok.continuation(prompt, new) == whole
                assert tok.continuation([tok.eos, *prompt], new) == whole[len(before) :]


@pytest.mark.parametrize("kind", [*KINDS, "fallback"])
def test_a_stream_shows_the_continuation_and_takes_nothing_back(
    trained, kind, tmp_path
):
    tok = fallback(tmp_path) if kind == "fallback" else trained[kind]
    rows = [encode(tok, text).tolist() for text in LIVE]
    if kind in ("bytes", "fallback"):
        rows += [[3 + byte for byte in broken] for broken in BROKEN]
    for ids in rows:
        for new in (ids, [*ids, tok.eos, *ids]):
            stream = tokenizer.Stream(tok, encode(tok, "the"))
            shown = [stream(new[:n]) for n in range(len(new) + 1)]
            shown.append(stream(new, last=True))
            assert "".join(shown) == tok.continuation(encode(tok, "the"), new)
            if new == ids and "\ufffd" not in tok.decode(ids):
                assert not any("\ufffd" in part for part in shown)


def test_any_of_several_ends_ends_a_text(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "a", "<|im_end|>"]
    tok = published(tmp_path, pieces, '{"ends": [2, 4]}')
    assert tok.ends == (2, 4) and tok.eos == 2
    for end in tok.ends:
        assert tok.decode([3, end, 3]) == tok.continuation([end], [3, end, 3]) == "a"
    copy = tmp_path / "copy"
    copy.mkdir()
    assert tokenizer.load(tok.save(str(copy))).ends == (2, 4)
    (tmp_path / tokenizer.SIDECAR).unlink()
    assert tokenizer.load(str(tmp_path / "tokenizer.json")).ends == (2,)
