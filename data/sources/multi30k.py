"""Multi30k English-German: 31,014 image captions, each with a human translation.

Elliott et al. 2016, "Multi30K: Multilingual English-German Image Descriptions". The
text derives from Flickr30K: non-commercial research and educational use.
"""

from collections.abc import Iterator, Mapping

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths
from triform.runtime.errors import DataError

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


class Multi30kTranslate(LocalBuilder, skip_registration=True):
    """Raw sentence pairs in file order; example i of a split is line i of its files."""

    name = "multi30k_translate"
    folder = "multi30k_ende"
    origin = URL
    features: Mapping = dict.fromkeys(LANGUAGES, TEXT)

    @property
    def files(self) -> Mapping[str, str]:
        """Name -> sha256."""
        return {name: sha256 for name, (_, sha256) in CHECKSUMS.items()}

    @property
    def downloads(self) -> Mapping[str, Download]:
        """The same files."""
        return {name: (URL + name, *facts) for name, facts in CHECKSUMS.items()}

    def examples(self, paths: Paths) -> Mapping[str, Iterator[dict]]:
        """Pairs of lines."""
        return {split: self._pairs(stem, paths) for split, stem in STEMS.items()}

    def _pairs(self, stem: str, paths: Paths) -> Iterator[dict]:
        names = [f"{stem}.{language}.gz" for language in LANGUAGES]
        # Only '\n' ends a line: splitlines() would also split at U+2028 and its like.
        first, second = (
            self.read_text(name, paths[name]).removesuffix("\n").split("\n")
            for name in names
        )
        if len(first) != len(second):
            raise DataError(
                f"multi30k_translate: {names[0]} has {len(first):,} lines but "
                f"{names[1]} has {len(second):,}: they must be line-aligned; "
                "fetch both files again"
            )
        for pair in zip(first, second, strict=True):
            stripped = (line.strip() for line in pair)
            yield dict(zip(LANGUAGES, stripped, strict=True))
