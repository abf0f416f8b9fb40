"""Text <-> token ids: trained and loaded with `tokenizers` and `sentencepiece`."""

import dataclasses
import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# The same ids in every tokenizer, as in T5. PAD also starts a decoder.
PAD, EOS, UNK = 0, 1, 2
SPECIALS = ("<pad>", "</s>", "<unk>")
KINDS = ("bpe", "wordpiece", "unigram", "bytes")


@dataclasses.dataclass
class TokenizerConfig:
    """How text becomes ids. Its size is the model's vocab_size."""

    kind: str = "bpe"
    lowercase: bool = False  # cannot be undone: decoded text is lower-case too
    path: str = ""  # an existing tokenizer.json or .model, instead of training one

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if self.kind not in KINDS:
            raise ValueError(
                f"data.tokenizer.kind={self.kind!r}: expected one of {', '.join(KINDS)}"
            )


class Tokenizer:
    """Base: ids of a text, without specials; text of ids, up to the first EOS."""

    filename = "tokenizer.json"
    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The file's content; equal tokenizers give equal bytes."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first EOS.

        Padding, unknown ids and ids that a larger model has beyond ours vanish.
        """
        kept = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, UNK) and i < self.vocab_size:
                kept.append(int(i))
        return self._decode(kept)

    def save(self, directory: str) -> str:
        """Writes the file into `directory`; returns its path."""
        path = os.path.join(directory, self.filename)
        with open(path + ".tmp", "wb") as f:
            f.write(self.to_bytes())
        os.replace(path + ".tmp", path)
        return path


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE or WordPiece."""

    def __init__(self, core: tokenizers.Tokenizer):
        self.core = core
        # '</s>' in a text is text.
        core.encode_special_tokens = True
        self.vocab_size = core.get_vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text; encoded in parallel."""
        out = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in out]

    def to_bytes(self) -> bytes:
        """The tokenizer.json."""
        return self.core.to_str(pretty=True).encode()

    def _decode(self, ids: list[int]) -> str:
        return self.core.decode(ids)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file: Unigram (Kudo 2018)."""

    filename = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.core = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.core.vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text."""
        return [np.asarray(x, np.int32) for x in self.core.encode(list(texts))]

    def to_bytes(self) -> bytes:
        """The model file."""
        return self.model

    def _decode(self, ids: list[int]) -> str:
        return self.core.decode(ids)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after the three specials (as ByT5, Xue et al. 2022)."""

    filename = "tokenizer.bytes"
    vocab_size = 256 + len(SPECIALS)

    def __init__(self, lowercase: bool = False):
        self.lowercase = lowercase

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text."""
        texts = [t.lower() if self.lowercase else t for t in texts]
        shift = len(SPECIALS)
        return [
            np.frombuffer(t.encode(), np.uint8).astype(np.int32) + shift for t in texts
        ]

    def to_bytes(self) -> bytes:
        """Its only setting."""
        return b"lowercase" if self.lowercase else b"cased"

    def _decode(self, ids: list[int]) -> str:
        shift = len(SPECIALS)
        raw = bytes(i - shift for i in ids if shift <= i < self.vocab_size)
        return raw.decode(errors="replace")


def train(config: TokenizerConfig, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of about `vocab_size` ids, learned from `texts`; deterministic.

    Digits are split one by one, so that numbers are spelled rather than memorised; not
    in WordPiece, which puts a space before every word it decodes and is lossy anyway.
    A byte-level BPE has at least 259 ids. ValueError if too few are asked for.
    """
    if config.kind == "bytes":
        return ByteTokenizer(config.lowercase)
    if config.kind == "unigram":
        return _train_unigram(config, texts, vocab_size)
    steps = [normalizers.NFC()]
    if config.lowercase:
        steps.append(normalizers.Lowercase())
    normalizer = normalizers.Sequence(steps)
    options = {
        "vocab_size": vocab_size,
        "special_tokens": list(SPECIALS),
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
        options["special_tokens"] += [f"##{c}" for c in characters if not c.isspace()]
        trainer = trainers.WordPieceTrainer(**options)
    core.normalizer = normalizer
    core.train_from_iterator(texts, trainer)
    if config.kind == "wordpiece":
        # Again without them as specials, so that a text's '##c' is not one.
        model = models.WordPiece(core.get_vocab(), unk_token=SPECIALS[UNK])
        core, trained = tokenizers.Tokenizer(model), core
        core.normalizer, core.decoder = trained.normalizer, trained.decoder
        core.pre_tokenizer = trained.pre_tokenizer
        core.add_special_tokens(list(SPECIALS))
    return HuggingFaceTokenizer(core)


def _train_unigram(
    config: TokenizerConfig, texts: Iterable[str], vocab_size: int
) -> Tokenizer:
    out = io.BytesIO()
    _sentencepiece(
        sentence_iterator=iter(texts),
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
        normalization_rule_name="nfkc_cf" if config.lowercase else "nfkc",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,  # the same model on every machine
        minloglevel=2,
    )
    return SentencePieceTokenizer(out.getvalue())


def _sentencepiece(**options) -> None:
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        raise ValueError(
            f"model.vocab_size={options['vocab_size']}: sentencepiece cannot train "
            f"that ({str(error).splitlines()[-1]}); raise it or use another kind"
        ) from error


def load(path: str) -> Tokenizer:
    """A saved tokenizer; ValueError if it is none, or its special ids are not ours."""
    with open(path, "rb") as f:
        content = f.read()
    try:
        return _parse(path, content)
    except Exception as error:  # the libraries raise bare Exception and RuntimeError
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error


def _parse(path: str, content: bytes) -> Tokenizer:
    if path.endswith(".bytes"):
        return ByteTokenizer(content == b"lowercase")
    if path.endswith(".model"):
        loaded = SentencePieceTokenizer(content)
        ids = loaded.core.pad_id(), loaded.core.eos_id(), loaded.core.unk_id()
    else:
        loaded = HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(content.decode()))
        ids = tuple(loaded.core.token_to_id(s) for s in SPECIALS)
    if ids != (PAD, EOS, UNK):
        raise ValueError(
            f"tokenizer {path}: the ids of pad, eos and unk are {ids}, must be "
            f"{(PAD, EOS, UNK)} ({', '.join(SPECIALS)}); train one with Triform"
        )
    return loaded


def find(directory: str) -> str | None:
    """The tokenizer file in a workdir, if there is one."""
    kinds = (HuggingFaceTokenizer, SentencePieceTokenizer, ByteTokenizer)
    paths = [os.path.join(directory, kind.filename) for kind in kinds]
    return next((p for p in paths if os.path.exists(p)), None)
