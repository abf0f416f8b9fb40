"""Parallel text: one sequence is read, another is predicted."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from triform.data import store
from triform.data.codecs.text import Tokenizer
from triform.data.datasets.base import Batch, Dataset, Epoch, Limits, TextConfig
from triform.data.store import Feature


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Seq2Seq of one source."""

    source: str
    inputs: str  # the feature that is read
    targets: str  # the feature that is predicted
    prefix: str = ""  # put before every input: 'translate English to German: '

    def features(self) -> tuple[Feature, ...]:
        """Both sides, as they are tokenised."""
        return (
            Feature("inputs", self.source, self.inputs, self.prefix),
            Feature("targets", self.source, self.targets),
        )


@dataclasses.dataclass
class Seq2SeqConfig(TextConfig):
    """Seq2Seq of one corpus."""

    inputs: str = "en"  # the feature that is read
    targets: str = "de"  # the feature that is predicted

    def parts(self) -> tuple[Corpus, ...]:
        """The corpora."""
        return (Corpus(self.source, self.inputs, self.targets),)

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return tuple(f for corpus in self.parts() for f in corpus.features())


@dataclasses.dataclass
class MixtureConfig(TextConfig):
    """Seq2Seq of several corpora, each with a share of the rows.

    Raffel et al. 2020, 3.5.2: shares are as min(size, limit) ** (1 / temperature), or
    as weights ** (1 / temperature).
    """

    source: str = ""
    corpora: tuple[Corpus, ...] = ()
    weights: tuple[float, ...] = ()  # one a corpus; empty: by size
    limit: int = 0  # a corpus counts as having so many examples at most; 0: no limit
    temperature: float = 1.0  # higher: more equal shares

    def __post_init__(self) -> None:
        # From JSON they come as dictionaries.
        self.corpora = tuple(
            x if isinstance(x, Corpus) else Corpus(**x) for x in self.corpora
        )

    def parts(self) -> tuple[Corpus, ...]:
        """The corpora."""
        return self.corpora

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return tuple(f for corpus in self.parts() for f in corpus.features())

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(
            not self.source, "source", "must be empty; a mixture's are in data.corpora"
        )
        self.require(len(self.corpora) > 0, "corpora", "must name at least one corpus")
        self.require(
            not self.weights
            or (len(self.weights) == len(self.corpora) and min(self.weights) > 0),
            "weights",
            f"must be empty or {len(self.corpora)} positive numbers, one a corpus",
        )
        self.require(self.limit >= 0, "limit", "must be at least 0; 0: no limit")
        self.require(
            not (self.limit and self.weights),
            "limit",
            "bounds sizes, which data.weights replace; set one of them only",
        )
        self.require(self.temperature > 0, "temperature", "must be positive")


