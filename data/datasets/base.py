"""What all kinds of data share: their configs, and what a dataset must do."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import sources, store
from triform.data.batch import Batch, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets.requests import Requests, framing
from triform.data.sources import Column, Source
from triform.data.sources.formats import TXT_EXAMPLES
from triform.data.store import Feature
from triform.runtime import paths
from triform.runtime.errors import DataError

TARGETS = ("class", "number")  # what is predicted of a text or a word
FAR = 10.0  # of the numbers that are predicted: a mean or deviation worth a word


@dataclasses.dataclass
class DataConfig:
    """Where examples come from, and how many make a batch."""

    # Fields that trained weights expect to stay as they were.
    EXPECTED: ClassVar[tuple[str, ...]] = ()

    USE: ClassVar[str] = "prompt"  # what texts are framed for, see codecs.framing

    # A file, folder or pattern, or several with commas between; or the name of an
    # embedded source, one of ours, or a public one of TFDS.
    source: str = "cldr"
    # Of text files an example is a file, passage, line or choice (formats.CHOICE).
    txt_example: str = "file"
    held_out: float = 0.05  # share of files for validation, and for test, if none is
    train_split: str = "train"  # what is trained on
    eval_split: str = "validation"  # scored while training; see evaluation.every
    test_split: str = "test"  # scored once, at the end
    batch_size: int = 32  # examples an update
    data_dir: str = ""  # prepared TFDS data; empty: the TFDS default
    manual_dir: str = ""  # files of a corpus that is not to be downloaded
    cache_dir: str = ""  # prepared arrays; empty: $TRIFORM_CACHE or ~/.cache/triform
    prefetch: int = 2  # batches prepared ahead of the device

    def spec(self) -> Spec:
        """The fields of its batches."""
        raise NotImplementedError

    def shapes(self) -> tuple[Shape, ...]:
        """Sizes of all axes but B, ascending: a step is compiled for each."""
        raise NotImplementedError

    def rows(self, shape: Shape) -> int:
        """Number of rows of a batch of this shape."""
        return self.batch_size

    def classes(self) -> dict[str, str]:
        """Field of the data that holds classes -> the model's number of them."""
        return {}

    def coded(self) -> dict[str, str]:
        """Field whose codec is the model of another run, whose workdir it names -> the
        name of the size, of this run's model, that is the codec's.
        """
        return {}

    def features(self) -> tuple[Feature, ...]:
        """What is read of every example, besides `columns`."""
        return ()

    def columns(self) -> tuple[Column, ...]:
        """Pictures, and what is read of a table beside them."""
        return ()

    def opened(self, name: str, found: Source, cache: str) -> Source:
        """A source as this kind of data reads it: with examples and splits of its own,
        if it has such. What is made of it may be kept in the folder `cache`.
        """
        return found

    def make_absolute(self) -> None:
        """Makes paths absolute, so that the config means the same from any folder."""
        self.source = sources.absolute(self.source)
        for name in ("data_dir", "manual_dir", "cache_dir"):
            if getattr(self, name):
                setattr(self, name, paths.absolute(getattr(self, name)))

    def require(self, holds: bool, name: str, rule: str) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if not holds:
            raise ValueError(f"data.{name}={getattr(self, name)!r}: {rule}")

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")
        self.require(self.prefetch >= 1, "prefetch", "must be at least 1")
        choices = f"expected one of {', '.join(TXT_EXAMPLES)}"
        self.require(self.txt_example in TXT_EXAMPLES, "txt_example", choices)
        rule = "must lie in [0, 0.5); 0: nothing is held out"
        self.require(0 <= self.held_out < 0.5, "held_out", rule)


