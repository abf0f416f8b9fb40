"""One or two texts, and a class or number for them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.framing import Framing
from triform.data.datasets.base import (
    TARGETS,
    Dataset,
    Epoch,
    TextConfig,
    labels,
    spread,
)
from triform.data.datasets.requests import Item, Requests
from triform.data.store import Feature


@dataclasses.dataclass
class EncoderInputsConfig(TextConfig):
    """Rows for an encoder: [CLS] text [SEP], or two texts."""

    USE: ClassVar[str] = "texts"
    GLOBALS: ClassVar[tuple[str, ...]] = ("none", "first")

    # Which positions see all and are seen by all beyond the model's windows (Beltagy
    # et al. 2020, 3.1): "first", the class token; "question", all of the first of two
    # texts too.
    global_tokens: str = "none"

    def marks(self) -> dict[str, Field]:
        """The field of a batch that marks them, if there are any."""
        return (
            {"global_attention_mask": Field("BL")}
            if self.global_tokens != "none"
            else {}
        )

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(
            self.global_tokens in self.GLOBALS,
            "global_tokens",
            f"expected one of {', '.join(self.GLOBALS)}",
        )


@dataclasses.dataclass
class SequenceClassificationConfig(EncoderInputsConfig):
    """One or two texts, and the class of them, or a number."""

    SPECIALS: ClassVar[tuple[str, ...]] = ("[CLS]", "[SEP]")
    GLOBALS: ClassVar[tuple[str, ...]] = ("none", "first", "question")

    first: str = "text"  # the feature that is read
    second: str = ""  # another one, read after it; empty: none
    label: str = "label"  # the feature that is predicted
    target: str = "class"  # what a label is: "class" or "number"
    truncate: bool = False  # train on longer items too, shortened as in evaluation

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        fields = ("first", "second") if self.second else ("first",)
        texts = (Feature(field, self.source, getattr(self, field)) for field in fields)
        return (*texts, Feature("label", self.source, self.label, is_text=False))

    def spec(self) -> Spec:
        """Texts with types, and a label per row."""
        label = Field("B", below="num_labels")
        if self.target == "number":
            label = Field("B", "float32")
        return {
            "inputs": Field("BL", below="vocab_size", counts="segments"),
            "segments": Field("BL"),
            "token_type_ids": Field("BL", below="num_types"),
            **self.marks(),
            "label": label,
            "label_weights": Field("B", "float32"),
        }

    def classes(self) -> dict[str, str]:
        """The label, unless it is a number."""
        return {"label": "num_labels"} if self.target == "class" else {}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        rule = f"expected one of {', '.join(TARGETS)}"
        self.require(self.target in TARGETS, "target", rule)
        self.require(
            self.global_tokens != "question" or self.second != "",
            "global_tokens",
            "a question is the first of two texts; name the other in data.second",
        )


class Classified(Requests):
    """One or two texts, of which a model gives the class or a number."""

    columns, gives = ("first", "second"), ("label", "score", "probabilities")

    def __init__(self, config: Any, codecs: Mapping[str, Codec], sizes: Sizes):
        super().__init__(config, codecs, sizes)
        if config.target == "number":
            self.gives = ("label",)

    def read(self, request: Any) -> Item:
        """Ids of the texts."""
        texts, notes = self.texts(request)
        shown = "\t".join(texts)
        ids = self.tok.encode(texts, specials=True) if shown.strip() else []
        return Item(ids, shown, notes)

    def size(self, item: Item) -> int:
        """The texts and what stands around them."""
        return sum(map(len, item.parts)) + self.framing.added(len(item.parts) or 1)

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """Shortened as in evaluation."""
        texts = shortened(item.parts, batch["inputs"].shape[1], self.framing)
        if texts:
            write_texts(batch, row, texts, self.framing, self.config.global_tokens)
        return sum(map(len, item.parts)) - sum(map(len, texts))

    def answer(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Label and probabilities, or a number."""
        return self.labelled(row)


class SequenceClassification(Dataset):
    """Row: one or two texts as the tokenizer frames them, and the label.

    Of a tokenizer that does not: [CLS] first [SEP] second [SEP], or without these first
    EOS second EOS.
    """

    requests = Classified

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        self.truncates = config.truncate
        opened = store.open_store(config, split, self.tok, config.features())
        self.digest = opened.digest
        self.texts = list(opened.tokens.values())
        sizes = np.stack([tokens.sizes() for tokens in self.texts])
        self.empty = sizes.min(0) == 0
        self.sizes = {"L": sizes.sum(0) + self.framing.added(len(self.texts))}
        self._label = labels(self, "label", opened.values["label"])

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Texts whose sum is too long lose their ends, the longer one first."""
        texts = [tokens[item] for tokens in self.texts]
        texts = shortened(texts, batch["inputs"].shape[1], self.framing)
        write_texts(batch, row, texts, self.framing, self.config.global_tokens)
        batch["label"][row] = self._label[item]
        batch["label_weights"][row] = 1

    def preview(self, batch: Batch) -> str:
        """The first row for the eye, some lines."""
        label = batch["label"][0]
        shown = self.codecs["label"].names[label] if self.config.classes() else label
        return f"{super().preview(batch)}\n  {'label':17}{shown}"

    def remarks(self) -> list[str]:
        """The range of the numbers that are predicted."""
        return spread(self.config, "label", self._label)

    def truth(self, item: int) -> dict[str, Any]:
        """The name of its class; that of numbers stands in predictions."""
        if not self.config.classes():
            return {}
        return {"true_label": self.codecs["label"].names[self._label[item]]}

    def input_text(self, item: int) -> str:
        """The texts of an item, a tab between them."""
        return "\t".join(self._texts(item))


def shortened(
    texts: Sequence[np.ndarray], length: int, around: Framing
) -> list[np.ndarray]:
    """One or two texts that fit into a row of this length."""
    if not texts:
        return []
    sizes = fitted([len(ids) for ids in texts], length - around.added(len(texts)))
    return [ids[:n] for ids, n in zip(texts, sizes, strict=True)]


def fitted(sizes: list[int], room: int) -> list[int]:
    """Sizes of one or two texts shortened to `room` in all, the longer one first."""
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    over = max(0, sum(sizes) - room)
    gap = min(over, abs(sizes[0] - sizes[1]))
    removed = [(over - gap) // 2, (over - gap + 1) // 2]
    removed[sizes[0] <= sizes[1]] += gap
    return [size - less for size, less in zip(sizes, removed, strict=True)]


def write_texts(
    batch: Batch,
    row: int,
    texts: list[np.ndarray],
    around: Framing,
    global_tokens: str,
) -> np.ndarray:
    """Writes a row of one or two texts; the positions of their ids, ascending."""
    ids, types, starts = around.framed(texts)
    batch["inputs"][row, : len(ids)] = ids
    batch["segments"][row, : len(ids)] = 1
    if "token_type_ids" in batch:
        batch["token_type_ids"][row, : len(ids)] = types
    positions = [
        np.arange(at, at + len(x)) for at, x in zip(starts, texts, strict=True)
    ]
    if global_tokens != "none":
        question = starts[0] + len(texts[0])
        batch["global_attention_mask"][
            row, : question if global_tokens == "question" else 1
        ] = 1
    return np.concatenate(positions)
