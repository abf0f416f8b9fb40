"""What our TFDS builders share: a corpus of a few files, given, local or downloaded."""

import gzip
import hashlib
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds

from triform.datasets.base import DataError, local_copy

if not hasattr(tfds, "core"):  # It logs its own import errors and goes on, empty.
    raise ImportError(
        "tensorflow_datasets: import left an empty module: a dependency is missing or "
        'broken; run `python -c "import tensorflow_datasets.core"` to see which'
    )

Paths = Mapping[str, os.PathLike]


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The files come from `manual_dir`, else from the local copy, else by download.

    Files which are not the published ones are prepared in a folder of their own, named
    by their digest, inside `data_dir`. A corpus says what its files, its features and
    its examples are.
    """

    VERSION = tfds.core.Version("1.0.0")
    folder: str  # of the local copy
    origin: str  # where the files are from, for messages
    features: Mapping[str, object]

    def __init__(
        self, *, manual_dir: str = "", data_dir: str | None = None, **options
    ) -> None:
        self.local_dir = manual_dir or local_copy(self.folder)
        published = self.published()
        found = self._digests() if self.local_dir else published
        self.content = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
        if found != published:
            root = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
            data_dir = os.path.join(root, f"manual-{self.content[:16]}")
        super().__init__(data_dir=data_dir, **options)

    def published(self) -> Mapping[str, str]:
        """File name -> sha256 of the published file."""
        raise NotImplementedError

    def downloads(self) -> Mapping[str, tuple[str, int, str]]:
        """File name -> (address, bytes, sha256); {} if they cannot be downloaded."""
        return {}

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Split -> its examples in file order; `paths` are of one of the two sets."""
        raise NotImplementedError

    @property
    def url_infos(self) -> dict:
        """Sizes and checksums by address: TFDS refuses a download which differs."""
        return {
            url: tfds.download.checksums.UrlInfo(
                size=size, checksum=sha256, filename=name
            )
            for name, (url, size, sha256) in self.downloads().items()
        }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(dict(self.features)),
            homepage=self.origin,
            # File order, so that output can be compared line by line.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        if self.local_dir:
            folder = pathlib.Path(self.local_dir)
            paths = {name: folder / name for name in self.published()}
        elif files := self.downloads():
            # Not extracted: TFDS caches extractions by path, unverified.
            paths = dl_manager.download(
                {name: url for name, (url, *_) in files.items()}
            )
        else:
            raise DataError(
                f"{self.name}: has no file to download; put "
                f"{', '.join(self.published())}, made from {self.origin}, into "
                f"a folder and set data.manual_dir to it, or into {self.folder}/ in "
                "$TRIFORM_DATA"
            )
        splits = self.examples(paths)
        return {k: self._generate_examples(v) for k, v in splits.items()}

    def _generate_examples(self, examples: Iterable[dict]) -> Iterator:
        yield from enumerate(examples)

    def _digests(self) -> dict[str, str]:
        """File name -> sha256 of the files, which must all be there."""
        folder = pathlib.Path(self.local_dir)
        missing = [n for n in self.published() if not (folder / n).is_file()]
        if missing:
            raise DataError(
                f"{self.name}: {folder} lacks {', '.join(missing)}: it needs "
                f"{', '.join(self.published())}; fetch them from {self.origin} or "
                "leave manual_dir empty"
            )
        return {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in self.published()
        }

    def read_text(self, name: str, path: os.PathLike) -> str:
        """UTF-8 text, compressed as the name says; DataError if it is damaged."""
        try:
            content = pathlib.Path(path).read_bytes()
            if name.endswith(".gz"):
                content = gzip.decompress(content)
            elif name.endswith(".xz"):
                content = lzma.decompress(content)
            text = content.decode("utf-8")
        # gzip tells damage by EOFError, OSError and zlib.error.
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise DataError(
                f"{self.name}: {name} is not the text file it should be ({error}); "
                f"fetch it again from {self.origin}"
            ) from error
        if not text.strip():
            raise DataError(
                f"{self.name}: {name} is empty; fetch it again from {self.origin}"
            )
        return text
