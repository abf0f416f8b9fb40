"""What users chose, in order: rows that end with the item to predict.

Training packs several users into a row, of whom none sees another: most users have few
items, and rows of one user each would be padding. Positions count towards max_len, so
that the last item of a user has the last one, as in a row that is padded on the left.
"""

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.classes import Classes
from triform.data.datasets.base import DataConfig, Dataset, Epoch
from triform.data.datasets.requests import Item, Requests
from triform.data.sources import Source, histories
from triform.data.sources.histories import LEFT_OUT, SHORTEST, Histories
from triform.data.store import Feature, each
from triform.runtime.errors import DataError


@dataclasses.dataclass
class InteractionsConfig(DataConfig):
    """Item histories of users; every item is predicted from the earlier items.

    Splits are positions of one sequence: the last item of a user is for test, the one
    before for validation.
    """

    MASKED: ClassVar[bool] = False

    source: str = "sasrec_video"
    txt_example: str = "choice"  # choice: 'user item' or 'user item time' per line
    held_out: float = 0.0  # must stay 0: splits are positions in histories
    user: str = "user"  # user feature; '': an example is one user's whole history
    items: str = "item"  # item feature: one item, or a user's items in order
    time: str = ""  # feature that orders items; '': the order of the examples
    max_len: int = 50  # number of newest items of a history that are read
    batch_size: int = 16  # rows of max_len items per update; training packs users
    # Negatives drawn for each predicted training item, new in every epoch, from items
    # not in the user's training history; 0: none.
    negatives: int = 1
    # Evaluation: items drawn once per user, from those not in the training history.
    candidates: int = 100
    candidate_users: int = 10_000  # users scored with candidates; 0: all
    candidate_seed: int = 0  # seed of the draws of candidates and users

    def features(self) -> tuple[Feature, ...]:
        """What is read of the source."""
        names = {k: x for k, x in self.names().items() if x}
        return tuple(
            Feature(field, self.source, name, divide=list, is_text=False)
            for field, name in names.items()
        )

    def names(self) -> dict[str, str]:
        """Field -> feature."""
        return {"user": self.user, "items": self.items, "time": self.time}

    def opened(self, name: str, found: Source, cache: str) -> Source:
        """The users of a source, by position."""
        return Histories(name, found, self.names(), cache)

    def spec(self) -> Spec:
        """Items, those that follow, and what these are compared with."""
        item = Field("BL", below="num_items")
        spec = {
            "inputs": Field("BL", below="num_inputs", counts="segments"),
            "segments": Field("BL"),
            "positions": Field("BL"),
            "targets": item,
            "weights": Field("BL", "float32"),
            "candidates": Field("BN", below="num_items"),
            "candidate_weights": Field("B", "float32"),
        }
        if self.negatives:
            spec["negatives"] = Field("BLK", below="num_items")
        return spec

    def shapes(self) -> tuple[Shape, ...]:
        """One."""
        drawn = {"K": self.negatives} if self.negatives else {}
        return ({"L": self.max_len, "N": self.candidates, **drawn},)

    def classes(self) -> dict[str, str]:
        """The items."""
        return {"items": "num_items"}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        rule = "must be 0: users are divided by position, not held out"
        self.require(self.held_out == 0, "held_out", rule)
        self.require(self.items != "", "items", "name the feature of the items")
        self.require(self.max_len >= 2, "max_len", "must be at least 2")
        self.require(self.candidates >= 1, "candidates", "must be at least 1")
        for name in ("negatives", "candidate_users", "candidate_seed"):
            self.require(getattr(self, name) >= 0, name, "must be at least 0")


