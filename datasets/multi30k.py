"""Multi30k English-German: 31,014 image captions, each with a human translation.

Elliott et al. 2016, "Multi30K: Multilingual English-German Image Descriptions". The
text derives from Flickr30K: non-commercial research and educational use.
"""

import gzip
import hashlib
import os
import pathlib
import zlib
from collections.abc import Iterator

import tensorflow_datasets as tfds

from triform.datasets.base import DataError, local_copy

if not hasattr(tfds, "core"):  # It logs its own import errors and goes on, empty.
    raise ImportError(
        "tensorflow_datasets: import left an empty module: a dependency is missing or "
        'broken; run `python -c "import tensorflow_datasets.core"` to see which'
    )

COMMIT = "a3d2e0d26b56f3846f66a952536ffed4e401d05a"
URL = f"https://raw.githubusercontent.com/multi30k/dataset/{COMMIT}/data/task1/raw/"
LANGUAGES = ("en", "de")
# Split -> stem of its two files. 'test' is the 2016 Flickr test set, the one most
# published BLEU refers to.
STEMS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
# File -> (bytes, sha256) at COMMIT.
CHECKSUMS = {
    "train.en.gz": (
        568929,
        "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    ),
    "train.de.gz": (
        637044,
        "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    ),
    "val.en.gz": (
        21650,
        "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    ),
    "val.de.gz": (
        24681,
        "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    ),
    "test_2016_flickr.en.gz": (
        21077,
        "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    ),
    "test_2016_flickr.de.gz": (
        22890,
        "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    ),
}


class Multi30kTranslate(tfds.core.GeneratorBasedBuilder):
    """Raw sentence pairs in file order; example i of a split is line i of its files.

    The files come from `manual_dir`, else from the local copy `multi30k_ende`, else
    from `URL`, verified. Files which are not the published ones are prepared in a
    folder of their own, named by their digest, inside `data_dir`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, manual_dir: str = "", data_dir: str | None = None, **options
    ) -> None:
        self.local_dir = manual_dir or local_copy("multi30k_ende")
        published = {name: sha256 for name, (_, sha256) in CHECKSUMS.items()}
        found = _digests(self.local_dir) if self.local_dir else published
        self.content = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
        if found != published:
            root = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
            data_dir = os.path.join(root, f"manual-{self.content[:16]}")
        super().__init__(data_dir=data_dir, **options)

    @property
    def url_infos(self) -> dict:
        """Sizes and checksums by address: TFDS refuses a download which differs."""
        return {
            URL + name: tfds.download.checksums.UrlInfo(
                size=size, checksum=sha256, filename=name
            )
            for name, (size, sha256) in CHECKSUMS.items()
        }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Image captions in English with German translations.",
            features=tfds.features.Translation(languages=LANGUAGES),
            supervised_keys=LANGUAGES,
            homepage="https://github.com/multi30k/dataset",
            # File order, so that output can be compared line by line.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        if self.local_dir:
            folder = pathlib.Path(self.local_dir)
            paths = {name: folder / name for name in CHECKSUMS}
        else:
            # Not extracted: TFDS caches extractions by path, unverified.
            paths = dl_manager.download({name: URL + name for name in CHECKSUMS})
        splits = {}
        for split, stem in STEMS.items():
            names = [f"{stem}.{language}.gz" for language in LANGUAGES]
            splits[split] = self._generate_examples(*((n, paths[n]) for n in names))
        return splits

    def _generate_examples(self, *files: tuple[str, os.PathLike]) -> Iterator:
        (first, second), sides = files, [_lines(*file) for file in files]
        counts = [len(side) for side in sides]
        if counts[0] != counts[1]:
            raise DataError(
                f"multi30k_translate: {first[0]} has {counts[0]:,} lines but "
                f"{second[0]} has {counts[1]:,}: they must be line-aligned; "
                "fetch both files again"
            )
        for index, pair in enumerate(zip(*sides, strict=True)):
            yield index, dict(zip(LANGUAGES, pair, strict=True))


def _digests(folder: str) -> dict[str, str]:
    """File name -> sha256 of the six files, which must all be there."""
    missing = [n for n in CHECKSUMS if not os.path.isfile(os.path.join(folder, n))]
    if missing:
        raise DataError(
            f"multi30k_translate: {folder} lacks {', '.join(missing)}: it needs "
            f"{', '.join(CHECKSUMS)}; fetch them from {URL} or leave manual_dir empty"
        )
    return {
        name: hashlib.sha256((pathlib.Path(folder) / name).read_bytes()).hexdigest()
        for name in CHECKSUMS
    }


def _lines(name: str, path: os.PathLike) -> list[str]:
    try:
        text = gzip.decompress(pathlib.Path(path).read_bytes()).decode("utf-8")
    # gzip tells damage by three exceptions; zlib.error is not an OSError.
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"multi30k_translate: {name} is not gzip-compressed UTF-8 text "
            f"({error}); fetch it again from {URL}{name}"
        ) from error
    # Only '\n' ends a line: splitlines() would also split at U+2028 and its like.
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if lines == [""]:
        raise DataError(
            f"multi30k_translate: {name} is empty: expected one sentence per line; "
            f"fetch it again from {URL}{name}"
        )
    return lines
