"""42 novels and non-fiction books in English, 4.35 million words, for pre-training.

Public domain, of authors who died before 1927. The text is taken from Markdown files,
without headings, rules and emphasis, hence no download.
"""

import json
from collections.abc import Mapping

from triform.data.sources.local_builder import TEXT, LocalBuilder, Paths

NAME = "books.jsonl.xz"
SPLITS = {"train": "train", "valid": "validation"}


class ClassicBooks(LocalBuilder, skip_registration=True):
    """One example a book; its text is its paragraphs, a line each. 39 and 3 books."""

    name = "classic_books"
    folder = "classic_books"
    origin = "https://github.com/mlschmitt/classic-books-markdown"
    features: Mapping = {"title": TEXT, "author": TEXT, "text": TEXT}
    files: Mapping[str, str] = {
        NAME: "48ea710e86945983cfc78d1a6477e2313f973521f97b6d6b2b5b2c7cc353b376"
    }

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """Books in file order."""
        text = self.read_text(NAME, paths[NAME])
        books: dict[str, list[dict]] = {split: [] for split in SPLITS.values()}
        with self.reading(NAME, "JSON lines of author, title, split and paragraphs"):
            for line in text.removesuffix("\n").split("\n"):
                book = json.loads(line)
                example = {key: book[key] for key in ("title", "author")}
                example["text"] = "\n".join(book["paragraphs"])
                books[SPLITS[book["split"]]].append(example)
        return books
