"""What our TFDS builders share: a corpus of a few files, given, local or downloaded."""

import contextlib
import gzip
import hashlib
import lzma
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds

from triform.data.sources.base import local_copy
from triform.runtime.errors import DataError

if not hasattr(tfds, "core"):  # It logs its own import errors and goes on, empty.
    raise ImportError(
        "tensorflow_datasets: import left an empty module: a dependency is missing or "
        'broken; run `python -c "import tensorflow_datasets.core"` to see which'
    )

TEXT = tfds.features.Text()

Paths = Mapping[str, os.PathLike]
Download = tuple[str, int, str]  # address, bytes, sha256; '': nobody published one

# What parsers raise: gzip alone tells damage by EOFError, OSError and zlib.error.
DAMAGE = (
    EOFError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
DECOMPRESS = {".gz": ("gzip", gzip.decompress), ".xz": ("xz", lzma.decompress)}


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The files come from `manual_dir`, else from the local copy, else by download.

    A folder may hold the files of the local copy or those of the download. Files which
    are not the published ones are prepared in a folder of their own, named by their
    digest, inside `data_dir`.
    """

    VERSION = tfds.core.Version("1.0.0")
    folder: str  # of the local copy
    origin: str  # where the files are from, for messages
    features: Mapping[str, object]
    files: Mapping[str, str]  # of the local copy: name -> sha256
    downloads: Mapping[str, Download] = {}  # none: they are not published as needed

    def __init__(
        self, *, manual_dir: str = "", data_dir: str | None = None, **options
    ) -> None:
        self.local_dir = manual_dir or local_copy(self.folder)
        found = self._digests() if self.local_dir else self.files
        originals = {name: sha256 for name, (_, _, sha256) in self.downloads.items()}
        published = found in (self.files, originals)
        facts = sorted((self.files if published else found).items())
        self.content = hashlib.sha256(repr(facts).encode()).hexdigest()
        if not published:
            root = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
            data_dir = os.path.join(root, f"manual-{self.content[:16]}")
        super().__init__(data_dir=data_dir, **options)

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Split -> its examples in file order, of `files` or of `downloads`."""
        raise NotImplementedError

    @property
    def url_infos(self) -> dict:
        """Sizes and checksums by address: TFDS refuses a download which differs."""
        return {
            url: tfds.download.checksums.UrlInfo(
                size=size, checksum=sha256, filename=name
            )
            for name, (url, size, sha256) in self.downloads.items()
            if sha256
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
            paths = {name: folder / name for name in self._names()}
        elif self.downloads:
            # Not extracted: TFDS caches extractions by path, unverified.
            urls = {name: url for name, (url, *_) in self.downloads.items()}
            paths = dl_manager.download(urls)
        else:
            raise DataError(
                f"{self.name}: nothing can be downloaded, since its files are made "
                f"from {self.origin}; put {', '.join(self.files)} into a folder and "
                f"set data.manual_dir to it, or into $TRIFORM_DATA/{self.folder}"
            )
        try:
            splits = self.examples(paths)
        except DataError:
            for name, (_, _, sha256) in self.downloads.items():
                # TFDS keeps what it cannot verify, and its sha256 in another file: the
                # next attempt must download it anew.
                if not self.local_dir and not sha256:
                    for kept in (str(paths[name]), f"{paths[name]}.INFO"):
                        pathlib.Path(kept).unlink(missing_ok=True)
            raise
        return {k: self._generate_examples(k, v) for k, v in splits.items()}

    def _generate_examples(self, split: str, examples: Iterable[dict]) -> Iterator:
        number = -1
        for number, example in enumerate(examples):
            yield number, example
        if number < 0:
            raise DataError(
                f"{self.name}: the files hold no example of {split!r}; replace them "
                f"(origin: {self.origin})"
            )

    def _names(self) -> list[str]:
        """The files in the folder: of the local copy, else of the download."""
        folder = pathlib.Path(self.local_dir)
        for names in filter(None, (self.files, self.downloads)):
            if all((folder / name).is_file() for name in names):
                return list(names)
        missing = [name for name in self.files if not (folder / name).is_file()]
        others = [name for name in self.downloads if name not in self.files]
        raise DataError(
            f"{self.name}: {folder} lacks {', '.join(missing)}"
            f"{' (or ' + ', '.join(others) + ')' if others else ''}; add what is "
            f"missing (origin: {self.origin}) or set data.manual_dir to a folder that "
            "has it"
        )

    def _digests(self) -> dict[str, str]:
        folder = pathlib.Path(self.local_dir)
        return {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in self._names()
        }

    @contextlib.contextmanager
    def reading(self, name: str, kind: str) -> Iterator[None]:
        """Tells whatever a parser raises inside as one line: the file is no `kind`."""
        try:
            yield
        except DataError:
            raise
        except DAMAGE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self.wrong(name, f"is not {kind} ({reason})") from error

    def wrong(self, name: str, reason: str) -> DataError:
        """The error to raise for a file that cannot be used."""
        fix = "replace it" if self.local_dir else "try again"
        return DataError(f"{self.name}: {name} {reason}; {fix} (origin: {self.origin})")

    def read_text(self, name: str, path: os.PathLike) -> str:
        """UTF-8 text, compressed as the name says; DataError if damaged or empty.

        Without a byte order mark, and with LF at the ends of lines: files that were
        saved on Windows mean the same.
        """
        kind, decompress = DECOMPRESS.get(pathlib.Path(name).suffix, ("", bytes))
        with self.reading(name, f"{kind}-compressed UTF-8" if kind else "UTF-8"):
            text = decompress(pathlib.Path(path).read_bytes()).decode("utf-8-sig")
        text = text.replace("\r\n", "\n")
        if not text.strip():
            raise self.wrong(name, "is empty")
        return text
