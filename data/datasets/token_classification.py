"""Words, and a class or number for each of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.text import BY_CHARACTER
from triform.data.codecs.tokenizer import well_formed
from triform.data.datasets.base import TARGETS, Dataset, Epoch, labels, spread
from triform.data.datasets.requests import Item, Requests
from triform.data.datasets.sequence_classification import (
    EncoderInputsConfig,
    write_texts,
)
from triform.data.store import Feature, each
from triform.runtime.errors import DataError


@dataclasses.dataclass
class TokenClassificationConfig(EncoderInputsConfig):
    """Words are the items of a list, or the characters of a text; so are their tags."""

    SPECIALS: ClassVar[tuple[str, ...]] = ("[CLS]", "[SEP]")

    tokens: str = "tokens"  # the feature that is read: a list of words, or a text
    tags: str = "tags"  # the feature that is predicted: one for every word
    target: str = "class"  # what a tag is: "class" or "number"
    mask: str = ""  # a feature with 1 for words that count, else 0; empty: all count

    def spec(self) -> Spec:
        """Words in pieces, and a tag at the first piece of each."""
        tags = Field("BL", below="num_tags")
        if self.target == "number":
            tags = Field("BL", "float32")
        return {
            "inputs": Field("BL", below="vocab_size", counts="segments"),
            "segments": Field("BL"),
            **self.marks(),
            "targets": tags,
            "weights": Field("BL", "float32"),
        }

    def classes(self) -> dict[str, str]:
        """The tags, unless they are numbers."""
        return {"tags": "num_tags"} if self.target == "class" else {}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        rule = f"expected one of {', '.join(TARGETS)}"
        self.require(self.target in TARGETS, "target", rule)

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        words = Feature("tokens", self.source, self.tokens, divide=each)
        fields = ("tags", "mask") if self.mask else ("tags",)
        values = (
            Feature(
                field, self.source, getattr(self, field), divide=each, is_text=False
            )
            for field in fields
        )
        return (words, *values)


class Tagged(Requests):
    """Words, each of which a model gives a tag.

    A text is divided at spaces, or into its characters if the tokenizer is one of
    characters or residues.
    """

    columns, gives = ("tokens",), ("tags",)

    def read(self, request: Any) -> Item:
        """Ids of all words; `at` is where each begins."""
        if isinstance(request, list | tuple):
            request = {"tokens": request}
        (value,), notes = self.values(request)
        if isinstance(value, str):
            by_character = self.config.tokenizer.kind in BY_CHARACTER
            value = list(value.strip()) if by_character else value.split()
        words = [well_formed(str(word)) for word in each(value)]
        ids = self.tok.encode_batch(words)
        begins = np.cumsum([0, *map(len, ids)])
        return Item([np.concatenate(ids)] if words else [], words, notes, begins)

    def size(self, item: Item) -> int:
        """The words and what stands around them."""
        return sum(map(len, item.parts)) + self.framing.added(1)

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """Words shortened to the row; `at` becomes the position of each, -1: none."""
        room = batch["inputs"].shape[1] - self.framing.added(1)
        ids, begins = item.parts[0][:room], item.at
        positions = write_texts(
            batch, row, [ids], self.framing, self.config.global_tokens
        )
        kept = (np.diff(begins) > 0) & (begins[:-1] < len(ids))
        item.at = np.where(kept, positions[0] + begins[:-1], -1)
        batch["weights"][row, item.at[kept]] = 1
        return len(item.parts[0]) - len(ids)

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Every word with its tag; None where it was not read."""
        tags = named(self.config, self.codecs, row["targets"][np.maximum(item.at, 0)])
        found = zip(item.shown, tags, item.at.tolist(), strict=True)
        return {"tags": [(word, tag if at >= 0 else None) for word, tag, at in found]}


class TokenClassification(Dataset):
    """Row: [CLS] words [SEP], or as the tokenizer frames them; targets are the tags.

    A word's tag is at its first piece; other pieces and masked words weigh 0. Each word
    is tokenised by itself.
    """

    requests = Tagged

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        opened = store.open_store(config, split, self.tok, config.features())
        self.digest, self.words = opened.digest, opened.tokens["tokens"]
        for field, first in opened.first.items():
            counts, words = np.diff(first), np.diff(self.words.first)
            if (counts != words).any():
                example = int(np.flatnonzero(counts != words)[0])
                raise DataError(
                    f"{self.describe(example)}: {counts[example]} in "
                    f"data.{field}={getattr(config, field)!r} for {words[example]} "
                    "words; correct the corpus"
                )
        items = np.repeat(np.arange(len(words)), words)
        self._tags = labels(self, "tags", opened.values["tags"], items)
        mask = opened.values.get("mask", np.ones(len(self._tags), int)).astype(str)
        if not np.isin(mask, ("0", "1")).all():
            raise DataError(f"data.mask={config.mask!r}: must hold 0 and 1 only")
        self._weights = mask.astype(np.float32)
        sizes = np.diff(self.words.offsets[self.words.first])
        self.empty = sizes == 0
        self.sizes = {"L": sizes + self.framing.added(1)}

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The words, shortened to the row."""
        ids, words, begins = self._read(item, batch["inputs"].shape[1])
        positions = write_texts(
            batch, row, [ids], self.framing, self.config.global_tokens
        )
        at = positions[0] + begins
        batch["targets"][row, at] = self._tags[words]
        batch["weights"][row, at] = self._weights[words]

    def _read(self, item: int, length: int) -> tuple[np.ndarray, ...]:
        """Of a row of this length: ids, the words that have a piece in it, and where
        among the ids each of these begins.
        """
        first, last = self.words.first[item : item + 2]
        start, *begins = self.words.offsets[first : last + 1].tolist()
        room = length - self.framing.added(1)
        ids = self.words.ids[start : begins[-1] if begins else start][:room]
        ends = np.array(begins, np.int64) - start
        begins = np.array([0, *ends[:-1]], np.int64)[: len(ends)]
        kept = (ends > begins) & (begins < len(ids))
        return ids, first + np.flatnonzero(kept), begins[kept]

    def remarks(self) -> list[str]:
        """The range of the numbers that are predicted."""
        return spread(self.config, "tags", self._tags)

    def truth(self, item: int) -> dict[str, Any]:
        """The tags of the words that `decoded` gives the found ones of."""
        _, words, _ = self._read(item, self.config.max_len)
        tags = self._tags[words[self._weights[words] > 0]]
        return {"true_tags": named(self.config, self.codecs, tags)}

    def preview(self, batch: Batch) -> str:
        """The first row for the eye, some lines."""
        real = batch["weights"][0] > 0
        tags = batch["targets"][0][real][:32]
        tags = " ".join(map(str, named(self.config, self.codecs, tags)))
        text = self.tok.show(batch["inputs"][0][batch["segments"][0] > 0])
        return f"  {'inputs':17}{text:.300}\n  {'tags':17}{tags}"

    def input_text(self, item: int) -> str:
        """The words of an item."""
        return self._texts(item)[0]

    def decoded(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The tag of every word that has a piece in the row and is not masked."""
        chosen = row["targets"][row["weights"] > 0]
        tags = named(self.config, self.codecs, chosen)
        return super().decoded(row) | {"tags": tags}


def named(config: Any, codecs: Mapping[str, Codec], tags: np.ndarray) -> list:
    """Names of tags that are classes, or numbers."""
    return codecs["tags"].decode(tags) if config.classes() else tags.tolist()
