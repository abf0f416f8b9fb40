"""Next-token prediction on conversations: only what the assistant says is trained."""

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from triform.data import encoding, progress, store
from triform.data.batch import Batch, Field, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.chat import (
    ASSISTANT,
    CHATML_TOKENS,
    TEMPLATES,
    ChatTemplate,
    Message,
    contents,
    messages_of,
)
from triform.data.codecs.text import load
from triform.data.datasets.base import Dataset, Epoch, TextConfig
from triform.data.datasets.causal_lm import Prompts
from triform.data.datasets.requests import Item
from triform.data.store import Feature
from triform.runtime import paths
from triform.runtime.errors import DataError

CHUNK = 256  # conversations encoded together


@dataclasses.dataclass
class ConversationsConfig(TextConfig):
    """Rows of whole conversations, as many as fit; one that is too long is cut."""

    SPECIALS: ClassVar[tuple[str, ...]] = CHATML_TOKENS

    # The feature: a list of role and content. A feature `tools` goes to the template.
    messages: str = "messages"
    prompt: str = ""  # in place of messages: the feature that is asked, a text
    response: str = ""  # and the feature that is answered
    # chatml, plain, or a file in Jinja; empty: the tokenizer's own, else chatml.
    template: str = ""
    day: str = "2026-01-01"  # today for templates that ask: rows depend on no clock

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        if self.prompt:
            fields = ("prompt", "response")
            return tuple(Feature(f, self.source, getattr(self, f)) for f in fields)
        return (Feature("messages", self.source, self.messages, divide=contents),)

    def spec(self) -> Spec:
        """Rows of conversations, a segment each."""
        return {
            "targets": Field("BL", below="vocab_size"),
            "segments": Field("BL"),
            "positions": Field("BL"),
            "inputs": Field("BL", below="vocab_size", counts="segments"),
            "weights": Field("BL", "float32"),
        }

    def make_absolute(self) -> None:
        """Makes paths absolute, so that the config means the same from any folder."""
        super().make_absolute()
        if self.template and self.template not in TEMPLATES:
            self.template = paths.absolute(self.template)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        both = bool(self.prompt) == bool(self.response)
        self.require(both, "response", "name it together with data.prompt, or neither")
        try:
            datetime.date.fromisoformat(self.day)
        except ValueError:
            self.require(False, "day", "must be a day such as '2026-01-31'")


class Chats(Prompts):
    """Messages to be answered; a text is what a user asks."""

    columns = ("messages",)

    def read(self, request: Any) -> Item:
        """Messages up to the next answer, or a row of training without its answer."""
        notes: list[str] = []
        if isinstance(request, str):
            (text,), notes = self.texts(request)
            if not text:
                return Item([], "")
            request = [{"role": "user", "content": text}]
        if not isinstance(request, Mapping):
            item = super().read(request)
            return dataclasses.replace(item, notes=notes)
        name = self.config.prompt or self.config.messages
        if name not in request:
            raise DataError(
                f"it has no {name!r} but {', '.join(map(repr, request)) or 'nothing'}; "
                "name the columns as in training"
            )
        if self.config.prompt:
            return self.read(request[name])
        found = messages_of(request[name])
        while found and found[-1]["role"] == ASSISTANT:
            found.pop()
        return self.messages(found, request.get("tools"))