class Seq2Seq(Dataset):
    """Row: the source and EOS; the target and EOS, and the same shifted right.

    Items are numbered over all corpora.
    """

    def __init__(self, config: Any, split: str, tok: Tokenizer, limits: Limits):
        super().__init__(config, split, tok, limits)
        self.corpora = config.parts()
        self.stores = [
            store.open_store(config, split, tok, corpus.features())
            for corpus in self.corpora
        ]
        self.digest = self.stores[0].digest
        if len(self.stores) > 1:
            parts = " ".join(one.digest for one in self.stores)
            self.digest = hashlib.sha256(parts.encode()).hexdigest()[:32]
        both = [
            [s.tokens[k].sizes() for s in self.stores] for k in ("inputs", "targets")
        ]
        inputs, targets = map(np.concatenate, both)
        empty = np.minimum(inputs, targets) == 0
        self.sizes = np.where(empty, -1, np.maximum(inputs, targets) + 1)  # EOS
        self._raw = functools.cache(self._open_raw)
        # The first item of every corpus, and the end of the last.
        self.starts = np.cumsum([0, *map(len, both[0])])

    @staticmethod
    def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
        """Every key of a batch, zero."""
        names = ("encoder_inputs", "encoder_segments", "inputs", "targets")
        batch = {name: np.zeros((rows, length), np.int32) for name in names}
        return batch | {"weights": np.zeros((rows, length), np.float32)}

    def _place(self, item: int) -> tuple[int, int]:
        """(corpus, number in it) of an item."""
        corpus = int(np.searchsorted(self.starts, item, "right")) - 1
        return corpus, int(item - self.starts[corpus])

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Both sides, each cut so that its EOS fits."""
        corpus, number = self._place(item)
        tokens, last = self.stores[corpus].tokens, batch["inputs"].shape[1] - 1
        source = tokens["inputs"][number][:last]
        target = tokens["targets"][number][:last]
        write_source(batch, row, source, self.tok)
        write_target(batch, row, target, self.tok)

    def order(
        self, items: np.ndarray, epoch: Epoch, rng: np.random.Generator
    ) -> np.ndarray:
        """Of a mixture: each corpus goes on where it stopped an epoch ago.

        None of its items (of one row length) comes again before all others have come:
        its order is that of one permutation after another.
        """
        if len(self.corpora) == 1:
            return rng.permutation(items)
        bounds = np.searchsorted(items, self.starts)
        chosen = []
        for corpus, passes in enumerate(self.passes()):
            own = items[bounds[corpus] : bounds[corpus + 1]]
            if not len(own):
                continue
            count = max(1, round(passes * len(own)))
            numbers = np.arange(epoch.epoch * count, (epoch.epoch + 1) * count)
            cycle, place = np.divmod(numbers, len(own))
            for c in range(cycle[0], cycle[-1] + 1):
                again = dataclasses.replace(epoch, number=c).rng(corpus, int(own[0]))
                chosen.append(again.permutation(own)[place[cycle == c]])
        return rng.permutation(np.concatenate(chosen))

    def passes(self) -> np.ndarray:
        """How often an epoch goes through every corpus: its share of rows by its size.

        An epoch has as many rows as all corpora together have examples to train on.
        """
        config = self.config
        usable = (self.sizes > 0) & (self.sizes <= config.max_len)
        sizes = np.add.reduceat(usable, self.starts[:-1], dtype=np.int64)
        counted = np.minimum(sizes, config.limit) if config.limit else sizes
        shares = (np.array(config.weights or counted)) ** (1 / config.temperature)
        shares = np.where(sizes > 0, shares, 0)
        return sizes.sum() * shares / shares.sum() / np.maximum(sizes, 1)

    def title(self) -> str:
        """'multi30k_translate train', or several sources."""
        names = dict.fromkeys(corpus.source for corpus in self.corpora)
        return f"{' + '.join(names)} {self.split}"

    def describe(self, item: int) -> str:
        """'multi30k_translate train, example 7'."""
        corpus, number = self._place(item)
        return f"{self.corpora[corpus].source} {self.split}, example {number}"

    def text(self, item: int) -> tuple[str, str]:
        """Source and reference as the corpus has them."""
        corpus, number = self._place(item)
        examples, readers = self._raw(corpus)
        (source,), (reference,) = (read(examples[number]) for read in readers)
        return source, reference

    def _open_raw(self, corpus: int) -> tuple[Sequence, list[Callable]]:
        spec, config = self.corpora[corpus], self.config
        readers = [store.reader(config, f) for f in spec.features()]
        return store.examples(config, spec.source, self.split), readers

    def group(self, item: int) -> tuple[str, int]:
        """The prefix of the item's corpus, or its source and features; its number."""
        if len(self.corpora) == 1:
            return "", item
        corpus, number = self._place(item)
        spec = self.corpora[corpus]
        name = f"{spec.source}:{spec.inputs}-{spec.targets}"
        return spec.prefix.strip(" :").replace(" ", "_") or name, number


def write_source(batch: Batch, row: int, ids: np.ndarray, tok: Tokenizer) -> None:
    """What an encoder reads: ids and EOS."""
    n = len(ids)
    batch["encoder_inputs"][row, :n] = ids
    batch["encoder_inputs"][row, n] = tok.eos
    batch["encoder_segments"][row, : n + 1] = 1


def write_target(batch: Batch, row: int, ids: np.ndarray, tok: Tokenizer) -> None:
    """What a decoder predicts, ids and EOS, and reads, the same shifted right."""
    n = len(ids)
    batch["targets"][row, :n] = ids
    batch["targets"][row, n] = tok.eos
    batch["inputs"][row, 0] = tok.start
    batch["inputs"][row, 1 : n + 1] = ids
    batch["weights"][row, : n + 1] = 1
