"""Words and a class for each of them."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.codecs.text import Tokenizer
from triform.data.datasets.base import Batch, Dataset, Epoch, Limits
from triform.data.datasets.sequence_classification import (
    EncoderInputsConfig,
    check_classes,
    numbered,
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
    mask: str = ""  # a feature with 1 for words that count, else 0; empty: all count

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        words = Feature("tokens", self.source, self.tokens, cut=each)
        fields = ("tags", "mask") if self.mask else ("tags",)
        values = (
            Feature(field, self.source, getattr(self, field), cut=each, is_text=False)
            for field in fields
        )
        return (words, *values)


class TokenClassification(Dataset):
    """Row: [CLS] words [SEP]; targets are the tags.

    A word's tag is at its first piece; other pieces and masked words weigh 0. Each word
    is tokenised by itself. `labels` are the names of the tags.
    """

    def __init__(self, config: Any, split: str, tok: Tokenizer, limits: Limits):
        super().__init__(config, split, tok, limits)
        opened = store.open_store(config, split, tok, config.features())
        self.digest, self.words = opened.digest, opened.tokens["tokens"]
        for field, first in opened.first.items():
            counts, words = np.diff(first), np.diff(self.words.first)
            if (counts != words).any():
                example = int(np.flatnonzero(counts != words)[0])
                raise DataError(
                    f"{self.describe(example)}: {counts[example]} in "
                    f"data.{field}={getattr(config, field)!r} for {words[example]} "
                    "words; mend the corpus"
                )
        self.labels, self._tags = numbered(config, tok, "tags", opened.values["tags"])
        known = limits.get("targets", 0)
        check_classes(config, "tags", self.labels, known, "model.num_tags")
        mask = opened.values.get("mask", np.ones(len(self._tags), int)).astype(str)
        if not np.isin(mask, ("0", "1")).all():
            raise DataError(f"data.mask={config.mask!r}: must hold 0 and 1 only")
        self._weights = mask.astype(np.float32)
        sizes = np.diff(self.words.offsets[self.words.first])
        self.sizes = np.where(sizes == 0, -1, sizes + 1 + (tok.cls is not None))

    @staticmethod
    def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
        """Every key of a batch, zero."""
        names = ("inputs", "segments", "targets", *config.marks())
        batch = {name: np.zeros((rows, length), np.int32) for name in names}
        return batch | {"weights": np.zeros((rows, length), np.float32)}

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The words, cut to the row."""
        room = batch["inputs"].shape[1] - 1 - (self.tok.cls is not None)
        first, last = self.words.first[item : item + 2]
        begins = self.words.offsets[first : last + 1]
        ids = self.words.ids[begins[0] : begins[-1]][:room]
        places = write_texts(batch, row, [ids], self.tok, self.config.global_tokens)
        # Words that have a piece, and have it in the row.
        kept = (np.diff(begins) > 0) & (begins[:-1] - begins[0] < len(ids))
        at = places[0] + begins[:-1][kept] - begins[0]
        batch["targets"][row, at] = self._tags[first:last][kept]
        batch["weights"][row, at] = self._weights[first:last][kept]

    def preview(self, batch: Batch, tok: Tokenizer) -> str:
        """The first row for the eye, some lines."""
        real = batch["weights"][0] > 0
        tags = " ".join(self.labels[i] for i in batch["targets"][0][real][:32])
        text = tok.show(batch["inputs"][0][batch["segments"][0] > 0])
        return f"  {'inputs':17}{text:.300}\n  {'tags':17}{tags}"
