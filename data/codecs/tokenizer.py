"""What all tokenizers share: ids of texts, texts of ids, and special ids."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from triform.data.codecs.framing import Framing
from triform.data.codecs.specials import SIDECAR, Specials


def well_formed(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which UTF-8 lacks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def common_start(a: str, b: str) -> int:
    """Number of characters that both begin with."""
    equal = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(a, b, strict=False)
    )
    return sum(1 for _ in equal)


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
        named.pop("template")
        self.names = {
            i: pieces[i] if i < len(pieces) else name
            for name, i in named.items()
            if i is not None
        }
        # Every id that ends a generated text.
        self.ends = specials.ends or (specials.eos,)
        # T5's published model files lack the sentinels, which follow the last piece.
        self.vocab_size = max(len(pieces), *(i + 1 for i in self.names))

    def name(self, ids: Iterable[int]) -> None:
        """Takes these ids for special ones, called as their pieces are."""
        self.names |= {i: self.pieces[i] for i in ids if i < len(self.pieces)}

    def end_at(self, ids: Iterable[int]) -> None:
        """Lets these ids end a generated text too."""
        self.ends = tuple(dict.fromkeys([*self.ends, *ids]))
        self.specials = dataclasses.replace(self.specials, ends=self.ends)
        self.name(self.ends)

    @property
    def lowercase(self) -> bool:
        """Whether all text becomes lower-case."""
        return self.normalize("A") == "a"

    def normalize(self, text: str) -> str:
        """The text as it is encoded, and as decoding writes it: composed, lower-case
        and so on, as the tokenizer has it.
        """
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.vocab_size

    def encode(self, values: Sequence[str], specials: bool = False) -> list[np.ndarray]:
        """One int32 array per text, without framing.

        With `specials` the name of a special token in a text, such as "[MASK]", is its
        id, as transformers reads it; else it is text.
        """
        texts = [well_formed(text) for text in values]
        return self._read(texts) if specials else self._encode(texts)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array per text, literally."""
        return self.encode(texts)

    def prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids that a language model is to continue, one int32 array per text.

        As transformers gives them: special tokens are read as such, and a token for the
        beginning stands where the tokenizer puts one. An empty row is EOS, which
        precedes a document in training.
        """
        framing = self.framing("prompt")
        rows = [framing.framed([x]).ids for x in self.encode(texts, specials=True)]
        return [x if len(x) else np.array([self.eos], np.int32) for x in rows]

    def framing(self, use: str) -> Framing:
        """What stands around texts; `use` is one of framing.USES."""
        return self.specials.framing(use)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array per text, literally."""
        raise NotImplementedError

    def _read(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array per text, in which names of special tokens are those."""
        ids = {name: i for i, name in self.names.items()}
        longest = sorted(ids, key=len, reverse=True)
        name = re.compile("(" + "|".join(map(re.escape, longest)) + ")")
        split = [[part for part in name.split(text) if part] for text in texts]
        between = [part for parts in split for part in parts if part not in ids]
        found = iter(self._encode(between))
        rows = [
            [[ids[part]] if part in ids else next(found) for part in parts]
            for parts in split
        ]
        empty = np.zeros(0, np.int32)
        return [np.concatenate([empty, *row]).astype(np.int32) for row in rows]

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
        return both[common_start(self._decode(before), both) :]

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
            self._shown = text[: common_start(self._shown, text)]
        fresh, self._shown = text[len(self._shown) :], text
        return fresh
