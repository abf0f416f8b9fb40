"""Inputs that are of no split: what a trained model is asked, and what it answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data.batch import Batch, Sizes, resolved, zeros
from triform.data.codecs import Codec
from triform.data.codecs.classes import Classes
from triform.data.codecs.framing import Framing
from triform.data.codecs.tokenizer import well_formed
from triform.runtime.errors import DataError


@dataclasses.dataclass
class Item:
    """One request, read."""

    parts: list[np.ndarray]  # what a row holds: ids of texts, or an image
    shown: Any = ""  # what the answer refers to: the text, the words, the file
    notes: list[str] = dataclasses.field(default_factory=list)  # what was changed
    at: Any = None  # where in its row the answer is found; set by `write`

    @property
    def empty(self) -> bool:
        """Whether there is nothing to answer."""
        return not any(map(len, self.parts))


class Requests:
    """How requests of one kind of data become a batch, and what its answers mean.

    A request is a text, or a mapping with the columns of training (by the source's own
    names or those of the config: "first", "second"). Of two columns a text holds both,
    a tab between them. A kind of data is a subclass.
    """

    columns: ClassVar[tuple[str, ...]] = ()  # config fields: the features that are read
    axis: ClassVar[str] = "L"  # on which a request needs positions
    continues: ClassVar[bool] = False  # what is written goes on with the request
    gives: ClassVar[tuple[str, ...]] = ("text", "score")  # fields of an answer
    example: ClassVar[str] = "..."  # of a command line
    most: int = 10  # entries of an answer that is a list

    def __init__(self, config: Any, codecs: Mapping[str, Codec], sizes: Sizes):
        self.config, self.codecs, self.sizes = config, codecs, sizes
        self.tok = codecs.get("text")
        self.framing = framing(config, codecs, sizes)

    # What a kind of data says

    def read(self, request: Any) -> Item:
        """A request as it will be written; DataError if it cannot be."""
        raise NotImplementedError

    def size(self, item: Item) -> int:
        """Positions that it needs."""
        raise NotImplementedError

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """Writes it into a row of zeros, shortened to the row; returns how many of its
        tokens are left out.
        """
        raise NotImplementedError

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Fields of the answer (`gives`) of a row of the task's `answer`."""
        return {}

    def decode(self, ids: np.ndarray) -> str:
        """The text that a model has written."""
        return self.tok.decode(ids)

    def limit(self) -> str:
        """'data.max_len=64': the setting that bounds a request."""
        return f"data.max_len={self.config.max_len}"

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """The flags of generate.py with which a request can be tried; `classes` are
        those of the run, by field.
        """
        return f'--input="{cls.example}"'

    def owner(self, request: Any) -> str | None:
        """Whose request a row of a file is a part of; None: it is a whole one."""
        return None

    def united(self, parts: Sequence[Any]) -> Any:
        """The request whose parts are these rows; DataError if they make none."""
        raise NotImplementedError

    # What all share

    @classmethod
    def answers(cls) -> bool:
        """Whether there are requests of this kind of data."""
        return cls.read is not Requests.read

    def shape(self, items: Sequence[Item]) -> dict[str, int]:
        """Sizes of all axes but B: the shortest that hold all, or the longest."""
        needed = max((self.size(item) for item in items if item.parts), default=0)
        shapes = [resolved(s, self.sizes) for s in self.config.shapes()]
        return next((s for s in shapes if s.get(self.axis, 0) >= needed), shapes[-1])

    def batch(self, items: Sequence[Item], rows: int) -> tuple[Batch, list[int]]:
        """(a batch of exactly `rows` rows, of every item the tokens left out).

        What could not be read has no parts, and its row stays one of padding.
        """
        batch = zeros(self.config.spec(), {"B": rows, **self.shape(items)})
        left_out = [0] * len(items)
        for row, item in enumerate(items):
            if item.parts:
                left_out[row] = self.write(batch, row, item)
        return batch, left_out

    def checked(self, item: Item) -> Item:
        """The same; DataError if an id of its texts has no row in the model."""
        rows = self.sizes.get("vocab_size", 0)
        for ids in item.parts if self.tok is not None and rows else ():
            if ids.ndim == 1 and (ids >= rows).any():
                first = int(ids[ids >= rows][0])
                raise DataError(
                    f"{self.tok.show([first])!r} has id {first}, and the model "
                    f"{rows} rows; leave it out, or train a model with more rows"
                )
        return item

    def values(self, request: Any) -> tuple[list[Any], list[str]]:
        """(value of every column, what was changed in them)."""
        names = {f: getattr(self.config, f, "") for f in self.columns}
        names = {f: n for f, n in names.items() if n or f == self.columns[0]}
        if isinstance(request, Mapping):
            found = [_column(request, field, name) for field, name in names.items()]
        elif isinstance(request, str):
            found = request.split("\t", len(names) - 1)
            if not request.strip():
                found = [""] * len(names)
            if len(found) < len(names):
                wanted = " and ".join(names)
                raise DataError(f"expected {wanted} with a tab between them")
        else:
            raise DataError(
                f"{type(request).__name__} {request!r:.40} is no request; give a text "
                f"or a mapping with {', '.join(n or f for f, n in names.items())}"
            )
        notes = []
        for i, value in enumerate(found):
            if isinstance(value, str) and (text := well_formed(value)) != value:
                found[i] = text
                notes.append("replaced: halves of surrogate pairs, which are no text")
        return found, notes

    def texts(self, request: Any) -> tuple[list[str], list[str]]:
        """The same, of columns that must be texts."""
        found, notes = self.values(request)
        return [*map(as_text, found)], notes

    def labelled(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The answer of a model that gives a row one label, or a number."""
        if "number" in row:
            return {"label": float(row["number"])}
        names, best = self.codecs["label"].names, int(row["label"])
        shares = row["probabilities"]
        return {
            "label": names[best],
            "score": float(shares[best]),
            "probabilities": dict(zip(names, map(float, shares), strict=False)),
        }


def as_text(value: Any) -> str:
    """The value; DataError if it is no text."""
    if not isinstance(value, str):
        raise DataError(f"{value!r:.40} is no text; quote it")
    return value


def _column(request: Mapping[str, Any], field: str, name: str) -> Any:
    for key in (field, name):
        if key in request:
            return request[key]
    wanted = " or ".join(dict.fromkeys(repr(key) for key in (name, field) if key))
    raise DataError(
        f"it has no {wanted} but {', '.join(map(repr, request)) or 'nothing'}; name "
        "the columns as in training"
    )


def framing(config: Any, codecs: Mapping[str, Codec], sizes: Sizes) -> Framing | None:
    """What stands around the texts of a row, with types that the model has."""
    if "text" not in codecs:
        return None
    found = codecs["text"].framing(config.USE)
    return found.bounded(sizes["num_types"]) if "num_types" in sizes else found
