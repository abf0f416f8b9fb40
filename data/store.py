"""Examples encoded once into memory-mapped arrays.

The arrays are cached by everything that changes them: the corpus, which of its features
are read and how, and the tokenizer.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform.data import encoding, progress, sources
from triform.data.codecs.text import Tokenizer
from triform.data.sources import LABEL, TEXT, Column, Reading, Source
from triform.runtime import paths
from triform.runtime.errors import DataError

LAYOUT = "v5"  # of the arrays; another one makes other cache entries
DAY = 86_400  # seconds
# Names that nobody else gives: a cache may lie among other people's folders.
STAGED, PARTS = "triform-part-", "triform-parts-"


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
    """A source, with the folders that a config names and what it reads of files."""
    columns = tuple(
        Column(
            f.field,
            f.name,
            TEXT if f.is_text else LABEL,
            divided=f.divide is each,
            many=f.divide is not single,
        )
        for f in config.features()
        if f.source == source
    )
    columns += config.columns()
    cache = os.path.join(cache_root(config), "files")
    reading = Reading(columns, config.txt_example, config.held_out, cache)
    found = sources.source(source, config.data_dir, config.manual_dir, reading)
    return config.opened(source, found, cache)


def location(config: Any, source: str) -> str:
    """Where the examples of a source are, for the eye; '' if still to be prepared."""
    found = origin(config, source)
    # A source of a plugin need not say it.
    return found.location() if hasattr(found, "location") else "from a plugin"


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
        where = f"data.{feature.field}: feature {feature.name!r} of {feature.source!r}"
        if not isinstance(value, str):
            raise DataError(f"{where} is no text ({value!r:.40}); name a text feature")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where} holds half of a character (U+"
                    f"{ord(value[error.start]):04X}, a lone surrogate); correct it"
                ) from error
        if "\0" in value:
            raise DataError(f"{where} holds the character NUL (U+0000); remove it")
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


def read(
    config: Any, split: str, features: Sequence[Feature], what: str
) -> Iterator[list[list]]:
    """Of every example of one source a list of texts or values a feature, in order.

    `what` names the work for the eye. DataError names the example, and its file and
    line if it has them.
    """
    source = features[0].source
    readers = [reader(config, feature) for feature in features]
    raw = examples(config, source, split)
    with progress.Bar(what, len(raw)) as bar:
        for number, example in enumerate(raw):
            try:
                found = [one(example) for one in readers]
            except DataError as error:
                where = place(config, source, split, number)
                raise DataError(f"{where}: {error}") from error
            yield found
            bar.update()


def place(config: Any, source: str, split: str, item: int) -> str:
    """'multi30k_translate train, example 7', or 'a.csv, line 9 (train, example 7)'."""
    where = origin(config, source).where(split, item)
    name = f"{split}, example {item}"
    return f"{where} ({name})" if where else f"{source} {name}"


def open_store(
    config: Any, split: str, tok: Tokenizer, features: Sequence[Feature]
) -> TokenStore:
    """The features, all of one source, from the cache or computed into it."""
    keys = [tok.digest(), *(feature.key() for feature in features)]

    def write(path: str, parts: str) -> None:
        _write(config, split, tok, features, path, parts)

    path = cached(config, "tokens", features[0].source, split, keys, write)
    return TokenStore(path, features)


def cached(
    config: Any,
    kind: str,
    source: str,
    split: str,
    keys: Iterable[str],
    write: Callable[[str, str], None],
) -> str:
    """The folder that `write(folder, parts)` filled for this source, split and keys.

    What it writes into the folder `parts` is there again if it was interrupted, and
    goes away when it has finished.
    """
    content = origin(config, source).fingerprint(split)
    key = hashlib.sha256("\0".join([LAYOUT, content, *keys]).encode())
    final = os.path.join(cache_root(config), kind, key.hexdigest()[:32])
    if not os.path.isdir(final):
        os.makedirs(os.path.dirname(final), exist_ok=True)
        _sweep(os.path.dirname(final))
        folder, name = os.path.split(final)
        part = tempfile.mkdtemp(dir=folder, prefix=STAGED)
        parts = os.path.join(folder, f"{PARTS}{name}")
        os.makedirs(parts, exist_ok=True)
        try:
            write(part, parts)
            os.chmod(part, 0o755)  # mkdtemp's is for us alone; a cache may be shared
            os.rename(part, final)
        except OSError:
            # Another process may have been first: its arrays are the same.
            if not os.path.isdir(final):
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if os.path.isdir(final) or not os.listdir(parts):
                shutil.rmtree(parts, ignore_errors=True)
    return final


def cache_root(config: Any) -> str:
    """Where arrays are kept."""
    return paths.cache_root(config.cache_dir)


def _sweep(directory: str) -> None:
    """Removes what killed processes began: folders at once unused for a day, parts that
    may still be wanted for a week.
    """
    limits = {STAGED: DAY, PARTS: 7 * DAY}
    for entry in os.scandir(directory):
        limit = next((x for k, x in limits.items() if entry.name.startswith(k)), None)
        if limit is not None and time.time() - _last_use(entry.path) > limit:
            shutil.rmtree(entry.path, ignore_errors=True)


def _last_use(folder: str) -> float:
    """When the folder or a file in it was last written: some are written for days."""
    try:
        inside = [entry.stat().st_mtime for entry in os.scandir(folder)]
        return max([os.stat(folder).st_mtime, *inside])
    except OSError:
        return time.time()  # it is in use: another process just removed something


def _write(
    config: Any,
    split: str,
    tok: Tokenizer,
    features: Sequence[Feature],
    path: str,
    parts: str,
) -> None:
    """Streams: the texts of a corpus need not fit into memory, only their lengths."""
    columns = [encoding.Column(f.field, f.is_text, f.end) for f in features]
    found = read(config, split, features, f"tokenising {split}")
    written = encoding.write_parts(encoding.Texts(tok, columns), found, parts)
    for feature in features:
        target = os.path.join(path, feature.field)
        if feature.is_text:
            _join_texts(written, feature.field, target)
        else:
            _join_values(written, feature, target)


def _join_texts(parts: Sequence[str], field: str, target: str) -> None:
    """Writes what `Tokens` reads."""
    dtype = np.dtype(np.uint16)
    with open(f"{target}.tokens", "wb") as f:
        for ids in encoding.joined(parts, f"{field}/ids"):
            dtype = ids.dtype
            f.write(ids.data)  # `tofile` would not say why it fails
    sizes, first, counts = (
        list(encoding.joined(parts, f"{field}/{name}"))
        for name in ("sizes", "first", "counts")
    )
    np.savez(
        f"{target}.npz",
        offsets=sums(sizes),
        first=sums(first),
        counts=np.sum(counts, 0) if counts else np.zeros(2, np.int64),
        dtype=np.zeros(0, dtype),
    )


def _join_values(parts: Sequence[str], feature: Feature, target: str) -> None:
    """Writes the values of all examples as one array; DataError if they are neither
    numbers nor names.
    """
    found = list(encoding.joined(parts, f"{feature.field}/values"))
    for values in found:
        if values.ndim != 1 or values.dtype.kind not in "biufU":
            raise DataError(
                f"data.{feature.field}: feature {feature.name!r} of "
                f"{feature.source!r} holds neither numbers nor names "
                f"({values.flat[0]!s:.40}); name another"
            )
    values = np.concatenate(found) if found else np.zeros(0)
    first = sums(list(encoding.joined(parts, f"{feature.field}/first")))
    np.savez(f"{target}.npz", values=values, first=first)


def sums(parts: list[np.ndarray]) -> np.ndarray:
    """0 and the running sums of all numbers, int64."""
    return np.concatenate([[0], *parts]).cumsum(dtype=np.int64)
