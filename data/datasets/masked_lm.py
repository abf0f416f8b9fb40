"""BERT's pre-training: masked tokens, and whether one text follows another."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.datasets.base import Dataset, Epoch
from triform.data.datasets.requests import Item, Requests
from triform.data.datasets.sequence_classification import (
    EncoderInputsConfig,
    fitted,
    shortened,
    write_texts,
)
from triform.data.store import Feature
from triform.runtime.errors import DataError

MASK = "[MASK]"  # in a request, whatever the tokenizer calls it
# The end of a sentence: a mark and closing quotes or brackets, then space, then a
# capital letter, which may be quoted; but not after a title or an initial.
_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])"
    "([.!?][\"'\u201d\u2019)\\]]*)\\s+(?=[\"'\u201c\u2018(\\[]?[A-Z\u00c0-\u00de])"
)


def sentences(text: Any) -> list:
    """The sentences of a text: lines, split where a sentence seems to end."""
    if not isinstance(text, str):
        return [text]
    lines = _END.sub(r"\1\n", text).split("\n")
    return [line.strip() for line in lines if not line.isspace() and line]


@dataclasses.dataclass
class MaskedLMConfig(EncoderInputsConfig):
    """Documents divided into sequences of sentences; new masks in every epoch."""

    SPECIALS: ClassVar[tuple[str, ...]] = ("[CLS]", "[SEP]", "[MASK]")

    text: str = "text"  # name of the text feature; one document per example
    next_sentence: bool = True  # add next-sentence prediction; False: one text per row
    mask_rate: float = 0.15  # share of text tokens that is masked
    whole_word: bool = False  # mask all pieces of a word or none
    short_rate: float = 0.1  # share of sequences with a random, shorter length

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return (Feature("text", self.source, self.text, divide=sentences),)

    def spec(self) -> Spec:
        """Masked texts; with next_sentence also a label per row."""
        chosen = Field("BP", below="vocab_size")
        spec = {
            "inputs": Field("BL", below="vocab_size", counts="segments"),
            "segments": Field("BL"),
            **self.marks(),
            "masked_positions": Field("BP"),
            "targets": chosen,
            "weights": Field("BP", "float32"),
        }
        if self.next_sentence:
            spec |= {
                "token_type_ids": Field("BL", below="num_types"),
                "label": Field("B", below="num_labels"),
                "label_weights": Field("B", "float32"),
            }
        return spec

    def shapes(self) -> tuple[Shape, ...]:
        """One per row length."""
        return tuple({"L": n, "P": self.predicted(n)} for n in self.lengths())

    def predicted(self, length: int) -> int:
        """Positions to predict in a row, at most."""
        return math.ceil(self.mask_rate * length)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        shortest = self.lengths()[0]
        self.require(
            shortest >= 5,
            "max_len",
            "rows must have at least 5 positions, buckets' too",
        )
        self.require(0 < self.mask_rate < 1, "mask_rate", "must lie between 0 and 1")
        self.require(0 <= self.short_rate <= 1, "short_rate", "must lie in [0, 1]")


class Blanks(Requests):
    """Texts in which '[MASK]', or the tokenizer's own name of it, is to be filled."""

    columns, gives = ("text",), ("text", "score", "filled")
    example = "... [MASK] ..."

    def read(self, request: Any) -> Item:
        """Ids of a text with its masks."""
        (text,), notes = self.texts(request)
        own = text.replace(MASK, self.tok.names[self.tok.mask])
        ids = self.tok.encode([own], specials=True) if text.strip() else []
        if ids and self.tok.mask not in ids[0]:
            notes.append("no [MASK] in it: nothing was filled")
        return Item(ids, text, notes)

    def size(self, item: Item) -> int:
        """The text and what stands around it."""
        return sum(map(len, item.parts)) + self.framing.added(1)

    def shape(self, items: Sequence[Item]) -> dict[str, int]:
        """With as many masked positions as a request has."""
        most = max(
            int((np.concatenate([[], *x.parts]) == self.tok.mask).sum()) for x in items
        )
        return super().shape(items) | {"P": 1 << max(0, most - 1).bit_length()}

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """A text shortened to the row; `at` is the number of its masks in it."""
        texts = shortened(item.parts, batch["inputs"].shape[1], self.framing)
        if texts:
            write_texts(batch, row, texts, self.framing, self.config.global_tokens)
        chosen = np.flatnonzero(batch["inputs"][row] == self.tok.mask)
        chosen = chosen[batch["segments"][row, chosen] > 0]
        item.at = len(chosen)
        batch["masked_positions"][row, : item.at] = chosen
        return sum(map(len, item.parts)) - sum(map(len, texts))

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Candidates of every mask with their probabilities; the text of the best."""
        filled, best = [], []
        for ids, shares in zip(row["candidates"], row["shares"], strict=True):
            names = self._names(ids.tolist())
            filled.append(dict(zip(names, map(float, shares), strict=True)))
            best.append(names[0])
        filled, best = filled[: item.at], best[: item.at]
        score = sum(math.log(max(max(x.values()), 1e-30)) for x in filled)
        return {"text": self._text(item.shown, best), "score": score, "filled": filled}

    def _names(self, ids: list[int]) -> list[str]:
        """What each id stands for, no two the same: its text, or else its piece."""
        names: list[str] = []
        for i in ids:
            name = self.tok.show([i]).strip()
            plain = name and name not in names and "\ufffd" not in name
            names.append(name if plain or i >= len(self.tok.pieces) else "")
            names[-1] = names[-1] or self.tok.pieces[i]
        return names

    def _text(self, text: str, best: list[str]) -> str:
        """The text with its first masks replaced; a piece of a word joins it."""
        pattern = "|".join(map(re.escape, (MASK, self.tok.names[self.tok.mask])))
        parts = re.split(f"({pattern})", text)
        for i, name in enumerate(best):
            joiner = self.tok.joiner
            if joiner and name.startswith(joiner):
                parts[2 * i], name = parts[2 * i].rstrip(" "), name[len(joiner) :]
            parts[2 * i + 1] = name
        return "".join(parts)


class MaskedLM(Dataset):
    """Row: A and B as the tokenizer frames them, as [CLS] A [SEP] B [SEP], and the ids
    at the masked positions.

    Devlin et al. 2019, 3.1 and its create_pretraining_data.py. An item is a run of
    sentences of one document that just fills a row, or with `short_rate` is of random
    length. A is a random number of its first sentences. B is the rest of it (label 0)
    or, in half of the rows and where there is no rest, as much of another document from
    a random sentence on (label 1). What is too long loses tokens at either end.

    Of the positions to predict 80 % are masked, 10 % hold a random id, 10 % are left.
    """

    requests = Blanks

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        missing = [k for k in ("cls", "sep", "mask") if getattr(self.tok, k) is None]
        if missing:
            raise DataError(
                f"data.tokenizer.path={config.tokenizer.path!r}: it has no token for "
                f"{', '.join(missing)}; name ids in special_tokens.json beside it, or "
                "train a new one"
            )
        opened = store.open_store(config, split, self.tok, config.features())
        self.digest, self.tokens = opened.digest, opened.tokens["text"]
        first = self.tokens.first
        self.documents = np.flatnonzero(np.diff(first))  # with sentences
        if config.next_sentence and len(self.documents) < 2:
            raise DataError(
                f"{self.title()}: has a single document, and sentences of another are "
                "needed; take a larger split, or set data.next_sentence=False and "
                "--config.task=TokenPredictionConfig"
            )
        added = self.framing.added(2 if config.next_sentence else 1)
        self._runs(config.max_len - added)
        offsets = self.tokens.offsets
        sizes = offsets[self.stop] - offsets[self.start]
        self.sizes = {"L": np.minimum(sizes + added, config.max_len)}
        self.empty = np.zeros(len(sizes), bool)
        ids = np.arange(len(self.tok.pieces))
        self.ordinary = ids[~np.isin(ids, list(self.tok.names))]

    def _runs(self, most: int) -> None:
        """Sets `start`, `stop` (sentences), `aim` (tokens), `document` of all runs."""
        rng, short = np.random.default_rng(0), self.config.short_rate
        offsets, first = self.tokens.offsets, self.tokens.first
        runs = []
        for document in self.documents.tolist():
            start, end = int(first[document]), int(first[document + 1])
            while start < end:
                aim = int(rng.integers(2, most + 1)) if rng.random() < short else most
                reached = int(np.searchsorted(offsets, offsets[start] + aim))
                stop = min(max(reached, start + 1), end)
                runs.append((start, stop, aim, document))
                start = stop
        runs = np.array(runs, np.int64).reshape(-1, 4)
        runs = runs[offsets[runs[:, 0]] < offsets[runs[:, 1]]]
        self.start, self.stop, self.aim, self.document = runs.T

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Writes a run, or part of it and another text, and masks it."""
        rng = epoch.rng(item)
        length = batch["inputs"].shape[1]
        if self.config.next_sentence:
            texts, label = self._pair(item, length - self.framing.added(2), rng)
            batch["label"][row] = label
            batch["label_weights"][row] = 1
        else:
            room = length - self.framing.added(1)
            texts = [self._between(self.start[item], self.stop[item])[:room]]
        positions = write_texts(
            batch, row, texts, self.framing, self.config.global_tokens
        )
        ids = batch["inputs"][row]
        count = max(1, round(self.config.mask_rate * len(positions)))
        if self.config.whole_word:
            chosen = self._words(ids, positions, count, rng)
        else:
            chosen = np.sort(rng.permutation(positions)[:count])
        n = len(chosen)
        batch["masked_positions"][row, :n] = chosen
        batch["targets"][row, :n] = ids[chosen]
        batch["weights"][row, :n] = 1
        fate = rng.random(n)
        other = self.ordinary[rng.integers(len(self.ordinary), size=n)]
        shown = np.where(fate < 0.9, other, ids[chosen])
        ids[chosen] = np.where(fate < 0.8, self.tok.mask, shown)

    def _between(self, start: int, stop: int) -> np.ndarray:
        offsets = self.tokens.offsets
        return self.tokens.ids[offsets[start] : offsets[stop]]

    def _pair(
        self, item: int, room: int, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], int]:
        """A and B, `room` tokens at most in all, and the label."""
        start, stop = int(self.start[item]), int(self.stop[item])
        middle = start + 1 if stop - start < 3 else int(rng.integers(start + 1, stop))
        first = self._between(start, middle)
        label = int(middle == stop or rng.random() < 0.5)
        second = self._between(middle, stop)
        if label:
            # As long as the rest it stands for, so that its length does not tell.
            aim = len(second) or max(1, int(self.aim[item]) - len(first))
            second = self._elsewhere(int(self.document[item]), aim, rng)
        texts = [first, second]
        sizes = fitted([len(first), len(second)], room)
        for i, size in enumerate(sizes):
            if over := len(texts[i]) - size:
                front = int(rng.binomial(over, 0.5))
                texts[i] = texts[i][front : front + size]
        return texts, label

    def _elsewhere(
        self, document: int, aim: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Sentences of another document, of at least `aim` tokens if it has them."""
        others, offsets = self.documents, self.tokens.offsets
        own = int(np.searchsorted(others, document))
        drawn = int(rng.integers(len(others) - 1))
        other = others[drawn + (drawn >= own)]
        begin, end = self.tokens.first[other : other + 2].tolist()
        start = int(rng.integers(begin, end))
        stop = int(np.searchsorted(offsets, offsets[start] + aim))
        return self._between(start, min(max(stop, start + 1), end))

    def _words(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        count: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Positions of random words, without those that would make too many."""
        begins = ~self.tok.continues[ids[positions]]
        begins[0] = True
        begins[1:] |= np.diff(positions) > 1  # the first of the second text
        bounds = np.append(np.flatnonzero(begins), len(positions))
        lengths = np.diff(bounds)
        chosen, left = [], count
        order = rng.permutation(len(lengths)).tolist()
        for word in order:
            if lengths[word] <= left:
                chosen.append(positions[bounds[word] : bounds[word + 1]])
                left -= lengths[word]
                if not left:
                    break
        if not chosen:  # all are longer: a part of one
            return positions[bounds[order[0]] :][:count]
        return np.sort(np.concatenate(chosen))

    def example(self, item: int) -> Mapping[str, Any]:
        """{}: a row is not an example of the source."""
        return {}

    def describe(self, item: int) -> str:
        """'classic_books train, run 7'."""
        return f"{self.title()}, run {item}"
