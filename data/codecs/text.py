"""Text <-> token ids: trained and loaded with `tokenizers` and `sentencepiece`."""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from triform.data.codecs.framing import from_processor
from triform.data.codecs.pieces import pieces
from triform.data.codecs.residues import ALPHABET, library
from triform.data.codecs.specials import (
    EOS,
    PAD,
    SIDECAR,
    SPECIALS,
    UNK,
    Specials,
    recognise,
)
from triform.data.codecs.tokenizer import Stream, Tokenizer, well_formed

__all__ = ["Specials", "Stream", "Tokenizer", "well_formed"]

SPACE = "\u2581"  # stands for a space in pieces of SentencePiece and its like
MOST_BYTES = 1 << 20  # of a line, when a unigram model is trained
KINDS = ("bpe", "wordpiece", "unigram", "bytes", "chars", "residues")
BY_CHARACTER = ("chars", "residues")  # whose words are single characters


@dataclasses.dataclass
class TokenizerConfig:
    """How text becomes ids. The size of a trained tokenizer is model.vocab_size."""

    # Trained subwords (bpe, wordpiece, unigram), bytes, characters, or residues, the
    # alphabet of ESM-2.
    kind: str = "bpe"
    lowercase: bool = False  # lower-case all text; decoded text is lower-case too
    path: str = ""  # existing tokenizer.json or .model; '': train a new one
    corpora: tuple[str, ...] = ()  # more text to train it on: 'source:feature'

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if self.kind not in KINDS:
            raise ValueError(
                f"data.tokenizer.kind={self.kind!r}: expected one of {', '.join(KINDS)}"
            )
        if self.lowercase and self.kind == "residues":
            raise ValueError(
                "data.tokenizer.lowercase=True: the alphabet of residues has capitals "
                "only; set it to False"
            )
        if not all(isinstance(x, str) and ":" in x for x in self.corpora):
            raise ValueError(
                f"data.tokenizer.corpora={self.corpora!r}: must be a tuple of "
                "'source:feature', such as ('multi30k_translate:en',)"
            )


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE, WordPiece, characters, or a published one."""

    def __init__(self, core: tokenizers.Tokenizer, specials: Specials):
        super().__init__(_pieces(core), specials)
        added = core.get_added_tokens_decoder().items()
        self.names |= {i: token.content for i, token in added if token.special}
        self.core = core
        # '</s>' in a text is text.
        core.encode_special_tokens = True
        # A published file may ask for rows of one length.
        core.no_padding()
        core.no_truncation()
        if isinstance(core.model, models.WordPiece):
            self.joiner = core.model.continuing_subword_prefix

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Encoded in parallel."""
        return _ids(self.core, texts)

    def _read(self, texts: list[str]) -> list[np.ndarray]:
        return _ids(self._reading, texts)

    @functools.cached_property
    def _reading(self) -> tokenizers.Tokenizer:
        """The same, but it finds special tokens in a text."""
        core = tokenizers.Tokenizer.from_str(self.core.to_str())
        core.encode_special_tokens = False
        core.add_special_tokens(list(self.names.values()))
        return core

    def normalize(self, text: str) -> str:
        """Without the mark of a space that some put into the text."""
        normalizer = self.core.normalizer
        if normalizer is None:
            return text
        found = normalizer.normalize_str(text)
        if SPACE in found and SPACE not in text:
            found = found.replace(SPACE, " ").removeprefix(" " * (text[:1] != " "))
        return found

    def to_bytes(self) -> bytes:
        """The tokenizer.json."""
        return self.core.to_str(pretty=True).encode()

    def _decode(self, ids: list[int]) -> str:
        return self.core.decode(ids)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file: Unigram (Kudo 2018), or a published one."""

    filename = "tokenizer.model"

    def __init__(self, model: bytes, specials: Specials):
        self.model = model
        self.core = sentencepiece.SentencePieceProcessor(model_proto=model)
        super().__init__(_pieces(self.core), specials)
        self.name(filter(self.core.is_control, range(len(self.pieces))))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(x, np.int32) for x in self.core.encode(texts)]

    def normalize(self, text: str) -> str:
        """Without the space that it puts before a text."""
        return self.core.normalize(text).replace(SPACE, " ").removeprefix(" ")

    def to_bytes(self) -> bytes:
        """The model file."""
        return self.model

    def _decode(self, ids: list[int]) -> str:
        return self.core.decode(ids)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after the specials (as ByT5, Xue et al. 2022)."""

    filename = "tokenizer.bytes"

    def __init__(
        self, lowercase: bool = False, specials: Sequence[str] = (), **known: Any
    ):
        # As every other kind does it, and as an exported one will.
        self._lower = normalizers.Lowercase() if lowercase else None
        self.first = len(SPECIALS) + len(specials)  # the id of byte 0
        pieces = [*SPECIALS, *specials, *map(chr, range(256))]
        super().__init__(pieces, recognise(pieces[: self.first], **known))
        self.name(range(self.first))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [
            np.frombuffer(self.normalize(t).encode(), np.uint8).astype(np.int32)
            + self.first
            for t in texts
        ]

    def normalize(self, text: str) -> str:
        """Lower-case, if so set."""
        return self._lower.normalize_str(text) if self._lower else text

    def to_bytes(self) -> bytes:
        """Its settings, one a line."""
        case = "lowercase" if self._lower else "cased"
        specials = self.pieces[len(SPECIALS) : self.first]
        return "\n".join([case, *specials]).encode()

    def _decode(self, ids: list[int]) -> str:
        return bytes(i - self.first for i in ids).decode(errors="replace")


