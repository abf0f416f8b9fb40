"""How texts become a row: the special ids around one or two of them, and types.

Rows of training, prompts and the post-processor of an exported tokenizer.json all
follow a `Framing`; that of an imported tokenizer is read from it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Piece = tuple[int | str, int]  # (special id, type), or ("A", type), ("B", type)
TEXTS = ("A", "B")
# What texts are framed for: an encoder's rows, an encoder-decoder's source, or rows of
# a language model.
USES = ("texts", "source", "prompt")


class Framed(NamedTuple):
    """A row."""

    ids: np.ndarray  # int32 [n]
    types: np.ndarray  # int32 [n]
    starts: tuple[int, ...]  # position of the first id of every text


@dataclasses.dataclass(frozen=True)
class Framing:
    """The pieces of a row of one text, and of a row of two."""

    single: tuple[Piece, ...] = (("A", 0),)
    pair: tuple[Piece, ...] = (("A", 0), ("B", 0))

    @classmethod
    def of(cls, found: Mapping[str, Sequence]) -> "Framing":
        """From what JSON made of one."""
        return cls(*(tuple(map(tuple, found[k])) for k in ("single", "pair")))

    def pieces(self, texts: int) -> tuple[Piece, ...]:
        """Those of a row of one or two texts."""
        return self.single if texts == 1 else self.pair

    def added(self, texts: int) -> int:
        """Number of special ids in a row of one or two texts."""
        return len(self.pieces(texts)) - texts

    def adds(self) -> bool:
        """Whether there are any special ids."""
        return self.added(1) + self.added(2) > 0

    def lead(self) -> tuple[int, ...]:
        """The special ids before a text."""
        return tuple(x for x, _ in self.single[: self.single.index(self._text(0))])

    def _text(self, i: int) -> Piece:
        return next(piece for piece in self.pair if piece[0] == TEXTS[i])

    def bounded(self, types: int) -> "Framing":
        """The same with types below `types`; 0: with type 0 alone."""
        most = max(0, types - 1)
        return Framing(
            *(tuple((x, min(t, most)) for x, t in p) for p in (self.single, self.pair))
        )

    def framed(self, texts: Sequence[np.ndarray]) -> Framed:
        """The row of one or two texts' ids."""
        parts, types, starts, at = [], [], {}, 0
        for x, kind in self.pieces(len(texts)):
            if x in TEXTS:
                starts[x] = at
            ids = texts[TEXTS.index(x)] if x in TEXTS else [x]
            parts.append(np.asarray(ids, np.int32))
            types += [kind] * len(ids)
            at += len(ids)
        positions = tuple(starts[x] for x in TEXTS[: len(texts)])
        return Framed(np.concatenate(parts), np.array(types, np.int32), positions)


def around(
    lead: Sequence[int],
    between: Sequence[int],
    end: Sequence[int],
    second: int = 0,
) -> Framing:
    """LEAD A END, and LEAD A BETWEEN B END with type `second` from B on."""
    first = (*((i, 0) for i in lead), ("A", 0))
    return Framing(
        (*first, *((i, 0) for i in end)),
        (
            *first,
            *((i, 0) for i in between),
            ("B", second),
            *((i, second) for i in end),
        ),
    )


def twice(lead: Sequence[int], end: Sequence[int]) -> Framing:
    """LEAD A END, and LEAD A END LEAD B END with type 1 from the second LEAD on."""
    single = (*((i, 0) for i in lead), ("A", 0), *((i, 0) for i in end))
    second = tuple(("B" if x == "A" else x, 1) for x, _ in single)
    return Framing(single, single + second)


# --- Post-processors of a tokenizer.json ---


def _template(found: Mapping[str, Any]) -> Framing:
    """{"type": "TemplateProcessing", ...}."""
    ids = {name: x["ids"] for name, x in found["special_tokens"].items()}

    def pieces(name: str) -> tuple[Piece, ...]:
        made: list[Piece] = []
        for piece in found[name]:
            if text := piece.get("Sequence"):
                made.append((text["id"], text["type_id"]))
            else:
                token = piece["SpecialToken"]
                made += [(i, token["type_id"]) for i in ids[token["id"]]]
        wanted = TEXTS[: 1 + (name == "pair")]
        if tuple(x for x, _ in made if x in TEXTS) != wanted:
            raise ValueError(
                f"its post-processor's {name!r} is not {', '.join(wanted)}"
            )
        return tuple(made)

    return Framing(pieces("single"), pieces("pair"))


def _ends(found: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return [found["cls"][1]], [found["sep"][1]]


def _bert(found: Mapping[str, Any]) -> Framing:
    cls, sep = _ends(found)
    return around(cls, sep, sep, second=1)


def _roberta(found: Mapping[str, Any]) -> Framing:
    cls, sep = _ends(found)
    return around(cls, sep * 2, sep)


# Type of a post-processor -> its framing.
PROCESSORS: dict[str, Callable[[Mapping[str, Any]], Framing]] = {
    "TemplateProcessing": _template,
    "BertProcessing": _bert,
    "RobertaProcessing": _roberta,
    "ByteLevel": lambda found: Framing(),  # about offsets only
}


def from_processor(found: Mapping[str, Any] | None) -> Framing | None:
    """The framing of a post-processor of a tokenizer.json; None if it adds nothing.

    ValueError for one that cannot be read.
    """
    if found is None:
        return None
    parts = found["processors"] if found["type"] == "Sequence" else [found]
    if unknown := [p["type"] for p in parts if p["type"] not in PROCESSORS]:
        raise ValueError(
            f"its post-processor is {unknown[0]}, expected one of "
            f"{', '.join(PROCESSORS)}"
        )
    made = [PROCESSORS[p["type"]](p) for p in parts]
    adding = [framing for framing in made if framing.adds()]
    if len(adding) > 1:
        raise ValueError("two of its post-processors add special tokens")
    return adding[0] if adding else None


def to_processor(framing: Framing, tokens: Sequence[str]) -> dict[str, Any]:
    """The post-processor of a tokenizer.json; `tokens` are its vocabulary, by id."""

    def piece(x: int | str, kind: int) -> dict[str, Any]:
        name, shown = ("Sequence", x) if x in TEXTS else ("SpecialToken", tokens[x])
        return {name: {"id": shown, "type_id": kind}}

    used = {x for x, _ in (*framing.single, *framing.pair)} - {*TEXTS}
    return {
        "type": "TemplateProcessing",
        "single": [piece(*p) for p in framing.single],
        "pair": [piece(*p) for p in framing.pair],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
            for i in sorted(used)
        },
    }
