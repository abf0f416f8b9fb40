"""TFDS without TensorFlow: array_record files, random access, text as `str`."""

import errno
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from triform.data.sources.classic_books import ClassicBooks
from triform.data.sources.clinc150 import Clinc150
from triform.data.sources.flip_ss3 import FlipSs3
from triform.data.sources.jsb_chorales import JsbChorales, JsbChoralesQuarter
from triform.data.sources.mnist import CaptionedMnist, Mnist
from triform.data.sources.movie_reviews import MovieReviews
from triform.data.sources.mr_sentiment import MrSentiment
from triform.data.sources.multi30k import Multi30kTranslate
from triform.data.sources.noto_emoji import NotoEmoji
from triform.data.sources.sasrec_video import SasrecVideo
from triform.data.sources.tinyshakespeare import TinyShakespeare
from triform.data.sources.wikitext2 import WikiText2
from triform.runtime import paths
from triform.runtime.errors import DataError

BUILDERS = {
    "multi30k_translate": Multi30kTranslate,
    "tinyshakespeare": TinyShakespeare,
    "wikitext2": WikiText2,
    "classic_books": ClassicBooks,
    "clinc150": Clinc150,
    "mr_sentiment": MrSentiment,
    "movie_reviews": MovieReviews,
    "flip_ss3": FlipSs3,
    "mnist": Mnist,
    "captioned_mnist": CaptionedMnist,
    "noto_emoji": NotoEmoji,
    "jsb_chorales": JsbChorales,
    "jsb_chorales_quarter": JsbChoralesQuarter,
    "sasrec_video": SasrecVideo,
}

# Records per bulk read: one call per record costs four times as much.
BULK = 1024


class Records(Sequence):
    """A prepared split. Indexing decodes one record; iteration reads many at once."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self._features = builder.info.features
        self._title = f"{builder.info.name} {split}"
        self._records = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index}: the split has {size} examples")
        return self._text(index % size, self._records[index % size])

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several examples by one read; the name is the one PyTorch and Grain use."""
        records = self._records.__getitems__(list(indices))
        return [self._text(*x) for x in zip(indices, records, strict=True)]

    def _text(self, index: int, record: dict) -> dict:
        try:
            return _as_text(record, self._features)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._title}, example {index}: holds the byte "
                f"0x{error.object[error.start]:02x}, which is not UTF-8; correct the "
                "corpus and prepare it again"
            ) from error

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, len(self), BULK):
            yield from self.__getitems__(range(start, min(start + BULK, len(self))))


class TfdsSource:
    """A data set of TFDS or one of our builders, prepared when first used."""

    def __init__(
        self, name: str, data_dir: str, manual_dir: str, others: Sequence[str] = ()
    ):
        self.name, self.data_dir, self.manual_dir = name, data_dir, manual_dir
        self.others = others  # names to offer in an error

    def examples(self, split: str) -> Records:
        """The records of a split or of a slice of one."""
        builder = self._checked(split)
        try:
            return Records(builder, split)
        except NotImplementedError as error:
            raise DataError(
                f"{self.name}: prepared in {builder.data_dir} as "
                f"{builder.info.file_format.value}, but random access needs "
                "array_record; set another data_dir or delete that folder"
            ) from error

    def splits(self) -> tuple[str, ...]:
        """The names of its splits."""
        return tuple(self.builder.info.splits)

    def classes(self, feature: str) -> tuple[str, ...]:
        """Names of the classes that a feature numbers; () if it numbers none."""
        features = self.builder.info.features  # no mapping with `get`
        if feature not in features:
            return ()
        return tuple(getattr(features[feature], "names", None) or ())

    def fingerprint(self, split: str) -> str:
        """Full name with version, split, counts and bytes of every split, and the
        digest of files given by hand.
        """
        builder = self._checked(split)
        # Counts and bytes of all splits, since a split may be a slice or a sum.
        sizes = [
            (part.name, part.num_bytes, list(part.shard_lengths))
            for part in builder.info.splits.values()
        ]
        facts = (builder.info.full_name, split, sizes, getattr(builder, "content", ""))
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return re.sub(r"[^\w.]+", "-", f"{builder.info.full_name}-{split}-{digest}")

    def column(self, split: str, feature: str) -> list:
        """The values of one feature; pictures stay as they are stored."""
        builder = self._checked(split)
        images = tfds.features.Image
        skipped = {
            name: tfds.decode.SkipDecoding()
            for name, kind in builder.info.features.items()
            if isinstance(kind, images) and name != feature
        }
        found = builder.as_data_source(split, decoders=skipped or None)
        return [example[feature] for example in found]

    def where(self, split: str, item: int) -> str:
        """Nowhere: its files hold records, not lines."""
        return ""

    def report(self, split: str) -> list[str]:
        """Nothing."""
        return []

    def location(self) -> str:
        """The folder of the prepared data; '' if they are not prepared yet."""
        builder = self._make(lambda make: make())
        return str(builder.data_dir) if builder.is_prepared() else ""

    @functools.cached_property
    def builder(self) -> tfds.core.DatasetBuilder:
        """The builder of that name, its data prepared."""
        return self._make(lambda make: _prepared(make, self.manual_dir))

    def _make(self, call: Callable[[Callable], Any]) -> tfds.core.DatasetBuilder:
        """What `call` makes of a function that makes the builder; DataError."""
        name, manual_dir = self.name, self.manual_dir
        if manual_dir and not os.path.isdir(manual_dir):
            raise DataError(
                f"{name}: manual_dir={manual_dir!r} is not a folder; set it to the "
                "folder with the files, or leave it empty to download them"
            )
        # Named only if it is given; TFDS would take '~' for a name where no home is.
        default = tfds.core.constants.DATA_DIR
        directory = paths.absolute(self.data_dir or default, setting="TFDS_DATA_DIR")
        directory = directory if self.data_dir else None

        def make() -> tfds.core.DatasetBuilder:
            if name in BUILDERS:
                return BUILDERS[name](data_dir=directory, manual_dir=manual_dir)
            return tfds.builder(name, data_dir=directory)

        try:
            return call(make)
        except DataError:
            raise
        except tfds.core.DatasetNotFoundError as error:
            # TFDS drops silently every builder imported after one that needs h5py.
            hidden = (
                ""
                if importlib.util.find_spec("h5py")
                else "; h5py is missing, which hides most of them: run "
                "`pip install h5py`"
            )
            raise DataError(
                f"{name!r}: no such data set, file or folder: expected a path, one of "
                f"{', '.join([*self.others, *BUILDERS])}, or a public TFDS name such "
                f"as wmt14_translate/de-en (see tensorflow.org/datasets/catalog)"
                f"{hidden}"
            ) from error
        except Exception as error:  # TFDS lets out whatever a library raises
            raise _explained(name, error) from error

    def _checked(self, split: str) -> tfds.core.DatasetBuilder:
        """The builder, if it has examples of the split."""
        splits = self.builder.info.splits
        try:
            count = splits[split].num_examples
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{self.name}: split {split!r}: expected one of {', '.join(splits)}, "
                "or a slice such as train[:90%]"
            ) from error
        if not count:
            sizes = ", ".join(f"{k} {v.num_examples:,}" for k, v in splits.items())
            raise DataError(
                f"{self.name}: split {split!r} has no examples: choose from {sizes}"
            )
        return self.builder


