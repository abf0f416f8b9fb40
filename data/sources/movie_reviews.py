"""Movie-review polarity v2.0: 2,000 reviews of films, half of them positive.

Pang & Lee 2004, "A Sentimental Education". CC BY 4.0, as NLTK distributes it.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths

COMMIT = "5db857e6f7df11eabb5e5665836db9ec8df07e28"
NAME = "reviews.jsonl.xz"
ZIP = "movie_reviews.zip"
URL = (
    f"https://raw.githubusercontent.com/nltk/nltk_data/{COMMIT}/packages/corpora/{ZIP}"
)
LABELS = {"neg": "negative", "pos": "positive"}
MEMBER = re.compile(r"movie_reviews/(neg|pos)/(cv\d{3}_\d+)\.txt")
# Of the reviews in the archive, whose own sha256 nobody has published.
CONTENT = "84b225fdb01ac6fb9040104669494249392b372c8e0a87604e4485ce1e15a212"

Review = tuple[str, str, str]  # label, id, text


class MovieReviews(LocalBuilder, skip_registration=True):
    """Lower-case, tokenised, a sentence a line: 1,600, 200 and 200 reviews.

    There is no official split but ten folds for cross-validation: 1 to 8 are for
    training, 9 for validation, 10 for test. Folds are in order, of 100 negative
    reviews, then 100 positive ones, so that slices make the others:
    `train[:200]` is the first, `train[200:]+validation+test` what it is held out of.
    """

    name = "movie_reviews"
    folder = "movie_reviews"
    origin = URL
    features: Mapping = {
        "text": TEXT,
        "label": tfds.features.ClassLabel(names=list(LABELS.values())),
    }
    files: Mapping[str, str] = {
        NAME: "befc2ac12565d1f0387d46003d128b2bc8bea7afec9647fab10bd9a50798039b"
    }
    downloads: Mapping[str, Download] = {ZIP: (URL, 0, "")}

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """Of the local copy's one file, or of the archive."""
        if ZIP in paths:
            reviews = self._archive(paths[ZIP])
        else:
            text = self.read_text(NAME, paths[NAME])
            with self.reading(NAME, "JSON lines of id, label and text"):
                reviews = list(_lines(text))
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        with self.reading(ZIP if ZIP in paths else NAME, "reviews of ten folds"):
            for label, key, text in sorted(reviews, key=lambda r: _fold(r[1])):
                split = {9: "validation", 10: "test"}.get(_fold(key), "train")
                splits[split].append({"text": text, "label": LABELS[label]})
        return splits

    def _archive(self, path: os.PathLike) -> list[Review]:
        with self.reading(ZIP, "the archive it should be"):
            with zipfile.ZipFile(path) as archive:
                found = [
                    (*match.groups(), archive.read(name).decode("utf-8"))
                    for name in sorted(archive.namelist())
                    if (match := MEMBER.fullmatch(name))
                ]
            if digest(found) != CONTENT:
                raise self.wrong(ZIP, "has other reviews than v2.0")
            return found


def digest(reviews: list[Review]) -> str:
    """Of labels, ids and texts in their order."""
    return hashlib.sha256(json.dumps(reviews).encode()).hexdigest()


def _lines(text: str) -> Iterator[Review]:
    for line in text.removesuffix("\n").split("\n"):
        review = json.loads(line)
        yield review["label"], review["id"], review["text"]


def _fold(key: str) -> int:
    """1 to 10, of an id such as cv917_29484: the README of the corpus says so."""
    return 1 + int(key[2])
