"""3,528 emoji of 32 by 32 pixels in colour, with their English names.

Google's Noto Emoji (Apache-2.0), names of Unicode CLDR; flags are not included.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, LocalBuilder, Paths

IMAGES, NAMES = "images.npz", "names.tsv"
# What tells one figure from its near-duplicates: pictures that differ by it alone.
TONE = re.compile(r" ?\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
PERSON = re.compile(r" ?\b(wo)?(man|men|person|people|boys?|girls?)\b")
FACING = re.compile(r" ?\bfacing right\b")


def figure(name: str) -> str:
    """The name without skin tone, sex and direction: what all near-duplicates share."""
    for pattern in (TONE, PERSON, FACING):
        name = pattern.sub("", name)
    return " ".join(name.replace("mermaid", "mer").replace("merman", "mer").split())


def split_of(name: str) -> str:
    """Of all figures a tenth each is for validation and for test."""
    digest = hashlib.blake2b(figure(name).encode(), digest_size=8).digest()
    tenth = int.from_bytes(digest) % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


class NotoEmoji(LocalBuilder, skip_registration=True):
    """Pictures and names, in the order of their codepoints."""

    name = "noto_emoji"
    folder = "noto_emoji"
    origin = "https://github.com/googlefonts/noto-emoji"
    features: Mapping = {
        "image": tfds.features.Tensor(
            shape=(32, 32, 3), dtype=np.uint8, encoding="bytes"
        ),
        "text": TEXT,  # the name: 'man teacher medium skin tone'
        "figure": TEXT,  # what near-duplicates share: 'teacher'
        "toned": tfds.features.Scalar(np.bool_),  # has a skin tone
    }
    files: Mapping[str, str] = {
        IMAGES: "f894bacc565d9a59eb43e3a341a34a007a0d0fc4feb196eb7ff77f428d19b2b7",
        NAMES: "78fff90d8f7112e6c771b47e98b2617d8baa4c6651e1efc5b301fbda5c4d47c1",
    }

    def examples(self, paths: Paths) -> Mapping[str, Iterable[dict]]:
        """By figure: near-duplicates are in one split."""
        names = _names(self.read_text(NAMES, paths[NAMES]))
        with self.reading(IMAGES, "a file of 32 by 32 pictures with transparency"):
            with np.load(os.fspath(paths[IMAGES])) as found:
                pictures = over_white(found["rgba"])
            if len(pictures) != len(names):
                raise ValueError(f"{len(pictures)} pictures for {len(names)} names")
        found: dict[str, list] = {"train": [], "validation": [], "test": []}
        for picture, name in zip(pictures, names, strict=True):
            found[split_of(name)].append(_example(picture, name))
        return found


def over_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [N, h, w, 3] of [N, h, w, 4]: transparent parts are white."""
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    mixed = colour * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _names(table: str) -> list[str]:
    header, *rows = (line.split("\t") for line in table.splitlines())
    return [row[header.index("name")] for row in rows]


def _example(picture: np.ndarray, name: str) -> dict:
    toned = bool(TONE.search(name))
    return {"image": picture, "text": name, "figure": figure(name), "toned": toned}