@dataclasses.dataclass
class MaskedInteractionsConfig(InteractionsConfig):
    """Histories of users of which masked items are predicted (Sun et al. 2019).

    Evaluation masks the last item, of which the others are the history.
    """

    MASKED: ClassVar[bool] = True

    negatives: int = 0  # negatives per predicted training item; 0: none
    mask_rate: float = 0.2  # share of a user's items that is masked, at least one
    # Share of training rows in which only the last item is masked, as in evaluation
    # (Sun et al. 2019, 3.6).
    last_rate: float = 0.1

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(0 < self.mask_rate < 1, "mask_rate", "must lie between 0 and 1")
        self.require(0 <= self.last_rate <= 1, "last_rate", "must lie in [0, 1]")


def outside(taken: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Items that are not in `taken` (distinct, ascending), for numbers `drawn` in [0,
    number of such items): the drawn-th of them.
    """
    return drawn + np.searchsorted(taken - np.arange(len(taken)), drawn, "right")


def packed(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Lengths in rows of `room`, each row filled with the longest that still fit.

    All of lengths int [N] in [1, room], each once.
    """
    left, rows = np.bincount(lengths, minlength=room + 1), []
    while left.any():
        row, free = [], room
        for length in range(int(left.nonzero()[0][-1]), 0, -1):
            count = min(int(left[length]), free // length)
            left[length] -= count
            free -= count * length
            row += [length] * count
        rows.append(row)
    return rows


class Recommendations(Requests):
    """Histories: items as a text with spaces between, or as a list, the newest last."""

    columns, gives = ("items",), ("items",)

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """A history of the first items of the run whose names have no spaces."""
        known = classes["items"].names if "items" in classes else ("ITEM", "ITEM")
        found = itertools.islice((x for x in known if len(x.split()) == 1), 2)
        return f"--input={shlex.quote(' '.join(found))}"

    def owner(self, request: Any) -> str | None:
        """The user of a row that holds one, as rows of training do."""
        name = self.config.user
        if isinstance(request, Mapping) and name and name in request:
            return str(request[name])
        return None

    def united(self, parts: Sequence[Any]) -> Any:
        """All items of a user, in the order of their times."""
        user, items = self.config.user, self.config.items
        if not all(items in part for part in parts):
            return parts[0]
        found = histories.in_order(parts, items, self.config.time)
        return {user: parts[0][user], items: found}

    def read(self, request: Any) -> Item:
        """The ids of the items that the run knows."""
        if isinstance(request, list | tuple):
            request = {"items": request}
        (value,), notes = self.values(request)
        words = value.split() if isinstance(value, str) else [*map(str, each(value))]
        ids = self.codecs["items"].exact(words)
        if (ids < 0).any():
            unknown = [word for word, i in zip(words, ids, strict=True) if i < 0]
            notes.append(
                f"unknown: {len(unknown)} of {len(words)} items left out, which the "
                f"run has never seen, the first {unknown[0]!r:.40}"
            )
        return Item([ids[ids >= 0]], " ".join(words), notes)

    def size(self, item: Item) -> int:
        """There is one shape."""
        return 0

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """The newest items."""
        (ids,) = item.parts
        return write_history(batch, row, ids, mask_of(self.config, self.sizes))

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The best items that are not in the history, best first."""
        seen, found = set(item.parts[0].tolist()), {}
        names = self.codecs["items"].names
        for i, share in zip(row["candidates"].tolist(), row["shares"], strict=True):
            if i not in seen and len(found) < self.most:
                found[names[i]] = float(share)
        return {"items": found}


def mask_of(config: InteractionsConfig, sizes: Sizes) -> int:
    """The id of a masked item; -1: there is none."""
    return sizes["num_items"] if config.MASKED else -1


def write_history(batch: Batch, row: int, ids: np.ndarray, mask: int) -> int:
    """Items on the right of a row, what is to be predicted at its end; how many are
    left out.
    """
    length = batch["inputs"].shape[1]
    ids = np.append(ids, mask) if mask >= 0 else ids
    kept = ids[-length:]
    batch["inputs"][row, length - len(kept) :] = kept
    batch["segments"][row, length - len(kept) :] = 1
    batch["positions"][row] = np.arange(length)
    return len(ids) - len(kept)


class Interactions(Dataset):
    """Row of training: several users, whose items but the first are targets.

    Row of evaluation: a user, whose last item in the split is the target.
    """

    unit, requests = "items", Recommendations
    least = 1  # item of a user before the first that is predicted

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        source: Any = store.origin(config, config.source)
        log, codec = source.log, codecs["items"]
        self.users, self.split_name = source.numbers(split), source.base(split)
        known = codec.exact(log.items.tolist())
        if (known < 0).any():
            name = log.items[known < 0][0]
            raise DataError(
                f"{self.title()}: {(known < 0).sum():,} of its {len(known):,} items "
                f"are none of the {codec.size:,} of the run, such as {name!r}; leave "
                "them out, or train a new run"
            )
        self._ids, self._starts = known[log.ids], log.starts[self.users]
        self._stops = source.stops(split)[self.users]
        self._ends = log.starts[self.users + 1]  # of all splits
        self._names = log.users[self.users]
        self.digest = f"{source.fingerprint(split)}-{codec.digest()[:16]}"
        self.sizes, self.empty = {}, np.zeros(len(self.users), bool)
        self._packing = functools.lru_cache(2)(self._packing)

    def history(self, item: int) -> np.ndarray:
        """The items of a user up to the end of the split, int32."""
        return self._ids[self._starts[item] : self._stops[item]]

    def trained(self, item: int) -> np.ndarray:
        """Distinct items of a user, ascending, that training knows, and none of those
        that are predicted.
        """
        start, stop, end = (x[item] for x in (self._starts, self._stops, self._ends))
        if self.split_name != "train":
            # Of both other splits the same: all but the last two.
            stop = end - 2 if end - start >= SHORTEST else stop
        else:
            stop -= 1
        return np.unique(self._ids[start:stop])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Positions that a user takes in a training row."""
        counts = self._stops - self._starts - self.least
        return np.minimum(counts, self.config.max_len)

    @functools.cached_property
    def rows(self) -> list[list[int]]:
        """The lengths of the users in every row of training: the same in all epochs."""
        return packed(self.lengths, self.config.max_len)

    def order(
        self, items: np.ndarray, epoch: Epoch, rng: np.random.Generator
    ) -> np.ndarray:
        """The rows."""
        return rng.permutation(len(self.rows))

    def _packing(self, epoch: Epoch) -> list[np.ndarray]:
        """The users of every row: random ones of these lengths, all of them once."""
        slots = np.array([length for row in self.rows for length in row])
        rng = epoch.rng(len(self))
        users = np.empty(len(slots), np.int64)
        for length in np.unique(slots):
            users[slots == length] = rng.permutation(
                np.flatnonzero(self.lengths == length)
            )
        return np.split(users, np.cumsum([len(row) for row in self.rows])[:-1])

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """A row of users in training, else the user of that number."""
        if not epoch.train:
            self._write_last(batch, row, item, epoch)
            return
        at, length = 0, batch["inputs"].shape[1]
        for number, user in enumerate(self._packing(epoch)[item].tolist(), 1):
            n = int(self.lengths[user])
            part = row, slice(at, at + n)
            batch["segments"][part] = number
            batch["positions"][part] = np.arange(length - n, length)
            self._write_user(batch, part, user, epoch.rng(user))
            at += n

    def _write_user(
        self, batch: Batch, part: tuple, user: int, rng: np.random.Generator
    ) -> None:
        """Items and those that follow them, and what these are compared with."""
        ids, n = self.history(user), part[1].stop - part[1].start
        batch["inputs"][part], batch["targets"][part] = ids[-n - 1 : -1], ids[-n:]
        batch["weights"][part] = 1
        if self.config.negatives:
            # What training knows: of this split all.
            shape = n, self.config.negatives
            batch["negatives"][part] = self._draw(np.unique(ids), shape, rng, user)

    def _write_last(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        config, ids = self.config, self.history(item)
        write_history(batch, row, ids[:-1], mask_of(config, self.model_sizes))
        batch["targets"][row, -1], batch["weights"][row, -1] = ids[-1], 1
        taken = self.trained(item)
        if config.negatives:
            shape = (config.negatives,)
            draw = self._draw(taken, shape, epoch.rng(item), item)
            batch["negatives"][row, -1] = draw
        rng = np.random.default_rng(self._seeds(int(self.users[item]) + 1))
        batch["candidates"][row] = self._draw(taken, (config.candidates,), rng, item)
        batch["candidate_weights"][row] = self._drawn[item]

    def _seeds(self, *more: int) -> list[int]:
        # Validation and test draw for themselves.
        return [self.config.candidate_seed, LEFT_OUT[self.split_name], *more]

    @functools.cached_property
    def _drawn(self) -> np.ndarray:
        """Which users are ranked among candidates, float32."""
        most = self.config.candidate_users
        found = np.ones(len(self), np.float32)
        if most and most < len(self):
            rng = np.random.default_rng(self._seeds())
            found[rng.permutation(len(self))[most:]] = 0
        return found

    def _draw(
        self, taken: np.ndarray, shape: tuple, rng: np.random.Generator, item: int
    ) -> np.ndarray:
        """Uniform among all items but `taken`."""
        others = self.model_sizes["num_items"] - len(taken)
        if others < 1:
            raise DataError(
                f"{self.describe(item)}: has all {len(taken)} items, and none is left "
                "to draw as a negative; remove the user"
            )
        return outside(taken, rng.integers(others, size=shape))

    def describe(self, item: int) -> str:
        """'sasrec_video test, user 17'."""
        return f"{self.title()}, user {self._names[item]}"

    def preview(self, batch: Batch) -> str:
        """The first user of the first row."""
        first = batch["segments"][0] == batch["segments"][0].max(initial=0)
        first &= batch["segments"][0] > 0
        lines = [f"  {'users in the row':17}{int(batch['segments'][0].max())}"]
        for name in ("inputs", "targets"):
            ids = batch[name][0][first].tolist()
            names = self.codecs["items"].names
            shown = (names[i] if i < len(names) else "[MASK]" for i in ids)
            lines.append(f"  {name:17}{' '.join(shown):.300}")
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """How full rows are, and how many histories are shortened."""
        counts = self._stops - self._starts
        fill = self.lengths.sum() / (len(self.rows) * self.config.max_len)
        lines = [
            f"{len(self):,} users in rows of {self.config.max_len}, {fill:.1%} full"
        ]
        longer = counts - self.least > self.config.max_len
        if longer.any():
            lines.append(
                f"{int(longer.sum()):,} users have more items; their newest are read"
            )
        return lines

    def input_text(self, item: int) -> str:
        """The history."""
        return " ".join(self.codecs["items"].decode(self.history(item)[:-1]))


class MaskedInteractions(Interactions):
    """Row of training: several users, of whose items some are masked.

    Row of evaluation: a user, whose last item in the split is masked.
    """

    least = 0

    def _write_user(
        self, batch: Batch, part: tuple, user: int, rng: np.random.Generator
    ) -> None:
        """All items, those that are masked with a weight."""
        config, n = self.config, part[1].stop - part[1].start
        ids = self.history(user)[-n:]
        count = max(1, round(n * config.mask_rate))
        chosen = np.zeros(n, bool)
        if rng.random() < config.last_rate:
            chosen[-1] = True
        else:
            chosen[rng.permutation(n)[:count]] = True
        mask = mask_of(config, self.model_sizes)
        batch["inputs"][part] = np.where(chosen, mask, ids)
        batch["targets"][part] = np.where(chosen, ids, 0)
        batch["weights"][part] = chosen
        if config.negatives:
            taken = np.unique(self.history(user))
            shape = n, config.negatives
            batch["negatives"][part] = self._draw(taken, shape, rng, user)
