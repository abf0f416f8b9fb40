"""Parallel text: one sequence is read, another is predicted."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import sources, store
from triform.data.batch import Batch, Field, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.framing import Framing
from triform.data.codecs.text import Tokenizer
from triform.data.datasets.base import Dataset, Epoch, TextConfig
from triform.data.datasets.requests import Item, Requests
from triform.data.store import Feature


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Pairs of one source."""

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
class PairsConfig(TextConfig):
    """Rows of two sequences, whose lengths may differ."""

    USE: ClassVar[str] = "source"

    # Longest source, in tokens; 0: max_len. If set, max_len limits the targets only,
    # and buckets scale the source length in proportion.
    max_source_len: int = 0

    def parts(self) -> tuple[Corpus, ...]:
        """The corpora."""
        raise NotImplementedError

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return tuple(f for corpus in self.parts() for f in corpus.features())

    def spec(self) -> Spec:
        """The source, and the target with the same shifted right."""
        ids = Field("BL", below="vocab_size", counts="weights")
        source = Field("BS", below="vocab_size", counts="encoder_segments")
        return {
            "encoder_inputs": source,
            "encoder_segments": Field("BS"),
            "inputs": ids,
            "targets": ids,
            "weights": Field("BL", "float32"),
        }

    def shapes(self) -> tuple[Shape, ...]:
        """One per bucket."""
        longest = self.max_source_len or self.max_len
        return tuple(
            {"S": max(2, n * longest // self.max_len), "L": n} for n in self.lengths()
        )

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        rule = "must be 0 (as max_len) or at least 2"
        allowed = self.max_source_len == 0 or self.max_source_len >= 2
        self.require(allowed, "max_source_len", rule)


@dataclasses.dataclass
class Seq2SeqConfig(PairsConfig):
    """Pairs of one corpus."""

    inputs: str = "en"  # name of the source feature
    targets: str = "de"  # name of the target feature

    def parts(self) -> tuple[Corpus, ...]:
        """The corpora."""
        return (Corpus(self.source, self.inputs, self.targets),)


@dataclasses.dataclass
class MixtureConfig(PairsConfig):
    """Pairs of several corpora, each with a share of the rows.

    Raffel et al. 2020, 3.5.2: shares are as min(size, limit) ** (1 / temperature), or
    as weights ** (1 / temperature).
    """

    source: str = ""  # not read: each corpus has its own
    corpora: tuple[Corpus, ...] = ()  # the corpora of the mixture
    weights: tuple[float, ...] = ()  # one per corpus; (): by size
    limit: int = 0  # cap on the size of a corpus in the shares; 0: no cap
    temperature: float = 1.0  # higher: more equal shares

    def __post_init__(self) -> None:
        # From JSON they come as dictionaries.
        self.corpora = tuple(
            x if isinstance(x, Corpus) else Corpus(**x) for x in self.corpora
        )

    def parts(self) -> tuple[Corpus, ...]:
        """The corpora."""
        return self.corpora

    def make_absolute(self) -> None:
        """Makes paths absolute, so that the config means the same from any folder."""
        super().make_absolute()
        self.corpora = tuple(
            dataclasses.replace(x, source=sources.absolute(x.source))
            for x in self.corpora
        )

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


class Sources(Requests):
    """Texts that an encoder reads. Those of a mixture begin with its prefixes."""

    columns, axis = ("inputs",), "S"

    def read(self, request: Any) -> Item:
        """Ids of a source."""
        (text,), notes = self.texts(request)
        ids = self.tok.encode([text], specials=True) if text.strip() else []
        return Item(ids, text, notes)

    def size(self, item: Item) -> int:
        """The source and what stands around it."""
        return sum(map(len, item.parts)) + self.framing.added(1)

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """The source, shortened so that what stands around it fits, and what starts a
        target.
        """
        if not row:
            batch["encoder_inputs"][:] = self.tok.pad
            batch["inputs"][:, 0] = self.tok.start
        ids = np.concatenate([*item.parts, np.zeros(0, np.int32)])
        room = batch["encoder_inputs"].shape[1] - self.framing.added(1)
        write_source(batch, row, ids[:room], self.framing)
        return max(0, len(ids) - room)

    def limit(self) -> str:
        """The setting of the source's length."""
        longest = getattr(self.config, "max_source_len", 0)
        return f"data.max_source_len={longest}" if longest else super().limit()


class Seq2Seq(Dataset):
    """Row: the source as the tokenizer frames it, else with EOS; the target and EOS,
    and the same shifted right.

    Items are numbered over all corpora.
    """

    requests = Sources

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        self.corpora = config.parts()
        self.stores = [
            store.open_store(config, split, self.tok, corpus.features())
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
        self.empty = np.minimum(inputs, targets) == 0
        self.sizes = {"S": inputs + self.framing.added(1), "L": targets + 1}  # EOS
        self._raw_of = functools.cache(self._open_corpus)
        # The first item of every corpus, and the end of the last.
        self.starts = np.cumsum([0, *map(len, both[0])])

    def _corpus_of(self, item: int) -> tuple[int, int]:
        """(corpus, number in it) of an item."""
        corpus = int(np.searchsorted(self.starts, item, "right")) - 1
        return corpus, int(item - self.starts[corpus])

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Both sides, each shortened so that what stands around it fits."""
        corpus, number = self._corpus_of(item)
        tokens = self.stores[corpus].tokens
        room = batch["encoder_inputs"].shape[1] - self.framing.added(1)
        source = tokens["inputs"][number][:room]
        target = tokens["targets"][number][: batch["inputs"].shape[1] - 1]
        write_source(batch, row, source, self.framing)
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
            numbers = np.arange(epoch.number * count, (epoch.number + 1) * count)
            cycle, index = np.divmod(numbers, len(own))
            for c in range(cycle[0], cycle[-1] + 1):
                again = dataclasses.replace(epoch, number=c).rng(corpus, int(own[0]))
                chosen.append(again.permutation(own)[index[cycle == c]])
        return rng.permutation(np.concatenate(chosen))

    def passes(self) -> np.ndarray:
        """How often an epoch goes through every corpus: its share of rows by its size.

        An epoch has as many rows as all corpora together have examples to train on.
        """
        config = self.config
        longest = config.shapes()[-1]
        fits = [self.sizes[axis] <= n for axis, n in longest.items()]
        usable = np.logical_and.reduce([~self.empty, *fits])
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
        corpus, number = self._corpus_of(item)
        source = self.corpora[corpus].source
        return store.place(self.config, source, self.split, number)

    def text(self, item: int) -> tuple[str, str]:
        """Source and reference as the corpus has them."""
        corpus, number = self._corpus_of(item)
        examples, readers = self._raw_of(corpus)
        (source,), (reference,) = (read(examples[number]) for read in readers)
        return source, reference

    def _open_corpus(self, corpus: int) -> tuple[Sequence, list[Callable]]:
        spec, config = self.corpora[corpus], self.config
        readers = [store.reader(config, f) for f in spec.features()]
        return store.examples(config, spec.source, self.split), readers

    def example(self, item: int) -> Mapping[str, Any]:
        """The example of its corpus."""
        corpus, number = self._corpus_of(item)
        return self._raw_of(corpus)[0][number]

    def input_text(self, item: int) -> str:
        """The source of an item."""
        return self.text(item)[0]

    def group(self, item: int) -> tuple[str, int]:
        """The prefix of the item's corpus, or its source and features; its number."""
        if len(self.corpora) == 1:
            return "", item
        corpus, number = self._corpus_of(item)
        spec = self.corpora[corpus]
        name = f"{spec.source}:{spec.inputs}-{spec.targets}"
        return spec.prefix.strip(" :").replace(" ", "_") or name, number


def write_source(batch: Batch, row: int, ids: np.ndarray, around: Framing) -> None:
    """What an encoder reads: ids and what stands around them."""
    source = around.framed([ids]).ids
    batch["encoder_inputs"][row, : len(source)] = source
    batch["encoder_segments"][row, : len(source)] = 1


def write_target(batch: Batch, row: int, ids: np.ndarray, tok: Tokenizer) -> None:
    """What a decoder predicts, ids and EOS, and reads, the same shifted right."""
    n = len(ids)
    batch["targets"][row, :n] = ids
    batch["targets"][row, n] = tok.eos
    batch["inputs"][row, 0] = tok.start
    batch["inputs"][row, 1 : n + 1] = ids
    batch["weights"][row, : n + 1] = 1
