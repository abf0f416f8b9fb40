"""Histories: what each user chose, in order, out of any source of choices.

An example of the source is one choice (a user, an item, perhaps a time), or a user with
all items in order. Here an example is a user. The splits are positions of one sequence
(leave one out): `test` is all of it, its last item what is to be predicted;
`validation` ends one item earlier, `train` two.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform.data import progress
from triform.data.sources.base import Source
from triform.data.sources.division import ALL, Divided
from triform.runtime import files
from triform.runtime.errors import DataError

VERSION = "1"  # of the arrays; another one makes other files
# Split -> items that are left out at the end. Of a sequence that is too short for all
# three, everything is for training.
LEFT_OUT = {"train": 2, "validation": 1, "test": 0}
SHORTEST = 3  # items of a user with a validation and a test item


@dataclasses.dataclass
class Log:
    """All choices. User u chose items[i] for i in ids[starts[u]:starts[u + 1]]."""

    users: np.ndarray  # names [users], by first appearance
    items: np.ndarray  # names [items]: numbers ascending, else by their characters
    starts: np.ndarray  # int64 [users + 1]
    ids: np.ndarray  # int32 [choices]
    # [choices], numbers as they are, dates as seconds since 1970; empty without such.
    times: np.ndarray

    def lengths(self) -> np.ndarray:
        """Choices of every user."""
        return np.diff(self.starts)

    def save(self, path: str) -> None:
        """Writes it; a reader sees all or nothing."""
        with files.replacing(path, binary=True) as f:
            np.savez(f, **vars(self))

    @classmethod
    def load(cls, path: str) -> "Log | None":
        """What `save` wrote; None if it is not there or damaged."""
        try:
            with np.load(path) as found:
                return cls(**{name: found[name] for name in found.files})
        except (OSError, ValueError, KeyError, EOFError, TypeError):
            return None


class Users(Sequence):
    """The examples of a split: {user: name, items: [names]}, and times if there are."""

    def __init__(self, source: "Histories", split: str):
        self._source, self._users = source, source.numbers(split)
        self._stops = source.stops(split)

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, item: int) -> dict[str, Any]:
        log, names = self._source.log, self._source.names
        user = self._users[item]
        part = slice(log.starts[user], self._stops[user])
        found = {names["items"]: log.items[log.ids[part]].tolist()}
        if names["user"]:
            found[names["user"]] = str(log.users[user])
        if names["time"]:
            found[names["time"]] = log.times[part].tolist()
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[item] for item in range(len(self)))


class Histories(Divided):
    """The users of a source.

    `names` are those of the features user, items and time; user='': every example is
    one; time='': choices are in the order of the examples.
    """

    noun = "users"

    def __init__(
        self, name: str, found: Source, names: Mapping[str, str], cache: str = ""
    ):
        self.name, self.found, self.names, self._cache = name, found, names, cache

    @functools.cached_property
    def log(self) -> Log:
        """All choices, read once for every content."""
        whole = self._whole()
        facts = VERSION, self.found.fingerprint(whole), sorted(self.names.items())
        name = f"choices-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npz"
        path = os.path.join(self._cache, name) if self._cache else ""
        log = Log.load(path) if path else None
        if log is None:
            log = self._read(whole)
            if path:
                os.makedirs(self._cache, exist_ok=True)
                log.save(path)
        return log

    @functools.cached_property
    def members(self) -> dict[str, np.ndarray]:
        """Split -> users whose part of it has an item before the last one."""
        found = {}
        for split in LEFT_OUT:
            counts = self.stops(split) - self.log.starts[:-1]
            enough = counts >= 2
            if split != "train":
                enough &= self.log.lengths() >= SHORTEST
            found[split] = np.flatnonzero(enough)
        return found

    def splits(self) -> tuple[str, ...]:
        """Those of the positions."""
        return tuple(LEFT_OUT)

    def stops(self, split: str) -> np.ndarray:
        """Of every user where the items of a split end, int64 [users]."""
        left_out = np.where(
            self.log.lengths() < SHORTEST, 0, LEFT_OUT[self.base(split)]
        )
        return self.log.starts[1:] - left_out

    def base(self, split: str) -> str:
        """'train' of 'train[:100]'; DataError for a sum of splits."""
        name = split.partition("[")[0].strip()
        if "+" in split or name not in LEFT_OUT:
            raise DataError(
                f"{self.name}: split {split!r}: expected one of {', '.join(LEFT_OUT)}, "
                "or a slice such as train[:90%]; they are positions of one sequence "
                "and have no sum"
            )
        return name

    def numbers(self, split: str) -> np.ndarray:
        """The users of a split or of a slice of one."""
        self.base(split)
        return super().numbers(split)

    def examples(self, split: str) -> Users:
        """The users of a split, with their items up to its end."""
        return Users(self, split)

    def column(self, split: str, feature: str) -> list:
        """The values of one feature."""
        return [example[feature] for example in self.examples(split)]

    def classes(self, feature: str) -> tuple[str, ...]:
        """The names of all items."""
        return tuple(self.log.items.tolist()) if feature == self.names["items"] else ()

    def fingerprint(self, split: str) -> str:
        """That of the source, the features and the split."""
        facts = self.found.fingerprint(self._whole()), sorted(self.names.items()), split
        return f"users-{hashlib.sha256(repr((VERSION, *facts)).encode()).hexdigest()}"

    def location(self) -> str:
        """That of the source."""
        return self.found.location()

    def where(self, split: str, item: int) -> str:
        """'a.csv, user 17'."""
        user = self.log.users[self.numbers(split)[item]]
        return f"{self.found.location() or self.name}, user {user}"

    def report(self, split: str) -> list[str]:
        """Counts, and how choices are ordered."""
        log, counts = self.log, self.log.lengths()
        order = f"data.time={self.names['time']!r}" if self.names["time"] else "rows"
        lines = [
            f"{len(log.users):,} users, {len(log.items):,} items, {len(log.ids):,} "
            f"choices in the order of {order}"
        ]
        if short := int((counts < SHORTEST).sum()):
            lines.append(
                f"{short:,} users with fewer than {SHORTEST} items are trained on only"
            )
        return lines

    def _whole(self) -> str:
        """The split of the source that holds everything; DataError if none does."""
        splits = self.found.splits()
        if not set(splits) - {"train", ALL}:
            return "train"
        if ALL in splits and self.names["time"]:
            return ALL  # files by split: times put a user's choices in order again
        raise DataError(
            f"{self.name}: has the splits {', '.join(splits)}, and users are divided "
            "by position here: put all choices into one split or file, or set data.time"
        )

    def _read(self, split: str) -> Log:
        users: dict[str, int] = {}
        items: dict[str, int] = {}
        owners, ids, times = [], [], []
        examples, names = self.found.examples(split), self.names
        what = f"reading users of {self.name}"
        counted = progress.counted(examples, what, len(examples))
        for number, example in enumerate(counted):
            self._check(example)
            chosen = _listed(example[names["items"]])
            name = str(example[names["user"]]) if names["user"] else str(len(users) + 1)
            owner = users.setdefault(name, len(users))
            owners += [owner] * len(chosen)
            ids += [items.setdefault(str(x), len(items)) for x in chosen]
            if names["time"]:
                given = _listed(example[names["time"]])
                if len(given) != len(chosen):
                    raise DataError(
                        f"{self.found.where(split, number)}: {len(given):,} values in "
                        f"data.time={names['time']!r} for {len(chosen):,} items; give "
                        "every item its time"
                    )
                times += given
        if not ids:
            raise DataError(f"{self.name}: holds no choices; put data there")
        when = _moments(times, f"{self.name}: data.time={names['time']!r}")
        return _ordered(list(users), list(items), owners, ids, when)

    def _check(self, example: Mapping[str, Any]) -> None:
        for key, name in self.names.items():
            if name and name not in example:
                raise DataError(
                    f"data.{key}={name!r}: {self.name} has no such feature; expected "
                    f"one of {', '.join(sorted(example))}"
                )


def _listed(value: Any) -> list:
    """The values of a sequence, or the only one."""
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def in_order(rows: Sequence[Mapping[str, Any]], items: str, time: str) -> list:
    """The items of rows, in the order of their times where all have one, as in a log.

    Cells may spell numbers. DataError for what is no time.
    """
    chosen = [x for row in rows for x in _listed(row[items])]
    if not time or not all(time in row for row in rows):
        return chosen
    times = [x for row in rows for x in _listed(row[time])]
    with contextlib.suppress(ValueError):
        times = [*map(float, times)]
    if len(times) != len(chosen):
        raise DataError(
            f"{len(times):,} values in data.time={time!r} for {len(chosen):,} items; "
            "give every item its time"
        )
    when = _moments(times, f"data.time={time!r}")
    return [chosen[i] for i in np.argsort(when, kind="stable")]


def _moments(values: list, field: str) -> np.ndarray:
    """Numbers as they are, texts as the seconds since 1970 of an ISO 8601 date, without
    a zone UTC; DataError for what has no order in time.
    """
    found = np.asarray(values)
    if found.dtype.kind in "iuf":
        if not np.isfinite(found).all():
            bad = found[~np.isfinite(found)][0]
            raise DataError(f"{field}: {bad} is no time; give the row one or remove it")
        return found
    seconds = np.empty(len(values))
    for i, value in enumerate(map(str, values)):
        try:
            moment = datetime.datetime.fromisoformat(value.strip())
        except ValueError as error:
            raise DataError(
                f"{field}: {value!r:.40} is neither a number nor a date such as "
                "2020-12-31 or 2020-12-31 23:59:59; write all times so"
            ) from error
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        seconds[i] = moment.timestamp()
    return seconds


def _ordered(
    users: list[str],
    items: list[str],
    owners: list[int],
    ids: list[int],
    when: np.ndarray,
) -> Log:
    """Choices by user and time, and items by name."""
    order = sorted(range(len(items)), key=items.__getitem__)
    if all(map(str.isdecimal, items)):  # 9 before 10
        order.sort(key=lambda i: int(items[i]))
    rank = np.empty(len(items), np.int32)
    rank[order] = np.arange(len(items), dtype=np.int32)
    owners = np.asarray(owners)
    # Stable: choices of one time stay as they are.
    at = np.lexsort((when, owners)) if len(when) else np.argsort(owners, kind="stable")
    return Log(
        np.array(users),
        np.array(items)[order],
        np.searchsorted(owners[at], np.arange(len(users) + 1)),
        rank[np.asarray(ids)][at],
        when[at] if len(when) else when,
    )
