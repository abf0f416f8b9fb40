"""Text <-> token ids: trained and loaded with `tokenizers` and `sentencepiece`."""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from triform.data.codecs.pieces import pieces
from triform.data.codecs.specials import (
    EOS,
    PAD,
    SIDECAR,
    SPECIALS,
    UNK,
    Specials,
    recognise,
)

MOST_BYTES = 1 << 20  # of a line, when a unigram model is trained
KINDS = ("bpe", "wordpiece", "unigram", "bytes", "chars")


@dataclasses.dataclass
class TokenizerConfig:
    """How text becomes ids. Its size is the model's vocab_size."""

    kind: str = "bpe"
    lowercase: bool = False  # cannot be undone: decoded text is lower-case too
    path: str = ""  # an existing tokenizer.json or .model, instead of training one
    corpora: tuple[str, ...] = ()  # 'source:feature' to train on besides the data

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if self.kind not in KINDS:
            raise ValueError(
                f"data.tokenizer.kind={self.kind!r}: expected one of {', '.join(KINDS)}"
            )
        if not all(isinstance(x, str) and ":" in x for x in self.corpora):
            raise ValueError(
                f"data.tokenizer.corpora={self.corpora!r}: must be a tuple of "
                "'source:feature', such as ('multi30k_translate:en',)"
            )


class Tokenizer:
    """Base: ids of a text, without specials; text of ids, up to the first end."""

    filename = "tokenizer.json"
    joiner = ""  # begins a piece that continues a word, if the kind has such

    def __init__(self, pieces: Sequence[str], specials: Specials):
        self.pieces, self.specials = pieces, specials
        self.pad, self.eos, self.start = specials.pad, specials.eos, specials.start
        self.unk, self.bos, self.mask = specials.unk, specials.bos, specials.mask
        self.cls, self.sep = specials.cls, specials.sep
        # id: name, of all that are no text.
        named = dataclasses.asdict(specials)
        for i, special in enumerate(named.pop("sentinels")):
            named[f"<extra_id_{i}>"] = special
        for i, special in enumerate(named.pop("ends")):
            named[f"<end_{i}>"] = special
        self.names = {
            i: pieces[i] if i < len(pieces) else name
            for name, i in named.items()
            if i is not None
        }
        # Every id that ends a generated text.
        self.ends = specials.ends or (specials.eos,)
        # T5's published model files lack the sentinels, which follow the last piece.
        self.vocab_size = max(len(pieces), *(i + 1 for i in self.names))

    @property
    def lowercase(self) -> bool:
        """Whether all text becomes lower-case."""
        return self._normalized("A") == "a"

    def _normalized(self, text: str) -> str:
        """The text as it is encoded."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.vocab_size

    def encode(self, values: Sequence[str]) -> list[np.ndarray]:
        """One int32 array per text."""
        return self.encode_batch(values)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The file's content; equal tokenizers give equal bytes."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first end.

        Special ids and those that a larger model has beyond ours vanish.
        """
        return self._decode(self._until_end(ids))

    def continuation(self, prompt: Iterable[int], new: Iterable[int]) -> str:
        """The text that `new` ids, up to the first end, add to that of a prompt's.

        Decoded together: alone, a first piece may lose the space before it.
        """
        before = [i for i in map(int, prompt) if self._is_text(i)]
        both = self._decode(before + self._until_end(new))
        return both[len(os.path.commonprefix([self._decode(before), both])) :]

    def end_at(self, ids: Iterable[int]) -> None:
        """Lets these ids end a generated text too."""
        self.ends = tuple(dict.fromkeys([*self.ends, *ids]))
        self.specials = dataclasses.replace(self.specials, ends=self.ends)
        self._name(self.ends)

    def _name(self, ids: Iterable[int]) -> None:
        """Takes these ids for special ones."""
        self.names |= {i: self.pieces[i] for i in ids if i < len(self.pieces)}

    def _until_end(self, ids: Iterable[int]) -> list[int]:
        """The ids of text before the first end."""
        real = itertools.takewhile(lambda i: i not in self.ends, map(int, ids))
        return [i for i in real if self._is_text(i)]

    @functools.cached_property
    def byte_pieces(self) -> frozenset[int]:
        """Ids of '<0x0A>' and so on, which spell what has no piece of its own."""
        byte = re.compile("<0x[0-9A-Fa-f]{2}>")
        return frozenset(i for i, p in enumerate(self.pieces) if byte.fullmatch(p))

    def show(self, ids: Iterable[int]) -> str:
        """All ids for the eye: special ones by name, text between them decoded."""
        parts = []
        for is_text, run in itertools.groupby(map(int, ids), self._is_text):
            if is_text:
                parts.append(self._decode(list(run)))
            else:
                parts += [self.names.get(i, f"<{i}>") for i in run]
        return " ".join(parts)

    def _is_text(self, i: int) -> bool:
        return i < len(self.pieces) and i not in self.names

    def sentinels(self) -> np.ndarray:
        """The ids of '<extra_id_0>', '<extra_id_1>' ..., int32."""
        return np.array(self.specials.sentinels, np.int32)

    @functools.cached_property
    def continues(self) -> np.ndarray:
        """bool [vocab_size]: which ids continue the word of the one before.

        WordPiece marks those; other kinds mark the beginning of a word, by a space or
        what stands for it, so that punctuation belongs to the word it follows.
        """
        table = np.zeros(self.vocab_size, bool)
        if self.joiner:
            table[: len(self.pieces)] = [p.startswith(self.joiner) for p in self.pieces]
        else:
            marks = ("\u0120", "\u2581", " ")  # byte-level, SentencePiece, characters
            firsts = {p[:1] for p in self.pieces}
            mark = next((m for m in marks if m in firsts), "")
            table[: len(self.pieces)] = [not p.startswith(mark) for p in self.pieces]
        table[list(self.names)] = False
        return table

    def digest(self) -> str:
        """Changes whenever an id of a text or a special id does."""
        content = self.to_bytes() + repr(self.specials).encode()
        return hashlib.sha256(content).hexdigest()

    def save(self, directory: str) -> str:
        """Writes the file, and one that names its specials; returns the file's path."""
        specials = json.dumps(dataclasses.asdict(self.specials), indent=2).encode()
        for name, content in ((SIDECAR, specials), (self.filename, self.to_bytes())):
            path = os.path.join(directory, name)
            with open(path + ".tmp", "wb") as f:
                f.write(content)
            os.replace(path + ".tmp", path)
        return path