def _ids(core: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    # Fast: without where in the text each id comes from.
    found = core.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in found]


def _pieces(core: tokenizers.Tokenizer | sentencepiece.SentencePieceProcessor) -> list:
    """What every id stands for; '' where a file numbers with gaps."""
    if isinstance(core, sentencepiece.SentencePieceProcessor):
        return [core.id_to_piece(i) for i in range(core.vocab_size())]
    vocabulary = core.get_vocab()
    pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, i in vocabulary.items():
        pieces[i] = piece
    return pieces


def train(
    config: TokenizerConfig,
    texts: Iterable[str],
    vocab_size: int,
    specials: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer of about `vocab_size` ids, learned from `texts`; deterministic.

    Its first ids are pad, EOS, unk and `specials`, which stand for no text. Digits are
    split one by one, so that numbers are spelled rather than memorised; not in
    WordPiece, which puts a space before every word it decodes and is lossy anyway. A
    byte-level BPE has at least 259 ids; characters are as many as `texts` hold.
    ValueError if too few are asked for.
    """
    if config.kind == "bytes":
        return ByteTokenizer(config.lowercase, specials)
    if config.kind == "residues":
        return residues()
    names = [*SPECIALS, *specials]
    if config.kind == "unigram":
        return _train_unigram(config, texts, vocab_size, names)
    if config.kind == "chars":
        return _train_characters(config, texts, names)
    steps = [normalizers.NFC()]
    if config.lowercase:
        steps.append(normalizers.Lowercase())
    normalizer = normalizers.Sequence(steps)
    options = {
        "vocab_size": vocab_size,
        "special_tokens": names,
        "show_progress": False,
    }
    if config.kind == "bpe":
        core = tokenizers.Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=sorted(alphabet), **options)
    else:
        core = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIALS[UNK]))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        # The trainer numbers '##c' in the order of a hash map, another one each time:
        # given as specials, they are numbered in ours.
        texts = list(texts)
        characters = sorted({c for t in texts for c in normalizer.normalize_str(t)})
        marked = [f"##{c}" for c in characters if not c.isspace()]
        options["special_tokens"] = names + marked
        trainer = trainers.WordPieceTrainer(**options)
    core.normalizer = normalizer
    core.train_from_iterator(texts, trainer)
    if config.kind == "wordpiece":
        # Again without them as specials, so that a text's '##c' is not one.
        model = models.WordPiece(core.get_vocab(), unk_token=SPECIALS[UNK])
        core, trained = tokenizers.Tokenizer(model), core
        core.normalizer, core.decoder = trained.normalizer, trained.decoder
        core.pre_tokenizer = trained.pre_tokenizer
        core.add_special_tokens(names)
    return HuggingFaceTokenizer(core, recognise(names))


def _train_characters(
    config: TokenizerConfig, texts: Iterable[str], names: list[str]
) -> Tokenizer:
    lower = normalizers.Lowercase()
    characters: set[str] = set()
    for text in texts:
        characters.update(lower.normalize_str(text) if config.lowercase else text)
    vocabulary = {p: i for i, p in enumerate([*names, *sorted(characters)])}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, SPECIALS[UNK]))
    if config.lowercase:  # and else nothing: one id a character as it is written
        core.normalizer = lower
    every = tokenizers.Regex("[\\s\\S]")
    core.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(names)
    return HuggingFaceTokenizer(core, recognise(names))


def _train_unigram(
    config: TokenizerConfig, texts: Iterable[str], vocab_size: int, names: list[str]
) -> Tokenizer:
    out = io.BytesIO()
    _sentencepiece(
        # In lines and pieces of them: it leaves out what it takes for too long.
        sentence_iterator=(
            piece
            for t in texts
            for line in t.splitlines()
            for piece in pieces(line, MOST_BYTES // 4)
        ),
        model_writer=out,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # a small corpus gives fewer
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        pad_piece=SPECIALS[PAD],
        eos_piece=SPECIALS[EOS],
        unk_piece=SPECIALS[UNK],
        control_symbols=names[len(SPECIALS) :],  # never found in a text
        max_sentence_length=MOST_BYTES,
        normalization_rule_name="nfkc_cf" if config.lowercase else "nfkc",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,  # the same model on every machine
        minloglevel=2,
    )
    return SentencePieceTokenizer(out.getvalue(), recognise(names))


def _sentencepiece(**options) -> None:
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        raise ValueError(
            f"model.vocab_size={options['vocab_size']}: sentencepiece cannot train "
            f"that ({str(error).splitlines()[-1]}); raise it or use another kind"
        ) from error


def residues(pieces: Sequence[str] = ALPHABET) -> Tokenizer:
    """The tokenizer of an alphabet of residues; ids are those of EsmTokenizer."""
    return HuggingFaceTokenizer(library(pieces), recognise(pieces))


def load(path: str) -> Tokenizer:
    """A saved or published tokenizer; ValueError if it is none.

    Special ids are recognised by their usual names; `special_tokens.json` beside the
    file overrides them one by one: {"pad": 3, "start": 2}.
    """
    with open(path, "rb") as f:
        content = f.read()
    known = {}
    beside = os.path.join(os.path.dirname(path), SIDECAR)
    try:
        if os.path.exists(beside):
            with open(beside, "rb") as f:
                known = json.load(f)
        return _parse(path, content, known)
    except Exception as error:  # the libraries raise bare Exception and RuntimeError
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error


def _parse(path: str, content: bytes, known: dict[str, Any]) -> Tokenizer:
    if path.endswith(".bytes"):
        case, *specials = content.decode().split("\n")
        return ByteTokenizer(case == "lowercase", specials, **known)
    if path.endswith(".model"):
        core = sentencepiece.SentencePieceProcessor(model_proto=content)
        return SentencePieceTokenizer(content, recognise(_pieces(core), **known))
    core = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
    if "template" not in known and core.post_processor is not None:
        processor = json.loads(core.post_processor.__getstate__())
        known = known | {"template": from_processor(processor)}
    return HuggingFaceTokenizer(core, recognise(_pieces(core), **known))


def find(directory: str) -> str | None:
    """The tokenizer file in a workdir, if there is one."""
    kinds = (HuggingFaceTokenizer, SentencePieceTokenizer, ByteTokenizer)
    paths = [os.path.join(directory, kind.filename) for kind in kinds]
    return next((p for p in paths if os.path.exists(p)), None)
