"""English to German phrases generated from locale data: nothing to download.

Dates, times, numbers, money, units, names and lists of them, as Unicode's CLDR writes
them (through Babel), and numbers in words (through num2words). The English determines
the German, so a model that has learnt the formats can be right every time; held-out
phrases are new combinations of words that occur in training.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from triform.data.sources import cldr_phrases
from triform.data.sources.cldr_phrases import Draw, Pair
from triform.runtime import files

VERSION = "1"
SPLITS = ("train", "validation", "test")
# One phrase in HOLD_OUT goes to validation and one to test.
HOLD_OUT = 60
MAX_CHARS = 110

# Kind -> (how many distinct phrases to draw, generator of one pair).
KINDS: dict[str, tuple[int, Callable[[Draw], Pair]]] = {
    "date": (6500, cldr_phrases.date),
    "month": (1500, cldr_phrases.month),
    "time": (3500, cldr_phrases.time),
    "date_time": (4500, cldr_phrases.date_time),
    "words": (6500, cldr_phrases.words),
    "decimal": (5000, cldr_phrases.decimal),
    "money": (5000, cldr_phrases.money),
    "percent": (2500, cldr_phrases.percent),
    "unit": (4500, cldr_phrases.unit),
    "quantities": (5000, cldr_phrases.quantities),
    "duration": (5000, cldr_phrases.duration),
    "compact": (2500, cldr_phrases.compact),
    "territories": (6000, cldr_phrases.territories),
    "languages": (4500, cldr_phrases.languages),
    "mixed": (5000, cldr_phrases.mixed),
}


class Phrases(Sequence):
    """Example dicts {'en', 'de'} made on access, so no caller can spoil another's."""

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, str]:
        english, german = self._pairs[index]
        return {"en": english, "de": german}


def examples(split: str, cache: str = "") -> Phrases:
    """The pairs of 'train', 'validation' or 'test' (about 62,000, 1,000 and 1,000).

    The order mixes the kinds and is the same on every machine. The first call
    generates all splits, some seconds, and keeps them in the folder `cache`.
    """
    return _corpus(cache)[split]


def version() -> str:
    """Identifies the content: this generator and the libraries that bring the words."""
    libraries = (f"{n}-{importlib.metadata.version(n)}" for n in ("babel", "num2words"))
    return "-".join((f"cldr-{VERSION}", *libraries))


def masked(text: str) -> list[str]:
    """Whitespace tokens with every digit as 0: what must be seen in training."""
    return re.sub(r"\d", "0", text).split()


@functools.cache
def _corpus(cache: str = "") -> dict[str, Phrases]:
    path = os.path.join(cache, f"{version()}-{_code()}.json") if cache else ""
    found = _kept(path)
    if found is None:
        found = _generated()
        if path:
            with contextlib.suppress(OSError):  # it is generated anew
                _keep(path, found)
    return {split: Phrases(tuple(map(tuple, pairs))) for split, pairs in found.items()}


def _kept(path: str) -> dict[str, list] | None:
    """What `_keep` wrote, None if it is not there as it was written."""
    try:
        with open(path, "rb") as f:
            digest, _, text = f.read().partition(b"\n")
    except OSError:
        return None
    intact = digest.decode(errors="replace") == hashlib.sha256(text).hexdigest()
    return json.loads(text) if intact else None


def _keep(path: str, found: dict[str, list[Pair]]) -> None:
    text = json.dumps(found, ensure_ascii=False).encode()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with files.replacing(path, binary=True) as f:
        f.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def _code() -> str:
    """Changes with the generator's source."""
    text = b"".join(
        pathlib.Path(module).read_bytes()
        for module in (__file__, cldr_phrases.__file__)
    )
    return hashlib.sha256(text).hexdigest()[:16]


def _generated() -> dict[str, list[Pair]]:
    parts: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    # By a hash of the English: mixes the kinds, and no phrase changes its split when
    # another is added.
    for digest, pair in sorted((_digest(p[0]), p) for p in _unambiguous(_drawn())):
        split = {0: "validation", 1: "test"}.get(digest % HOLD_OUT, "train")
        parts[split].append(pair)
    seen = [{t for pair in parts["train"] for t in masked(pair[i])} for i in (0, 1)]
    for split in SPLITS[1:]:
        parts[split] = [pair for pair in parts[split] if _known(pair, seen)]
    return parts


def _known(pair: Pair, seen: list[set[str]]) -> bool:
    """Whether every token of a pair, digits aside, occurs in training.

    A German number in words is one long compound: new by design, made of known parts.
    """
    english, german = pair
    return seen[0].issuperset(masked(english)) and (
        cldr_phrases.is_compound(german) or seen[1].issuperset(masked(german))
    )


def _drawn() -> Iterator[Pair]:
    for kind, (quota, phrase) in KINDS.items():
        draw = Draw(f"cldr {VERSION} {kind}")
        drawn: set[Pair] = set()
        # Small kinds run out of new phrases before the quota: hence the bound.
        for _ in range(4 * quota):
            pair = phrase(draw)
            if pair not in drawn and max(map(len, pair)) <= MAX_CHARS:
                drawn.add(pair)
                yield pair
            if len(drawn) == quota:
                break


def _unambiguous(pairs: Iterator[Pair]) -> list[Pair]:
    """Distinct pairs whose English occurs with one German only."""
    distinct = set(pairs)
    germans = Counter(english for english, _ in distinct)
    return [pair for pair in distinct if germans[pair[0]] == 1]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
