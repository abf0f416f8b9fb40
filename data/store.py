"""Examples encoded once into memory-mapped arrays.

The arrays are cached by everything that changes them: the corpus, which of its features
are read and how, and the tokenizer.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from triform.data import sources
from triform.data.codecs.text import Tokenizer
from triform.data.sources import Source
from triform.runtime import paths
from triform.runtime.errors import DataError

LAYOUT = "v3"  # of the arrays; another one makes other cache entries


def single(value: Any) -> list:
    """The value, undivided."""
    return [value]


def each(value: Any) -> list:
    """The items of a sequence, the characters of a text."""
    return list(value) if isinstance(value, Iterable) else [value]


@dataclasses.dataclass(frozen=True)
class Feature:
    """What is read of every example of a source, and what becomes of it."""

    field: str  # where the config names it, and the name of its arrays
    source: str
    name: str
    prefix: str = ""  # put before every text
    divide: Callable[[Any], list] = single  # value -> texts, each tokenised by itself
    end: bool = False  # EOS after every text
    is_text: bool = True  # else numbers or names, kept as they are

    def key(self) -> str:
        """What its arrays depend on, besides source and tokenizer."""
        how = self.divide.__qualname__, self.end, self.is_text
        return repr((self.field, self.name, self.prefix, *how))


class Tokens:
    """Tokenised texts of one feature.

    `ids` is flat; text t has ids[offsets[t]:offsets[t+1]], and example e the texts from
    first[e] to first[e+1]. `words` are whitespace words and newlines, `bytes` UTF-8.
    """

    def __init__(self, path: str):
        with np.load(f"{path}.npz") as arrays:
            self.offsets, self.first = arrays["offsets"], arrays["first"]
            self.words, self.bytes = map(int, arrays["counts"])
            dtype = arrays["dtype"].dtype
        self.ids = np.zeros(0, dtype)
        if os.path.getsize(f"{path}.tokens"):  # an empty file cannot be mapped
            # As a plain array: slices of a memmap object cost ten times as much.
            self.ids = np.asarray(np.memmap(f"{path}.tokens", dtype, "r"))
        if len(self.ids) != self.offsets[-1]:
            raise DataError(
                f"{path}.tokens: {len(self.ids)} tokens where {self.offsets[-1]} were "
                f"written; delete {os.path.dirname(path)}"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> np.ndarray:
        return self.ids[self.offsets[text] : self.offsets[text + 1]]

    def sizes(self) -> np.ndarray:
        """Tokens of every text, int64."""
        return np.diff(self.offsets)


class TokenStore:
    """Features of one split of a source: tokens by field, values by field."""

    def __init__(self, directory: str, features: Iterable[Feature]):
        # Names corpus, split, features and tokenizer: equal digests, equal content.
        self.digest = os.path.basename(directory)
        self.tokens: dict[str, Tokens] = {}
        # Example e has values[field][first[field][e]:first[field][e + 1]].
        self.values: dict[str, np.ndarray] = {}
        self.first: dict[str, np.ndarray] = {}
        for feature in features:
            path = os.path.join(directory, feature.field)
            if feature.is_text:
                self.tokens[feature.field] = Tokens(path)
            else:
                with np.load(f"{path}.npz") as arrays:
                    self.values[feature.field] = arrays["values"]
                    self.first[feature.field] = arrays["first"]


def origin(config: Any, source: str) -> Source:
    """A source, with the folders that a config names."""
    return sources.source(source, config.data_dir, config.manual_dir)


def examples(config: Any, source: str, split: str) -> Sequence[Mapping[str, Any]]:
    """The examples of a split, as the source has them."""
    return origin(config, source).examples(split)


def class_names(config: Any, feature: Feature) -> tuple[str, ...]:
    """The names of the classes that a feature numbers; () if it does not."""
    return origin(config, feature.source).classes(feature.name)


def reader(config: Any, feature: Feature) -> Callable[[Mapping[str, Any]], list]:
    """A function from an example to its texts (or values); DataError if it has none.

    Where text is asked for, the number of a class becomes its name.
    """
    names = functools.cache(lambda: class_names(config, feature))

    def text(value: Any) -> str:
        if isinstance(value, int | np.integer) and 0 <= value < len(names()):
            return names()[value]
        if not isinstance(value, str):
            raise DataError(
                f"data.{feature.field}: feature {feature.name!r} of "
                f"{feature.source!r} is no text ({value!r:.40}); name a text feature"
            )
        return value

    def read(example: Mapping[str, Any]) -> list:
        if feature.name not in example:
            raise DataError(
                f"data.{feature.field}: {feature.source!r} has no feature "
                f"{feature.name!r}; expected one of {', '.join(sorted(example))}"
            )
        parts = feature.divide(example[feature.name])
        if not feature.is_text:
            return parts
        return [feature.prefix + text(part) for part in parts]

    return read


def open_store(
    config: Any, split: str, tok: Tokenizer, features: Sequence[Feature]
) -> TokenStore:
    """The features, all of one source, from the cache or computed into it."""
    keys = [tok.digest(), *(feature.key() for feature in features)]

    def write(path: str) -> None:
        _write(config, split, tok, features, path)

    path = cached(config, "tokens", features[0].source, split, keys, write)
    return TokenStore(path, features)


def cached(
    config: Any,
    kind: str,
    source: str,
    split: str,
    keys: Iterable[str],
    write: Callable[[str], None],
) -> str:
    """The folder that `write(folder)` filled for this source, split and keys."""
    content = origin(config, source).fingerprint(split)
    key = hashlib.sha256("\0".join([LAYOUT, content, *keys]).encode())
    final = os.path.join(cache_root(config), kind, key.hexdigest()[:32])
    if not os.path.isdir(final):
        os.makedirs(os.path.dirname(final), exist_ok=True)
        _sweep(os.path.dirname(final))
        part = tempfile.mkdtemp(dir=os.path.dirname(final), prefix="part-")
        try:
            write(part)
            os.chmod(part, 0o755)  # mkdtemp's is for us alone; a cache may be shared
            os.rename(part, final)
        except OSError:
            # Another process may have been first: its arrays are the same.
            if not os.path.isdir(final):
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return final


def cache_root(config: Any) -> str:
    """Where arrays are kept."""
    given = config.cache_dir or os.environ.get("TRIFORM_CACHE")
    return paths.absolute(given or "~/.cache/triform", setting="TRIFORM_CACHE")


def _sweep(directory: str) -> None:
    """Removes what killed processes began more than a day ago."""
    yesterday = time.time() - 86_400
    for entry in os.scandir(directory):
        if entry.name.startswith("part-") and entry.stat().st_mtime < yesterday:
            shutil.rmtree(entry.path, ignore_errors=True)


def _write(
    config: Any, split: str, tok: Tokenizer, features: Sequence[Feature], path: str
) -> None:
    """Streams: the texts of a corpus need not fit into memory, only their lengths."""
    raw = examples(config, features[0].source, split)
    read = [reader(config, feature) for feature in features]
    stream = iter(tqdm(raw, f"tokenising {split}", disable=None, leave=False))
    writers = [
        _TokenWriter(os.path.join(path, f.field), tok, f.end)
        if f.is_text
        else _ValueWriter(os.path.join(path, f.field), f)
        for f in features
    ]
    while chunk := list(itertools.islice(stream, 1000)):
        for one, writer in zip(read, writers, strict=True):
            writer.add([one(example) for example in chunk])
    for writer in writers:
        writer.finish()


class _TokenWriter:
    """Writes what `Tokens` reads."""

    def __init__(self, path: str, tok: Tokenizer, end: bool):
        self.path, self.tok = path, tok
        self.end = np.array([tok.eos] if end else [], np.int32)
        self.dtype = np.dtype(np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)
        self.sizes, self.first, self.counts = [0], [0], np.zeros(2, np.int64)

    def add(self, examples: list[list[str]]) -> None:
        """Texts of some examples."""
        self.first += [len(texts) for texts in examples]
        texts = [text for part in examples for text in part]
        # Where texts are words, few are distinct.
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self.tok.encode_batch(distinct), strict=True))
        rows = [x for text in texts for x in (ids[text], self.end)]
        with open(f"{self.path}.tokens", "ab") as f:
            f.write(np.concatenate([self.end[:0], *rows]).astype(self.dtype).tobytes())
        self.sizes += [len(ids[text]) + len(self.end) for text in texts]
        self.counts[0] += sum(len(text.split()) + text.count("\n") for text in texts)
        self.counts[1] += sum(len(text.encode()) for text in texts)

    def finish(self) -> None:
        """Writes all but the tokens."""
        np.savez(
            f"{self.path}.npz",
            offsets=np.cumsum(self.sizes, dtype=np.int64),
            first=np.cumsum(self.first, dtype=np.int64),
            counts=self.counts,
            dtype=np.zeros(0, self.dtype),
        )


class _ValueWriter:
    """Writes the numbers or names of all examples as one array."""

    def __init__(self, path: str, feature: Feature):
        self.path, self.feature = path, feature
        self.values, self.first = [], [0]

    def add(self, examples: list[list]) -> None:
        """Values of some examples."""
        self.first += [len(values) for values in examples]
        self.values += [value for part in examples for value in part]

    def finish(self) -> None:
        """Writes them; DataError if they are neither."""
        values = np.asarray(self.values)
        if values.ndim != 1 or values.dtype.kind not in "biufU":
            raise DataError(
                f"data.{self.feature.field}: feature {self.feature.name!r} of "
                f"{self.feature.source!r} holds neither numbers nor names "
                f"({self.values[0]!r:.40}); name another"
            )
        np.savez(f"{self.path}.npz", values=values, first=np.cumsum(self.first))
