"""382 four-part chorales by J. S. Bach, on a grid of 16ths and on one of quarters.

Split and encoding by Boulanger-Lewandowski et al. 2012, "Modeling temporal dependencies
in high-dimensional sequences"; the 16ths with voices by Huang et al. 2017 (CoCoNet).
"""

import gzip
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from triform.data.music import LOWEST, Music
from triform.data.sources.local_builder import Download, LocalBuilder, Paths

COMMIT = "9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d"
URL = f"https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/{COMMIT}/"
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
FEATURES: Mapping = {
    "notes": tfds.features.Tensor(shape=(None, 5), dtype=np.int32),
    "length": tfds.features.Scalar(np.int32),
    "resolution": tfds.features.Scalar(np.int32),
    "tempi": tfds.features.Tensor(shape=(None, 2), dtype=np.int64),
}


class JsbChorales(LocalBuilder, skip_registration=True):
    """Four voices, soprano first, in 16ths: 229, 76 and 77 pieces.

    A 16th is a tick. Repeated notes are tied: the data do not tell them apart.
    """

    name = "jsb_chorales"
    folder = "jsb_chorales"
    origin = "https://github.com/czhuang/JSB-Chorales-dataset"
    features: Mapping = FEATURES
    files: Mapping[str, str] = {
        "Jsb16thSeparated.json.gz": (
            "4894a4016c4b08979b0d2a8d54afac38082fde5b9ca24fefb8ac14239a63ec2a"
        )
    }
    downloads: Mapping[str, Download] = {
        "Jsb16thSeparated.json": (
            f"{URL}Jsb16thSeparated.json",
            1_666_444,
            "79294cc374f9252e95ef4b703161524c1c53dc1f712c236f00f1c1f5d54af5a7",
        )
    }

    def examples(self, paths: Paths) -> Mapping[str, Iterator[dict]]:
        """Pieces in file order."""
        ((name, path),) = paths.items()
        with self.reading(name, "a file of pieces by split"):
            content = pathlib.Path(path).read_bytes()
            if name.endswith(".gz"):
                content = gzip.decompress(content)
            found = json.loads(content)
            splits = {
                split: [self.piece(steps) for steps in found[key]]
                for key, split in SPLITS.items()
            }
        return {k: (piece.example() for piece in x) for k, x in splits.items()}

    def piece(self, steps: list) -> Music:
        """Of steps of four pitches each, -1 for silence."""
        grid = np.array(steps, np.int32)
        if grid.ndim != 2 or grid.shape[1] != 4:
            raise ValueError(f"steps of 4 pitches expected, found {grid.shape}")
        return Music.of_voices(grid, resolution=4)


class JsbChoralesQuarter(JsbChorales, skip_registration=True):
    """The same pieces on quarter notes, without voices: what sounds at each step."""

    name = "jsb_chorales_quarter"
    files: Mapping[str, str] = {
        "jsb-chorales-quarter.json.gz": (
            "fa54dc09f753b2b76d7a9619e8752da012ec122028889fbf183623b7cf301976"
        )
    }
    downloads: Mapping[str, Download] = {
        "jsb-chorales-quarter.json": (
            f"{URL}jsb-chorales-quarter.json",
            407_200,
            "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91",
        )
    }

    def piece(self, steps: list) -> Music:
        """Of steps, each a list of pitches."""
        roll = np.zeros((len(steps), 128), bool)
        for step, pitches in enumerate(steps):
            roll[step, pitches] = True
        if roll[:, :LOWEST].any():
            raise ValueError("a pitch that no piano has")
        return Music.of_roll(roll, resolution=1, lowest=0)