class Conversations(Dataset):
    """Row: conversations one after another, each a segment with its own positions.

    Targets weigh 1 where the assistant writes them, ends of turns included. Of the
    training split rows are packed, the same in every epoch; of other splits each holds
    one conversation. Where the template changes earlier turns (`ChatTemplate.turns`), a
    conversation is several texts, each packed as one.
    """

    truncates, requests = True, Chats

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        self.store = _open_store(config, split, codecs["chat"])
        self.digest = self.store.digest
        texts, longest = self.store, config.max_len
        needed = texts.sizes() - 1  # every token is read or predicted
        if config.drop_empty:
            chosen = np.flatnonzero(texts.answer >= 0)
        else:
            chosen = np.arange(len(texts))
            self._require_answers()
        # Target p of a text is its token p + 1.
        lost = texts.answer[chosen] > longest
        self.lost = int(lost.sum())
        if split == config.train_split:
            chosen = chosen[~lost]
            self.rows = packed(np.minimum(needed[chosen], longest), longest)
            self.rows = [chosen[row] for row in self.rows]
        else:
            self.rows = list(chosen[:, None])
        self.sizes = {"L": np.array([needed[row].sum() for row in self.rows], np.int64)}
        self.empty = np.zeros(len(self.rows), bool)

    def _require_answers(self) -> None:
        silent = np.flatnonzero(self.store.answer < 0)
        if len(silent):
            raise DataError(
                f"{self._place(self.store.example[silent[0]])}: no turn of the role "
                f"{ASSISTANT!r}, so that nothing is trained; correct it or set "
                "data.drop_empty=True"
            )

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The texts of the row; the last one may be shortened."""
        at, length = 0, batch["inputs"].shape[1]
        for segment, text in enumerate(self.rows[item], start=1):
            ids, trained = self.store[text]
            n = min(len(ids) - 1, length - at)
            to = slice(at, at + n)
            batch["inputs"][row, to] = ids[:n]
            batch["targets"][row, to] = ids[1 : n + 1]
            batch["weights"][row, to] = trained[1 : n + 1]
            batch["segments"][row, to] = segment
            batch["positions"][row, to] = np.arange(n)
            at += n

    def _place(self, example: int) -> str:
        return store.place(self.config, self.config.source, self.split, int(example))

    def describe(self, item: int) -> str:
        """'chats.jsonl train, example 7', or examples that share a row."""
        numbers = list(dict.fromkeys(self.store.example[self.rows[item]].tolist()))
        if len(numbers) == 1:
            return self._place(numbers[0])
        more = ", ..." if len(numbers) > 8 else ""
        return f"{self.title()}, examples {', '.join(map(str, numbers[:8]))}{more}"

    def example(self, item: int) -> Mapping[str, Any]:
        """The conversation as the source has it; {} if several share a row."""
        numbers = set(self.store.example[self.rows[item]].tolist())
        return self._raw()[0][numbers.pop()] if len(numbers) == 1 else {}

    def input_text(self, item: int) -> str:
        """What is read before the first answer; '' if several share a row."""
        if len(self.rows[item]) > 1:
            return ""
        (text,) = self.rows[item]
        ids, _ = self.store[text]
        return self.tok.show(ids[: max(0, self.store.answer[text])])

    def preview(self, batch: Batch) -> str:
        """The first row for the eye, some lines."""
        weights = batch["weights"][0]
        runs = np.split(np.arange(len(weights)), np.flatnonzero(np.diff(weights)) + 1)
        shown = [
            self.tok.show(batch["targets"][0][run]) for run in runs if weights[run[0]]
        ]
        trained = " | ".join(shown).replace("\n", "\\n")
        return f"{super().preview(batch)}\n  {'trained':17}{trained:.300}"

    def remarks(self) -> list[str]:
        """Lines of the report on the training data, besides numbers of rows."""
        lines, texts = [], self.store
        if self.lost:
            lines.append(
                f"{self.lost:,} begin their first answer behind max_len="
                f"{self.config.max_len}, not trained on"
            )
        if texts.conversations < len(texts):
            lines.append(
                f"{texts.conversations:,} conversations are {len(texts):,} texts: the "
                "template changes earlier turns"
            )
        return lines


def packed(sizes: np.ndarray, room: int) -> list[np.ndarray]:
    """Which items share a row of `room` positions, each list ascending.

    Longest first, each into the fullest row that holds it (best fit decreasing); the
    same sizes give the same rows.
    """
    free: dict[int, list[int]] = {}  # positions left -> rows
    there = 0  # bit n: some row has n positions left
    rows: list[list[int]] = []
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fits = there >> size
        if fits:
            left = size + (fits & -fits).bit_length() - 1
            row = free[left].pop()
            if not free[left]:
                there ^= 1 << left
            rows[row].append(item)
        else:
            left, row = room, len(rows)
            rows.append([item])
        left -= size
        free.setdefault(left, []).append(row)
        there |= 1 << left
    return [np.sort(row) for row in rows]


# --- Encoded conversations ---


class _Store:
    """Texts of a split: `store[t]` is (ids, trained), of example `example[t]`.

    `answer[t]` is the first trained token of a text, -1 if there is none.
    """

    def __init__(self, directory: str):
        self.digest = os.path.basename(directory)
        path = os.path.join(directory, "chat")
        with np.load(f"{path}.npz") as arrays:
            self.offsets, self.example = arrays["offsets"], arrays["example"]
            self.answer = arrays["answer"]
            dtype = arrays["dtype"].dtype
        self.ids = _mapped(f"{path}.tokens", dtype)
        self.trained = _mapped(f"{path}.trained", np.dtype(bool))
        self.conversations = len(np.unique(self.example))
        if not len(self.ids) == len(self.trained) == self.offsets[-1]:
            raise DataError(
                f"{path}.tokens: {len(self.ids)} tokens where {self.offsets[-1]} were "
                f"written; delete {directory}"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(*self.offsets[text : text + 2])
        return self.ids[part], self.trained[part]

    def sizes(self) -> np.ndarray:
        """Tokens of every text, int64."""
        return np.diff(self.offsets)


def _mapped(path: str, dtype: np.dtype) -> np.ndarray:
    if not os.path.getsize(path):  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))


@dataclasses.dataclass(frozen=True)
class Chat:
    """An encoder of (number of the example, messages, tools).

    Of all texts: `ids` and `trained`, flat; `sizes`; `example` and `answer` as in
    `_Store`.
    """

    template: ChatTemplate

    def __call__(self, examples: Sequence[tuple]) -> encoding.Arrays:
        """The arrays; ExampleError for what the template cannot write."""
        numbers, texts = [], []
        for number, messages, tools in examples:
            try:
                found = self.template.turns(messages, tools)
            except DataError as error:
                raise encoding.ExampleError(str(error), number) from error
            texts += found
            numbers += [number] * len(found)
        dtype = np.uint16 if self.template.size <= 1 << 16 else np.uint32
        ids, marks = [np.zeros(0, dtype)], [np.zeros(0, bool)]
        for start in range(0, len(texts), CHUNK):
            for x, trained in self.template.encode_batch(texts[start : start + CHUNK]):
                ids.append(x.astype(dtype))
                marks.append(trained)
        # The first token is never a target.
        answers = [1 + int(x[1:].argmax()) if x[1:].any() else -1 for x in marks[1:]]
        return {
            "ids": np.concatenate(ids),
            "trained": np.concatenate(marks),
            "sizes": np.array([len(x) for x in ids[1:]], np.int64),
            "example": np.array(numbers, np.int64),
            "answer": np.array(answers, np.int64),
        }

    def size(self, example: tuple) -> int:
        """Characters of the contents."""
        return sum(len(str(message.get("content"))) for message in example[1])

    def elsewhere(self, folder: str) -> tuple[Callable[..., "Chat"], tuple]:
        """With the saved tokenizer."""
        about = self.template.template, self.template.day
        return Chat.loaded, (self.template.tokenizer.save(folder), *about)

    @classmethod
    def loaded(cls, path: str, template: str, day: str) -> "Chat":
        """The same with the tokenizer at `path`."""
        return cls(ChatTemplate(load(path), template, day))


def _open_store(config: Any, split: str, chat: ChatTemplate) -> _Store:
    keys = [chat.digest(), *(feature.key() for feature in config.features())]

    def write(path: str, parts: str) -> None:
        try:
            found = encoding.write_parts(Chat(chat), _read(config, split), parts)
        except encoding.ExampleError as error:
            where = store.place(config, config.source, split, error.number)
            raise DataError(f"{where}: {error}") from error
        _join(found, os.path.join(path, "chat"))

    return _Store(store.cached(config, "chats", config.source, split, keys, write))


def _join(parts: Sequence[str], path: str) -> None:
    """Writes what `_Store` reads."""
    dtype = np.dtype(np.uint16)
    for name, end in (("trained", "trained"), ("ids", "tokens")):
        with open(f"{path}.{end}", "wb") as f:
            for x in encoding.joined(parts, name):
                dtype = x.dtype
                f.write(x.data)
    sizes, example, answer = (
        list(encoding.joined(parts, name)) for name in ("sizes", "example", "answer")
    )
    np.savez(
        f"{path}.npz",
        offsets=store.sums(sizes),
        example=np.concatenate(example),
        answer=np.concatenate(answer),
        dtype=np.zeros(0, dtype),
    )


def _read(config: Any, split: str) -> Iterator[tuple[int, Sequence[Message], Any]]:
    """(number, messages, tools) of every example."""
    raw = store.examples(config, config.source, split)
    read = conversation_reader(config)
    counted = progress.counted(raw, f"tokenising {split}", len(raw))
    for number, example in enumerate(counted):
        try:
            found = read(example)
        except DataError as error:
            where = store.place(config, config.source, split, number)
            raise DataError(f"{where}: {error}") from error
        yield number, *found


def conversation_reader(
    config: ConversationsConfig,
) -> Callable[[Mapping[str, Any]], tuple[Sequence[Message], Any]]:
    """A function from an example to (messages, tools); DataError if it has none."""
    if config.prompt:
        readers = [store.reader(config, feature) for feature in config.features()]

        def pair(example: Mapping[str, Any]) -> tuple[list[Message], Any]:
            (asked,), (answered,) = (read(example) for read in readers)
            user = {"role": "user", "content": asked}
            return [user, {"role": ASSISTANT, "content": answered}], None

        return pair

    def read(example: Mapping[str, Any]) -> tuple[list[Message], Any]:
        if config.messages not in example:
            raise DataError(
                f"data.messages={config.messages!r}: {config.source!r} has no such "
                f"feature; expected one of {', '.join(sorted(example))}"
            )
        return messages_of(example[config.messages]), example.get("tools")

    return read
