"""Text corpora of a few files: language modelling, sentence and residue labels."""

import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from triform.datasets.base import DataError
from triform.datasets.local_builder import LocalBuilder, Paths

TEXT = tfds.features.Text()


class TinyShakespeare(LocalBuilder, skip_registration=True):
    """Tiny Shakespeare: 1.1 MB of plays, the first 90 % of its characters for training.

    One example a split, as nanoGPT splits it; there is no test split.
    """

    name = "tinyshakespeare"
    folder = "tinyshakespeare"
    origin = "https://github.com/karpathy/char-rnn"
    features: Mapping = {"text": TEXT}
    _COMMIT = "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    _SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {"input.txt": self._SHA256}

    def downloads(self) -> Mapping[str, tuple[str, int, str]]:
        """The file at a fixed commit."""
        base = "https://raw.githubusercontent.com/karpathy/char-rnn"
        url = f"{base}/{self._COMMIT}/data/tinyshakespeare/input.txt"
        return {"input.txt": (url, 1_115_394, self._SHA256)}

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Two long texts."""
        text = self.read_text("input.txt", paths["input.txt"])
        cut = int(0.9 * len(text))
        return {"train": [{"text": text[:cut]}], "validation": [{"text": text[cut:]}]}


class WikiText2(LocalBuilder, skip_registration=True):
    """WikiText-2 (Merity et al. 2016), word level with <unk>: one example an article.

    The texts hold the lines of the file as they are, so that whitespace words and
    newlines are the official tokens: 2,088,628 for training, 217,646 for validation.
    """

    name = "wikitext2"
    folder = "wikitext2"
    origin = "https://huggingface.co/datasets/Salesforce/wikitext (wikitext-2-v1)"
    features: Mapping = {"text": TEXT}

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {
            "train.txt.gz": (
                "441f36e917e68bb727e4c0343b274193140d3f364fed5dde924dcd08ed40012e"
            ),
            "valid.txt.gz": (
                "3cdd8cb5bb349a05840c7c3bef9578d90d64df77e27e0c25c033ba9342757ee3"
            ),
        }

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Articles in file order."""
        return {
            split: self._articles(name, paths[name])
            for split, name in (
                ("train", "train.txt.gz"),
                ("validation", "valid.txt.gz"),
            )
        }

    def _articles(self, name: str, path) -> Iterator[dict]:
        lines: list[str] = []
        for line in self.read_text(name, path).split("\n")[:-1]:
            title = line.startswith(" = ") and not line.startswith(" = = ")
            if title and line.rstrip().endswith(" =") and any(map(str.strip, lines)):
                yield {"text": "".join(f"{x}\n" for x in lines)}
                lines = []
            lines.append(line)
        yield {"text": "".join(f"{x}\n" for x in lines)}


class ClassicBooks(LocalBuilder, skip_registration=True):
    """42 public-domain books in English, 4.35 million words; 3 are held out.

    A text is its paragraphs, a line each.
    """

    name = "classic_books"
    folder = "classic_books"
    origin = "https://github.com/mlschmitt/classic-books-markdown"
    features: Mapping = {"title": TEXT, "author": TEXT, "text": TEXT}

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {
            "books.jsonl.xz": (
                "48ea710e86945983cfc78d1a6477e2313f973521f97b6d6b2b5b2c7cc353b376"
            )
        }

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Books in file order."""
        name = "books.jsonl.xz"
        splits: dict[str, list] = {"train": [], "validation": []}
        for line in self.read_text(name, paths[name]).splitlines():
            book = json.loads(line)
            text = "\n".join(book["paragraphs"])
            example = {"title": book["title"], "author": book["author"], "text": text}
            split = "train" if book["split"] == "train" else "validation"
            splits[split].append(example)
        return splits


class Clinc150(LocalBuilder, skip_registration=True):
    """CLINC150 (Larson et al. 2019): 150 intents of requests to an assistant.

    The in-scope part: 15,000 / 3,000 / 4,500.
    """

    name = "clinc150"
    folder = "clinc150"
    origin = "https://github.com/clinc/oos-eval"
    features: Mapping = {"text": TEXT, "intent": TEXT}
    _COMMIT = "828f8093932c8fe6ca7936c3d2e52903b1c523de"

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {
            "data_full.json.gz": (
                "59969ccdb9192885f0ca3d475172ca845aa4a41ca0e2881782ba4c3bd37e7dbf"
            )
        }

    def downloads(self) -> Mapping[str, tuple[str, int, str]]:
        """The same, not compressed."""
        base = "https://raw.githubusercontent.com/clinc/oos-eval"
        sha256 = "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"
        url = f"{base}/{self._COMMIT}/data/data_full.json"
        return {"data_full.json": (url, 2_495_390, sha256)}

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Requests in file order."""
        ((name, path),) = paths.items()
        found = json.loads(self.read_text(name, path))
        return {
            split: [{"text": text, "intent": intent} for text, intent in found[part]]
            for split, part in (
                ("train", "train"),
                ("validation", "val"),
                ("test", "test"),
            )
        }