@dataclasses.dataclass
class TextConfig(DataConfig):
    """Rows of tokens. Lengths include the tokens that a kind of data adds."""

    SPECIALS: ClassVar[tuple[str, ...]] = ()  # of a tokenizer trained for it

    max_len: int = 64  # longer items are left out of training, shortened in evaluation
    # Rows of max_len a batch; shorter buckets hold more rows, of as many tokens in all.
    batch_size: int = 32
    buckets: tuple[int, ...] = ()  # row lengths below max_len, ascending
    drop_empty: bool = False  # leave out items with an empty text instead of stopping
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    def lengths(self) -> tuple[int, ...]:
        """All row lengths, ascending."""
        return (*self.buckets, self.max_len)

    def shapes(self) -> tuple[Shape, ...]:
        """One per row length."""
        return tuple({"L": n} for n in self.lengths())

    def rows(self, shape: Shape) -> int:
        """Rows of a batch: as many tokens whatever the length."""
        return self.batch_size * self.max_len // shape["L"]

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        raise NotImplementedError

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(self.max_len >= 2, "max_len", "must be at least 2")
        lengths = self.lengths()
        integers = all(isinstance(n, int) for n in lengths)
        self.require(integers, "buckets", "must be a tuple of row lengths")
        self.require(
            sorted(set(lengths)) == list(lengths) and lengths[0] >= 2,
            "buckets",
            f"must ascend from at least 2 to below max_len={self.max_len}",
        )
        self.tokenizer.validate()

    def make_absolute(self) -> None:
        """Makes paths absolute, so that the config means the same from any folder."""
        super().make_absolute()
        if self.tokenizer.path:
            self.tokenizer.path = paths.absolute(self.tokenizer.path)
        named = (x.rpartition(":") for x in self.tokenizer.corpora)
        self.tokenizer.corpora = tuple(
            # Without a source it is no name: `validate` says so.
            f"{source and sources.absolute(source)}{colon}{name}"
            for source, colon, name in named
        )


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

    A kind of data is a subclass: it sets `sizes`, `empty` and `digest` when it is made,
    and says what `write` does. Everything else has a default.
    """

    unit = "tokens"  # what `batch.count` counts
    truncates = False  # longer items are shortened in training too, not left out
    metrics: tuple[str, ...] = ()  # what `scalars` gives
    requests: type[Requests] = Requests  # inputs that are of no split
    sizes: Mapping[str, np.ndarray]  # axis letter -> positions an item needs, int64 [N]
    empty: np.ndarray  # bool [N]: items without text
    digest: str  # equal digests mean equal items

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        self.config, self.split, self.codecs = config, split, codecs
        self.model_sizes, self.spec = sizes, config.spec()
        self.tok = codecs.get("text")
        self.framing = framing(config, codecs, sizes)
        self._raw = functools.cache(self._open_raw)
        # Names of the classes that the source numbers in a field; () if it has none.
        self.numbered = functools.cache(self._numbered)

    def __len__(self) -> int:
        return len(self.empty)

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Writes an item into a row of zeros, shortened to the row."""
        raise NotImplementedError

    def order(
        self, items: np.ndarray, epoch: Epoch, rng: np.random.Generator
    ) -> np.ndarray:
        """What an epoch visits of `items`, all of one shape, in random order.

        As many in every epoch.
        """
        return rng.permutation(items)

    def title(self) -> str:
        """'multi30k_translate train'."""
        return f"{self.config.source} {self.split}"

    def describe(self, item: int) -> str:
        """'multi30k_translate train, example 7', or with file and line."""
        return store.place(self.config, self.config.source, self.split, item)

    def origin(self) -> list[str]:
        """Where its examples are from, in lines; [] if there is nothing to say."""
        sources = dict.fromkeys(feature.source for feature in self.config.features())
        found = [store.origin(self.config, x) for x in sources or [self.config.source]]
        return [line for source in found for line in source.report(self.split)]

    def preview(self, batch: Batch) -> str:
        """The first row for the eye, some lines."""
        lines = []
        for name, field in self.spec.items():
            if field.below != "vocab_size":
                continue
            ids = batch[name][0]
            if field.counts:
                ids = ids[batch[field.counts][0] != 0]
            text = self.tok.show(ids).replace("\n", "\\n")
            lines.append(f"  {name:17}{text:.300}")
        return "\n".join(lines)

    def scalars(self, total: float) -> dict[str, float]:
        """Further metrics of the summed nats of all targets of the split."""
        return {}

    def remarks(self) -> list[str]:
        """Lines of the report on the training data, besides numbers of rows."""
        return []

    def text(self, item: int) -> tuple[str, str] | None:
        """(source, reference), if what a model generates is scored against one."""
        return None

    def group(self, item: int) -> tuple[str, int]:
        """The corpus of a mixture that an item is from, and its number in it."""
        return "", item

    def example(self, item: int) -> Mapping[str, Any]:
        """The example as the source has it; {} if an item is not one of them."""
        return self._raw()[0][item]

    def input_text(self, item: int) -> str:
        """What a model reads of an item, as the source has it; '' without text."""
        return ""

    def truth(self, item: int) -> dict[str, Any]:
        """What is right of an item, beside a prediction: {'true_label': 'yes'}."""
        return {}

    def samples(
        self, items: Sequence[int], rows: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, bytes]:
        """{end of a file's name: content} of some predictions, for the eye or ear.

        `rows` are those of a task's `predict`, of these items.
        """
        return {}

    def _open_raw(self) -> Any:
        """The source's examples and a reader of every text of the config."""
        features = [f for f in self.config.features() if f.is_text]
        readers = [store.reader(self.config, f) for f in features]
        return store.examples(self.config, self.config.source, self.split), readers

    def _numbered(self, field: str) -> tuple[str, ...]:
        found = store.origin(self.config, self.config.source)
        return tuple(found.classes(getattr(self.config, field)))

    def _texts(self, item: int) -> list[str]:
        examples, readers = self._raw()
        return [" ".join(read(examples[item])) for read in readers]

    def decoded(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A prediction (one row of a task's arrays) with names of classes."""
        found = {k: float(x) for k, x in row.items() if x.ndim == 0}
        for key in self.config.classes():
            names = self.codecs[key].names
            if key in row:
                found[key] = names[int(row[key])]
            if "probabilities" in row:
                shares = map(float, row["probabilities"])
                found["probabilities"] = dict(zip(names, shares, strict=False))
        return found


def labels(
    dataset: Dataset,
    field: str,
    values: np.ndarray,
    items: Sequence[int] | None = None,
) -> np.ndarray:
    """Numbers of classes (int32), or the numbers that are predicted (float32), [N].

    DataError with the example for a value that is no class, no number or not finite.
    `items` are the examples of the values, if that is not their order.
    """
    config, codec = dataset.config, dataset.codecs.get(field)
    where = f"data.{field}={getattr(config, field)!r}"

    def refuse(bad: np.ndarray, rule: str) -> None:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            item = first if items is None else int(items[first])
            raise DataError(
                f"{dataset.describe(item)}: {where} is {values[first].item()!r}, {rule}"
            )

    if field in config.classes():
        if codec is None:
            raise DataError(
                f"{where}: the names of its classes are unknown; restore classes.json "
                "in the workdir"
            )
        theirs = () if values.dtype.kind == "U" else dataset.numbered(field)
        ids = codec.encode(values, theirs)
        fix = "correct or remove the example"
        # Where the source tells no classes, there are as many as the model has.
        size = config.classes()[field]
        own = not config.features() and codec.size == dataset.model_sizes.get(size)
        if own and values.dtype.kind in "iu" and values[ids < 0].max(initial=0) > 0:
            fix += f" or raise model.{size}"
        if values.dtype.kind == "f":
            fix += ', or set data.target="number" if numbers are to be predicted'
        rule = f"none of the {codec.size} classes"
        if codec.named:
            rule += f" {shown(codec.names)}"
        if theirs and theirs != codec.names:
            rule += f"; the data number theirs {shown(theirs)}"
        refuse(ids < 0, f"{rule}; {fix}")
        return ids
    if values.dtype.kind == "U":
        numbers, inverse = np.unique(values, return_inverse=True)
        bad = np.array([not is_number(x) for x in numbers.tolist()], bool)
        rule = "no number; correct or remove the example, name another feature or set "
        refuse(bad[inverse], f'{rule}data.target="class"')
        values = numbers.astype(np.float64)[inverse]
    refuse(~np.isfinite(values), "not finite; correct or remove the example")
    return values.astype(np.float32)


def spread(config: Any, field: str, values: np.ndarray) -> list[str]:
    """For the report: the range of numbers that are predicted; [] if they are classes.

    Numbers far from 0, or widely spread, take many steps: a new head starts near 0.
    """
    if field in config.classes() or not len(values):
        return []
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std())
    line = (
        f"data.{field}={getattr(config, field)!r}: from {values.min():g} to "
        f"{values.max():g}, mean {mean:.4g}, standard deviation {deviation:.4g}"
    )
    if max(abs(mean), deviation) > FAR:
        line += "; with a mean near 0 and a deviation near 1 training takes fewer steps"
    return [line]


def is_number(text: str) -> bool:
    """Can it be read as one?"""
    try:
        float(text)
    except ValueError:
        return False
    return True


def shown(names: Sequence[str], most: int = 8) -> str:
    """'(0 negative, 1 positive)': names with their numbers, the first few."""
    listed = [f"{i} {name}" for i, name in enumerate(names[:most])]
    return f"({', '.join(listed)}{', ...' if len(names) > most else ''})"
