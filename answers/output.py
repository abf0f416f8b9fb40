"""The answer to one request: as an object, a line of text, and a row of JSON."""

import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from PIL import Image

from triform.data.codecs.tokenizer import well_formed
from triform.data.lines import one_line
from triform.data.music import Music
from triform.runtime import files
from triform.runtime.errors import UserError


@dataclasses.dataclass
class Output:
    """The answer to one request. Which fields mean something depends on the model."""

    text: str = ""  # written by the model; prompts are not repeated
    prompt: str = ""  # that the text continues
    score: float = 0.0  # log-probability of the text, or probability of the label
    finish: str = ""  # why a text ends: "end", "stop" (--stop) or "length"
    tokens: list[str] = dataclasses.field(default_factory=list)  # if scores are asked
    token_scores: list[float] = dataclasses.field(default_factory=list)  # log-prob.
    label: str | float | None = None  # name of the likeliest class, or a number
    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    # (word, its tag); None: the word was not read
    tags: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    # Of every [MASK] the likeliest tokens with their probabilities.
    filled: list[dict[str, float]] = dataclasses.field(default_factory=list)
    # Items that come next, best first, with their probabilities.
    items: dict[str, float] = dataclasses.field(default_factory=dict)
    image: np.ndarray | None = None  # uint8 [h, w, c]
    music: Music | None = None  # with the opening that it goes on with
    samples: list["Output"] = dataclasses.field(default_factory=list)  # if several
    warnings: tuple[str, ...] = ()  # "cut: 131 of 700 tokens left out"

    def line(self) -> str:
        """The answer in one line, after the prompt that it continues."""
        if self.tags:
            return one_line(" ".join(f"{word}/{tag}" for word, tag in self.tags))
        if self.items:
            shown = (f"{name} ({x:.4g})" for name, x in self.items.items())
            return one_line("  ".join(shown))
        if self.label is not None:
            return one_line(str(self.label))
        return one_line(self.prompt + self.text)

    def row(self, gives: Iterable[str]) -> dict[str, Any]:
        """The fields `gives`, and others that are set."""
        shown = {*gives, "warnings"}
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            hidden = field.name in ("score", "prompt")
            if field.name in shown or not (hidden or _unset(value)):
                found[field.name] = value
        if self.samples:
            found["samples"] = [x.row(gives) for x in self.samples]
        return found


def _unset(value: Any) -> bool:
    return value is None or (not isinstance(value, np.ndarray) and not value)


class PictureFile:
    """A PNG: the pictures of one request in a square, of several in a row each.

    UserError if it is there already, unless `overwrite`.
    """

    rows = False

    def __init__(self, path: str, overwrite: bool = False):
        if os.path.exists(path) and not overwrite:
            raise UserError(
                f"--output={path}: is there already; name another file, or add "
                "--overwrite"
            )
        self.path, self._rows = path, []

    def open(self) -> None:
        """Its folder is there."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the pictures of an answer."""
        found = [sample["image"] for sample in row.get("samples", [row])]
        self._rows.append([image for image in found if image is not None])

    def close(self) -> list[str]:
        """Writes the file; its path."""
        if not any(self._rows):
            return []
        with files.replacing(self.path, binary=True) as f:
            f.write(picture_grid(self._rows))
        return [self.path]


SHOWN = 64  # pixels a side of a picture in a grid, at least


def picture_grid(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A PNG of pictures uint8 [h, w, c], enlarged if they are small, on white.

    One row of them is divided into several, about as many as it then has columns.
    """
    rows = [row for row in rows if len(row)]
    if len(rows) == 1:
        wide = math.ceil(len(rows[0]) ** 0.5)
        rows = [rows[0][i : i + wide] for i in range(0, len(rows[0]), wide)]
    height, width, channels = rows[0][0].shape
    times = max(1, -(-SHOWN // height))
    step = height * times + GAP, width * times + GAP
    shape = len(rows) * step[0] + GAP, max(map(len, rows)) * step[1] + GAP
    sheet = np.full((*shape, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * step[0] + GAP, j * step[1] + GAP
            large = image.repeat(times, 0).repeat(times, 1)
            sheet[top : top + large.shape[0], left : left + large.shape[1]] = large
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(file, "png")
    return file.getvalue()


GAP = 4  # pixels between pictures


class JsonLines:
    """A file of one JSON object a line, written as it goes.

    UserError if it is there already, unless `overwrite`. It appears with `open`, so
    that what fails before leaves nothing behind.
    """

    rows = True  # warnings are in it

    def __init__(self, path: str, overwrite: bool = False):
        if os.path.isdir(path):
            raise UserError(f"--output={path}: is a folder; name a file")
        if os.path.isfile(path) and not overwrite:
            raise UserError(
                f"--output={path}: is there already; name another file, or add "
                "--overwrite"
            )
        self.path = path
        self._file: TextIO | None = None

    def open(self) -> None:
        """The file is there, and empty."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        """Adds a line, which a reader of the file sees at once."""
        try:
            self._file.write(files.dumps(plain(row)) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def close(self) -> list[str]:
        """Nothing more is written; its path."""
        if self._file is not None:
            self._file.close()
        return [self.path]


def plain(value: Any) -> Any:
    """The value as what JSON has; text that no encoding has becomes U+FFFD."""
    if isinstance(value, Mapping):
        return {str(plain(k)): plain(x) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [*map(plain, value)]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float):
        return value
    return well_formed(str(value))
