"""What all kinds of data share: their configs, and what a dataset must do."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from triform.data.codecs.text import Tokenizer, TokenizerConfig
from triform.data.store import Feature

Batch = Mapping[str, np.ndarray]
Limits = Mapping[str, int]  # how many ids a key of a batch may hold
# What a batch may hold of tokens, and what says which places are real.
REAL = {"encoder_inputs": "encoder_segments", "inputs": "segments"}


@dataclasses.dataclass
class DataConfig:
    """Where examples come from, and how many make a batch."""

    source: str = "cldr"  # embedded, our own, or a public TFDS name
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str = "test"
    batch_size: int = 32
    data_dir: str = ""  # prepared TFDS data; empty: the TFDS default
    manual_dir: str = ""  # files of a corpus that is not to be downloaded
    cache_dir: str = ""  # prepared arrays; empty: $TRIFORM_CACHE or ~/.cache/triform
    prefetch: int = 2  # batches prepared ahead of the device

    def lengths(self) -> tuple[int, ...]:
        """All row lengths, ascending: what steps are compiled for. 0: no such axis."""
        return (0,)

    def rows(self, length: int) -> int:
        """Rows of a batch whose rows have `length` places."""
        return self.batch_size

    def require(self, holds: bool, name: str, rule: str) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if not holds:
            raise ValueError(f"data.{name}={getattr(self, name)!r}: {rule}")

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")
        self.require(self.prefetch >= 1, "prefetch", "must be at least 1")


@dataclasses.dataclass
class TextConfig(DataConfig):
    """Rows of tokens. Lengths include the tokens that a dataset adds."""

    SPECIALS: ClassVar[tuple[str, ...]] = ()  # of a tokenizer trained for it

    max_len: int = 64  # longer items are left out of training, cut in evaluation
    # Rows of max_len a batch; shorter buckets hold more rows, of as many tokens in all.
    batch_size: int = 32
    buckets: tuple[int, ...] = ()  # row lengths below max_len, ascending
    drop_empty: bool = False  # leave out items with an empty text instead of stopping
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    def lengths(self) -> tuple[int, ...]:
        """All row lengths, ascending."""
        return (*self.buckets, self.max_len)

    def rows(self, length: int) -> int:
        """Rows of a batch whose rows have `length` tokens."""
        return self.batch_size * self.max_len // length

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        raise NotImplementedError

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(self.max_len >= 2, "max_len", "must be at least 2")
        lengths = self.lengths()
        whole = all(isinstance(n, int) for n in lengths)
        self.require(whole, "buckets", "must be a tuple of row lengths")
        self.require(
            sorted(set(lengths)) == list(lengths) and lengths[0] >= 2,
            "buckets",
            f"must ascend from at least 2 to below max_len={self.max_len}",
        )
        self.tokenizer.validate()


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over a split: whatever is random is a function of this and the item."""

    seed: int
    number: int
    train: bool

    def rng(self, *index: int) -> np.random.Generator:
        """The generator of one item, or whatever `index` numbers."""
        # From 1 on: NumPy takes [seed, epoch] and [seed, epoch, 0] for the same.
        return np.random.default_rng([self.seed, self.number, *(i + 1 for i in index)])


EVALUATION = Epoch(seed=0, number=0, train=False)


class Dataset:
    """The items of one split, and how one becomes a row of a batch.

    A kind of data is a subclass: it sets `sizes` and `digest` when it is made, and says
    what `empty` and `write` do. Everything else has a default.
    """

    unit = "tokens"  # what `real` counts
    cut = False  # longer items are shortened in training too, not left out
    metrics: tuple[str, ...] = ()  # what `scalars` gives
    sizes: np.ndarray  # int64 [N]: places that an item needs; -1: one without text
    digest: str  # equal ones mean equal items

    def __init__(self, config: Any, split: str, tok: Tokenizer | None, limits: Limits):
        self.config, self.split, self.tok, self.limits = config, split, tok, limits

    @staticmethod
    def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
        """Every key of a batch, zero: weights and segments 0 mean that nothing is."""
        raise NotImplementedError

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Writes an item into a row of zeros, cut to the row."""
        raise NotImplementedError

    def order(
        self, items: np.ndarray, epoch: Epoch, rng: np.random.Generator
    ) -> np.ndarray:
        """What an epoch visits of `items`, all of one row length, in random order.

        As many in every epoch.
        """
        return rng.permutation(items)

    def title(self) -> str:
        """'multi30k_translate train'."""
        return f"{self.config.source} {self.split}"

    def describe(self, item: int) -> str:
        """'multi30k_translate train, example 7'."""
        return f"{self.title()}, example {item}"

    def real(self, batch: Batch) -> int:
        """How many of the batch's units are no padding."""
        keys = [k for k in REAL.values() if k in batch]
        if "segments" not in batch:
            keys.append("weights")
        return int(sum((batch[k] > 0).sum() for k in keys))

    def preview(self, batch: Batch, tok: Tokenizer | None) -> str:
        """The first row for the eye, some lines."""
        lines = []
        for key in (*REAL, "targets"):
            if key in batch:
                text = tok.show(_unpadded(batch, key)).replace("\n", "\\n")
                lines.append(f"  {key:17}{text:.300}")
        if "weights" in batch:
            pairs = zip(batch["targets"][0], batch["weights"][0], strict=True)
            shown = " ".join(f"{t}:{w:g}" for t, w in itertools.islice(pairs, 16))
            lines.append(f"  {'target:weight':17}{shown} ...")
        return "\n".join(lines)

    def scalars(self, total: float) -> dict[str, float]:
        """Further metrics of the summed nats of all targets of the split."""
        return {}

    def text(self, item: int) -> tuple[str, str] | None:
        """(source, reference), if what a model generates is scored against one."""
        return None

    def group(self, item: int) -> tuple[str, int]:
        """The part of a mixture that an item is from, and its number in it."""
        return "", item


def _unpadded(batch: Batch, key: str) -> np.ndarray:
    ids = batch[key][0]
    real = batch.get(REAL.get(key, "weights"), batch.get("weights"))
    if real is None or real.shape[1:] != ids.shape:
        return ids
    return ids[: np.flatnonzero(real[0])[-1] + 1]
