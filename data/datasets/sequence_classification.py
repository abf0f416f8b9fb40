"""One or two texts, and a class or number for the whole."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.codecs.text import Tokenizer
from triform.data.datasets.base import Batch, Dataset, Epoch, Limits, TextConfig
from triform.data.store import Feature
from triform.runtime.errors import DataError


@dataclasses.dataclass
class EncoderInputsConfig(TextConfig):
    """Rows for an encoder: [CLS] text [SEP], or two texts."""

    GLOBALS: ClassVar[tuple[str, ...]] = ("none", "first")

    # Which places see all and are seen by all past the model's windows (Beltagy et al.
    # 2020, 3.1): "first", the class token; "question", the first of two texts too.
    global_tokens: str = "none"

    def marks(self) -> tuple[str, ...]:
        """The batch's key for them, if there are any."""
        return () if self.global_tokens == "none" else ("global_attention_mask",)

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
    """Numbers are predicted if the model's num_labels is 1, else classes."""

    SPECIALS: ClassVar[tuple[str, ...]] = ("[CLS]", "[SEP]")
    GLOBALS: ClassVar[tuple[str, ...]] = ("none", "first", "question")

    first: str = "text"  # the feature that is read
    second: str = ""  # another one, read after it; empty: none
    label: str = "label"  # the feature that is predicted
    cut: bool = False  # train on longer items, cut as in evaluation

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        fields = ("first", "second") if self.second else ("first",)
        texts = (Feature(field, self.source, getattr(self, field)) for field in fields)
        return (*texts, Feature("label", self.source, self.label, is_text=False))

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(
            self.global_tokens != "question" or self.second != "",
            "global_tokens",
            "a question is the first of two texts; name the other in data.second",
        )


class SequenceClassification(Dataset):
    """Row: [CLS] first [SEP] second [SEP], and the label.

    Of a tokenizer without [CLS] and [SEP]: first EOS second EOS. `labels` are the names
    of the classes, () if numbers are predicted.
    """

    def __init__(self, config: Any, split: str, tok: Tokenizer, limits: Limits):
        super().__init__(config, split, tok, limits)
        self.cut = config.cut
        opened = store.open_store(config, split, tok, config.features())
        self.digest = opened.digest
        self.texts = list(opened.tokens.values())
        sizes = np.stack([tokens.sizes() for tokens in self.texts])
        added = (tok.cls is not None) + len(self.texts)
        self.sizes = np.where(sizes.min(0) == 0, -1, sizes.sum(0) + added)
        values, known = opened.values["label"], limits.get("label", 0)
        self.labels, self._label = (), values
        if known == 1 and values.dtype.kind != "U":
            return
        if values.dtype.kind == "f":
            raise DataError(
                f"data.label={config.label!r}: holds numbers, which need "
                f"model.num_labels=1, not {known}; set it and a task of regression"
            )
        self.labels, self._label = numbered(config, tok, "label", values)
        check_classes(config, "label", self.labels, known, "model.num_labels")

    @staticmethod
    def empty(config: Any, rows: int, length: int, limits: Limits) -> Batch:
        """Every key of a batch, zero."""
        names = ("inputs", "segments", "token_type_ids", *config.marks())
        batch = {name: np.zeros((rows, length), np.int32) for name in names}
        kind = np.float32 if limits.get("label") == 1 else np.int32
        label = np.zeros(rows, kind)
        return batch | {"label": label, "label_weights": np.zeros(rows, np.float32)}

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """Texts whose sum is too long lose their ends, the longer one first."""
        texts = [tokens[item] for tokens in self.texts]
        length = batch["inputs"].shape[1]
        room = length - (self.tok.cls is not None) - len(texts)
        sizes = fitted([len(ids) for ids in texts], room)
        cut = [ids[:n] for ids, n in zip(texts, sizes, strict=True)]
        write_texts(batch, row, cut, self.tok, self.config.global_tokens)
        batch["label"][row] = self._label[item]
        batch["label_weights"][row] = 1

    def preview(self, batch: Batch, tok: Tokenizer) -> str:
        """The first row for the eye, some lines."""
        label = batch["label"][0]
        shown = self.labels[label] if self.labels else label
        return f"{super().preview(batch, tok)}\n  {'label':17}{shown}"


def numbered(
    config: Any, tok: Tokenizer, field: str, values: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of a feature's classes, and the number of each value.

    Without names in the source, the classes are the distinct texts of the training
    split, sorted, or the numbers up to its largest.
    """
    feature = next(f for f in config.features() if f.field == field)
    names = store.class_names(config, feature)
    if not names:
        features = config.features()
        train = store.open_store(config, config.train_split, tok, features)
        seen = train.values[field]
        texts = seen.dtype.kind == "U"
        names = tuple(
            np.unique(seen).tolist() if texts else map(str, range(int(seen.max()) + 1))
        )
    if values.dtype.kind != "U":
        return names, values
    distinct, inverse = np.unique(values, return_inverse=True)
    table = {name: i for i, name in enumerate(names)}
    if unknown := [x for x in distinct.tolist() if x not in table]:
        raise DataError(
            f"data.{field}={feature.name!r}: {unknown[0]!r} is none of the "
            f"{len(names)} classes of {config.source!r}; mend the corpus"
        )
    return names, np.array([table[x] for x in distinct.tolist()])[inverse]


def check_classes(
    config: Any, field: str, names: tuple[str, ...], known: int, option: str
) -> None:
    """DataError if the model knows fewer classes."""
    if len(names) > known:
        raise DataError(
            f"{option}={known}: {config.source!r} has {len(names)} classes in "
            f"data.{field}={getattr(config, field)!r}; raise it to at least that"
        )


def fitted(sizes: list[int], room: int) -> list[int]:
    """Sizes of one or two texts cut to `room` in all, the longer one first."""
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    over = max(0, sum(sizes) - room)
    gap = min(over, abs(sizes[0] - sizes[1]))
    cut = [(over - gap) // 2, (over - gap + 1) // 2]
    cut[sizes[0] <= sizes[1]] += gap
    return [size - less for size, less in zip(sizes, cut, strict=True)]


def write_texts(
    batch: Batch,
    row: int,
    texts: list[np.ndarray],
    tok: Tokenizer,
    global_tokens: str,
) -> np.ndarray:
    """[CLS] first [SEP] second [SEP]; the places of the texts, ascending."""
    end = tok.eos if tok.sep is None else tok.sep
    at, question, places = 0, 0, []
    if tok.cls is not None:
        batch["inputs"][row, 0] = tok.cls
        at = 1
    for i, ids in enumerate(texts):
        n = len(ids)
        batch["inputs"][row, at : at + n] = ids
        batch["inputs"][row, at + n] = end
        if i:
            batch["token_type_ids"][row, at : at + n + 1] = 1
        else:
            question = at + n
        places.append(np.arange(at, at + n))
        at += n + 1
    batch["segments"][row, :at] = 1
    if global_tokens != "none":
        batch["global_attention_mask"][
            row, : question if global_tokens == "question" else 1
        ] = 1
    return np.concatenate(places)