class Stream:
    """A continuation that grows, as text that is final: joined, it is `continuation`.

    What the next id may change is held back: a character of which bytes are missing,
    and bytes that are spelled one by one, which decoders join or refuse as a whole.
    """

    def __init__(self, tok: Tokenizer, prompt: Sequence[int] = ()):
        self._tok, self._prompt, self._shown = tok, [*prompt], ""

    def __call__(self, new: Sequence[int], last: bool = False) -> str:
        """What can be shown now that these ids are written, and was not before.

        `last`: no more will come, so that nothing is held back.
        """
        new = [*map(int, new)]
        over = last or not set(self._tok.ends).isdisjoint(new)
        if not over:
            while new and new[-1] in self._tok.byte_pieces:
                new.pop()
        text = self._tok.continuation(self._prompt, new)
        text = text if over else text.rstrip("\ufffd")
        if not text.startswith(self._shown):
            if not over:
                return ""
            self._shown = os.path.commonprefix([self._shown, text])
        fresh, self._shown = text[len(self._shown) :], text
        return fresh


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE, WordPiece, characters, or a published one."""

    def __init__(self, core: tokenizers.Tokenizer, specials: Specials):
        super().__init__(_pieces(core), specials)
        self.core = core
        added = core.get_added_tokens_decoder()
        self._name(i for i, token in added.items() if token.special)
        # '</s>' in a text is text.
        core.encode_special_tokens = True
        # A published file may ask for rows of one length.
        core.no_padding()
        core.no_truncation()
        if isinstance(core.model, models.WordPiece):
            self.joiner = core.model.continuing_subword_prefix

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text; encoded in parallel."""
        out = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in out]

    def _normalized(self, text: str) -> str:
        normalizer = self.core.normalizer
        return normalizer.normalize_str(text) if normalizer else text

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
        self._name(filter(self.core.is_control, range(len(self.pieces))))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text."""
        return [np.asarray(x, np.int32) for x in self.core.encode(list(texts))]

    def _normalized(self, text: str) -> str:
        return self.core.normalize(text).strip("\u2581")

    def to_bytes(self) -> bytes:
        """The model file."""
        return self.model

    def _decode(self, ids: list[int]) -> str:
        return self.core.decode(ids)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after the specials (as ByT5, Xue et al. 2022)."""

    filename = "tokenizer.bytes"

    def __init__(self, lowercase: bool = False, specials: Sequence[str] = ()):
        self._lower = lowercase
        self.first = len(SPECIALS) + len(specials)  # the id of byte 0
        pieces = [*SPECIALS, *specials, *map(chr, range(256))]
        super().__init__(pieces, recognise(pieces[: self.first]))
        self._name(range(self.first))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text."""
        return [
            np.frombuffer(self._normalized(t).encode(), np.uint8).astype(np.int32)
            + self.first
            for t in texts
        ]

    def _normalized(self, text: str) -> str:
        return text.lower() if self._lower else text

    def to_bytes(self) -> bytes:
        """Its settings, one a line."""
        case = "lowercase" if self._lower else "cased"
        specials = self.pieces[len(SPECIALS) : self.first]
        return "\n".join([case, *specials]).encode()

    def _decode(self, ids: list[int]) -> str:
        return bytes(i - self.first for i in ids).decode(errors="replace")


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


def _parse(path: str, content: bytes, known: dict) -> Tokenizer:
    if path.endswith(".bytes"):
        case, *specials = content.decode().split("\n")
        return ByteTokenizer(case == "lowercase", specials)
    if path.endswith(".model"):
        core = sentencepiece.SentencePieceProcessor(model_proto=content)
        return SentencePieceTokenizer(content, recognise(_pieces(core), **known))
    core = tokenizers.Tokenizer.from_str(content.decode())
    return HuggingFaceTokenizer(core, recognise(_pieces(core), **known))


def find(directory: str) -> str | None:
    """The tokenizer file in a workdir, if there is one."""
    kinds = (HuggingFaceTokenizer, SentencePieceTokenizer, ByteTokenizer)
    paths = [os.path.join(directory, kind.filename) for kind in kinds]
    return next((p for p in paths if os.path.exists(p)), None)
