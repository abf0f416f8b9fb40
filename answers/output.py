"""The answer to one request: as an object, a line of text, and a row of JSON."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import numpy as np

from triform.data.codecs.tokenizer import well_formed
from triform.data.lines import one_line
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
    image: np.ndarray | None = None  # uint8 [h, w, c]
    samples: list["Output"] = dataclasses.field(default_factory=list)  # if several
    warnings: tuple[str, ...] = ()  # "cut: 131 of 700 tokens left out"

    def line(self) -> str:
        """The answer in one line, after the prompt that it continues."""
        if self.tags:
            return one_line(" ".join(f"{word}/{tag}" for word, tag in self.tags))
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


class JsonLines:
    """A file of one JSON object a line, written as it goes.

    UserError if it is there already, unless `overwrite`. It appears with `open`, so
    that what fails before leaves nothing behind.
    """

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

    def close(self) -> None:
        """Nothing more is written."""
        if self._file is not None:
            self._file.close()


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
