"""Sentence polarity v1.0: 10,662 snippets of film reviews, half of them positive.

Pang & Lee 2005, "Seeing stars". CC BY 4.0, as NLTK distributes it.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping

import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths

COMMIT = "5db857e6f7df11eabb5e5665836db9ec8df07e28"
ZIP = "sentence_polarity.zip"
URL = (
    f"https://raw.githubusercontent.com/nltk/nltk_data/{COMMIT}/packages/corpora/{ZIP}"
)
LABELS = {"negative": "rt-polarity.neg", "positive": "rt-polarity.pos"}
# Of the texts in the archive, whose own sha256 nobody has published.
MEMBERS = {
    "rt-polarity.neg": (
        "614274f81185a850e5a88d533d4679f916d6f62e9af6f0b4ec71fb94bf466ea5"
    ),
    "rt-polarity.pos": (
        "c2dc6b2f55bcf725725372916287cc3f8f9b19402edaa9167de5287cb3ade421"
    ),
}


class MrSentiment(LocalBuilder, skip_registration=True):
    """Negative snippets, then positive ones, each in file order.

    There is no official split: of a text's sha256, the first byte modulo 10 sends it to
    validation (0), test (1) or training, so that equal texts are in one split.
    """

    name = "mr_sentiment"
    folder = "mr_sentiment"
    origin = URL
    features: Mapping = {
        "text": TEXT,
        "label": tfds.features.ClassLabel(names=list(LABELS)),
    }
    files: Mapping[str, str] = {
        "rt-polarity.neg.txt.gz": (
            "5311ac60ecb4bc02fcf2dffe3bc65daf7e8867b56552bb943c135746d973310f"
        ),
        "rt-polarity.pos.txt.gz": (
            "6b88e9f313b6d8b6bb6a18360e4053c03f46ed4cf64566535c22c9bdd72eeee7"
        ),
    }
    downloads: Mapping[str, Download] = {ZIP: (URL, 0, "")}

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """About 80, 10 and 10 % of the snippets."""
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        for label, stem in LABELS.items():
            if ZIP in paths:
                content = self._member(paths[ZIP], stem)
            else:
                content = self.read_text(f"{stem}.txt.gz", paths[f"{stem}.txt.gz"])
            for line in content.removesuffix("\n").split("\n"):
                text = line.strip()
                tenth = hashlib.sha256(text.encode()).digest()[0] % 10
                split = {0: "validation", 1: "test"}.get(tenth, "train")
                splits[split].append({"text": text, "label": label})
        return splits

    def _member(self, path: os.PathLike, name: str) -> str:
        with self.reading(ZIP, "the archive it should be"):
            with zipfile.ZipFile(path) as archive:
                content = archive.read(f"sentence_polarity/{name}")
            if hashlib.sha256(content).hexdigest() != MEMBERS[name]:
                raise self.wrong(ZIP, f"has another {name} than v1.0")
            return content.decode("utf-8")