def _prepared(
    make: Callable[[], tfds.core.DatasetBuilder], manual_dir: str
) -> tfds.core.DatasetBuilder:
    """The builder with its data; another process may prepare the same meanwhile."""
    builder = make()
    if not builder.is_prepared():
        config = tfds.download.DownloadConfig(
            manual_dir=manual_dir or None, try_download_gcs=False
        )
        try:
            builder.download_and_prepare(
                download_config=config, file_format="array_record"
            )
        except OSError as error:
            # TFDS writes to a temporary folder and renames it at the end, so the first
            # process to finish wins and its data are complete. (Its own
            # FileExistsError carries no errno; the system's may be ENOTEMPTY.)
            lost = isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY
            if not lost or not make().is_prepared():
                raise
    # A builder reads its splits when it is made: none if the data came later.
    return builder if builder.info.splits else make()


def _explained(name: str, error: Exception) -> DataError:
    """One line for whatever went wrong in TFDS: data set, reason, fix."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, DataError):  # Ours, wrapped on its way through TFDS.
            return link
    elsewhere = (
        "prepare it on another machine (file_format=array_record), copy the folder "
        "and set data_dir"
    )
    for link in chain:
        if isinstance(link, ImportError):
            # TFDS makes errors of its own, without a name, of some.
            told = re.search(r"No module named '(\w+)", str(link))
            package = link.name or (told[1] if told else str(link))
            package = package.partition(".")[0]
            extra = "triform[tensorflow]" if package == "tensorflow" else package
            return DataError(
                f"{name}: this public builder needs the package {package}, which is "
                f"not installed; run `pip install '{extra}'`, or {elsewhere}"
            )
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, AssertionError) and "manual" in reason.lower():
        return DataError(
            f"{name}: needs files fetched by hand ({reason}); set manual_dir to their "
            "folder"
        )
    if isinstance(error, OSError):
        return DataError(
            f"{name}: could not be downloaded or written ({type(error).__name__}: "
            f"{reason}); check network and disk, or {elsewhere}"
        )
    return DataError(
        f"{name}: could not be prepared ({type(error).__name__}: {reason}); "
        f"try `pip install 'triform[tensorflow]'`, or {elsewhere}"
    )


def _as_text(value, feature):
    """The example with every Text feature as `str`: TFDS gives UTF-8 bytes."""
    if isinstance(feature, tfds.features.Sequence):
        return _as_text(value, feature.feature)
    if isinstance(feature, tfds.features.FeaturesDict):
        if isinstance(value, list):
            return [_as_text(item, feature) for item in value]
        return {key: _as_text(item, feature[key]) for key, item in value.items()}
    return _decoded(value) if isinstance(feature, tfds.features.Text) else value


def _decoded(value):
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    return [_decoded(item) for item in value]  # Text inside sequences.