class MrSentiment(LocalBuilder, skip_registration=True):
    """Sentence polarity (Pang & Lee 2005): 10,662 snippets of film reviews.

    There is no official split: a hash of the text sends one tenth to validation and one
    to test, so that a text that occurs twice is in one of them only.
    """

    name = "mr_sentiment"
    folder = "mr_sentiment"
    origin = "https://www.cs.cornell.edu/people/pabo/movie-review-data/"
    features: Mapping = {
        "text": TEXT,
        "label": tfds.features.ClassLabel(names=("negative", "positive")),
    }

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {
            "rt-polarity.neg.txt.gz": (
                "5311ac60ecb4bc02fcf2dffe3bc65daf7e8867b56552bb943c135746d973310f"
            ),
            "rt-polarity.pos.txt.gz": (
                "6b88e9f313b6d8b6bb6a18360e4053c03f46ed4cf64566535c22c9bdd72eeee7"
            ),
        }

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Negative ones first."""
        splits: dict[str, list] = {"train": [], "validation": [], "test": []}
        for label, name in zip(("negative", "positive"), self.published(), strict=True):
            for line in (
                self.read_text(name, paths[name]).removesuffix("\n").split("\n")
            ):
                text = line.strip()
                digest = hashlib.sha256(text.encode()).digest()[0] % 10
                split = {0: "validation", 1: "test"}.get(digest, "train")
                splits[split].append({"text": text, "label": label})
        return splits


class FlipSs3(LocalBuilder, skip_registration=True):
    """FLIP (Dallago et al. 2021): secondary structure of proteins, a state a residue.

    `ss3` holds H, E or C for every letter of `sequence`, `mask` 1 where it is known.
    """

    name = "flip_ss3"
    folder = "flip_ss3"
    origin = "https://github.com/J-SNACKKB/FLIP (splits/secondary_structure)"
    features: Mapping = {"sequence": TEXT, "ss3": TEXT, "mask": TEXT}

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {
            "ss3.tsv.xz": (
                "233eedcb18e3901f72103d258701c52927a3a80794b85e691575465d168ca4e7"
            )
        }

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Chains in file order."""
        splits: dict[str, list] = {"train": [], "valid": [], "test": []}
        lines = self.read_text("ss3.tsv.xz", paths["ss3.tsv.xz"]).splitlines()
        for number, line in enumerate(lines[1:], 2):
            _, split, sequence, ss3, mask = line.split("\t")
            if not len(sequence) == len(ss3) == len(mask):
                raise DataError(
                    f"{self.name}: ss3.tsv.xz, line {number}: sequence, ss3 and mask "
                    "must be equally long; fetch it again"
                )
            splits[split].append({"sequence": sequence, "ss3": ss3, "mask": mask})
        return splits | {"validation": splits.pop("valid")}


# File -> (bytes, sha256), as TFDS records them too; training first.
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": (
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte.gz": (
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "t10k-images-idx3-ubyte.gz": (
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}


class Mnist(LocalBuilder, skip_registration=True):
    """MNIST (LeCun et al. 1998): 70,000 handwritten digits, 28 x 28, grey."""

    name = "mnist"
    folder = "mnist"
    origin = "http://yann.lecun.com/exdb/mnist"
    features: Mapping = {
        "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=10),
    }

    def published(self) -> Mapping[str, str]:
        """File name -> sha256."""
        return {
            "mnist.npz": (
                "39b9b1ffaa0ba4d8995a616551f0966941fe02a3fe79ba4a9db7373db16d53ad"
            )
        }

    def downloads(self) -> Mapping[str, tuple[str, int, str]]:
        """The four original files."""
        base = "https://storage.googleapis.com/cvdf-datasets/mnist/"
        return {name: (base + name, *facts) for name, facts in MNIST_FILES.items()}

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """Images in the official order."""
        if "mnist.npz" in paths:
            try:
                found = np.load(paths["mnist.npz"])
            except (ValueError, OSError) as error:
                raise DataError(
                    f"mnist: mnist.npz is not a NumPy archive ({error}); fetch it again"
                ) from error
            arrays = {
                split: (found[f"{split}_images"], found[f"{split}_labels"])
                for split in ("train", "test")
            }
        else:
            files = [self._idx(paths[name]) for name in MNIST_FILES]
            arrays = {"train": files[:2], "test": files[2:]}
        return {
            split: (
                {"image": image.reshape(28, 28, 1), "label": int(label)}
                for image, label in zip(*pair, strict=True)
            )
            for split, pair in arrays.items()
        }

    def _idx(self, path: os.PathLike) -> np.ndarray:
        """The array of an IDX file: a header of the number and sizes of its axes."""
        content = gzip.decompress(pathlib.Path(path).read_bytes())
        axes = content[3]
        shape = np.frombuffer(content, ">i4", axes, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
