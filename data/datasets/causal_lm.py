"""Next-token prediction on rows of one stream of documents."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.datasets.base import Dataset, Epoch, TextConfig
from triform.data.datasets.requests import Item, Requests
from triform.data.store import Feature
from triform.runtime.errors import DataError

DOCUMENTS = ("joined", "separate")


@dataclasses.dataclass
class CausalLMConfig(TextConfig):
    """Full rows of max_len tokens, independent of the lengths of documents."""

    text: str = "text"  # name of the text feature; one document per example
    # joined: a token sees all earlier tokens of its row; separate: of its document.
    documents: str = "joined"
    eval_stride: int = 0  # positions from one evaluation row to the next; 0: max_len

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return (Feature("text", self.source, self.text, end=True),)

    def spec(self) -> Spec:
        """Rows of a stream; segments where documents are separate."""
        counts = "weights"
        spec = {"targets": Field("BL", below="vocab_size")}
        if self.documents == "separate":
            counts = "segments"
            spec |= {"segments": Field("BL"), "positions": Field("BL")}
        spec["inputs"] = Field("BL", below="vocab_size", counts=counts)
        return spec | {"weights": Field("BL", "float32")}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(not self.buckets, "buckets", "must be (): all rows are full")
        self.require(
            self.documents in DOCUMENTS,
            "documents",
            f"expected one of {', '.join(DOCUMENTS)}",
        )
        self.require(
            0 <= self.eval_stride <= self.max_len,
            "eval_stride",
            f"must lie between 1 and max_len={self.max_len}, or be 0 for max_len",
        )


def is_messages(request: Any) -> bool:
    """Whether a request is a conversation: a list of mappings."""
    is_list = isinstance(request, list | tuple) and len(request) > 0
    return is_list and isinstance(request[0], Mapping)


class Prompts(Requests):
    """Texts to be continued. Ids are taken as they are; messages are answered."""

    columns, continues = ("text",), True

    def read(self, request: Any) -> Item:
        """A text begins as the tokenizer begins documents; an empty one after EOS."""
        if is_messages(request):
            return self.messages(request)
        if isinstance(request, Sequence | np.ndarray) and not isinstance(request, str):
            ids = np.asarray(request, np.int32)
            return Item([ids], self.tok.decode(ids))
        (text,), notes = self.texts(request)
        return Item(self.tok.prompts([text]), text, notes)

    def messages(self, request: Sequence[Mapping[str, Any]], tools: Any = None) -> Item:
        """What the assistant answers; DataError without a chat template."""
        if "chat" not in self.codecs:
            raise DataError(
                "messages need a chat template, and the workdir has none; put a "
                "chat_template.jinja into it, or give a text"
            )
        return Item([self.codecs["chat"].prompt(request, tools)])

    def size(self, item: Item) -> int:
        """All of it."""
        return len(item.parts[0])

    def write(self, batch: Batch, row: int, item: Item) -> int:
        """Its last tokens."""
        (ids,) = item.parts
        left_out = max(0, len(ids) - batch["inputs"].shape[1])
        ids = ids[left_out:]
        n = len(ids)
        batch["inputs"][row, :n], batch["weights"][row, :n] = ids, 1
        if "segments" in batch:
            batch["segments"][row, :n] = 1
            batch["positions"][row, :n] = np.arange(n)
        return left_out


class CausalLM(Dataset):
    """Row: L positions of the stream, each with the token that follows it.

    The stream is FIRST document EOS document EOS ... document EOS. FIRST is what the
    tokenizer puts before a text, else EOS; every later token is a target.

    Training: the stream is a ring, divided into rows from a position drawn every epoch:
    no target comes twice in an epoch and fewer than L do not come.

    Evaluation: every target counts exactly once. A row of L targets begins every
    `eval_stride` positions; all targets of the first count, of a later one its last
    `eval_stride`, each of which has seen at least L - eval_stride tokens.
    """

    metrics, requests = ("word_perplexity", "bits_per_byte"), Prompts

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        opened = store.open_store(config, split, self.tok, config.features())
        self.store, self.digest = opened.tokens["text"], opened.digest
        self.stride = config.eval_stride or config.max_len
        self.targets = len(self.store.ids)
        beyond = max(0, self.targets - config.max_len)
        count = 1 + -(-beyond // self.stride)
        self.length = min(self.targets, config.max_len)
        self.sizes = {"L": np.full(count, self.length, np.int64)}
        self.empty = np.zeros(count, bool)

    def order(
        self, items: np.ndarray, epoch: Epoch, rng: np.random.Generator
    ) -> np.ndarray:
        """The windows that the ring holds, which is no more than evaluation's."""
        return rng.permutation(max(1, self.targets // self.config.max_len))

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The window, padded if the stream is shorter or ends in it."""
        length = batch["inputs"].shape[1]
        if epoch.train:
            start = int(epoch.rng(0).integers(self.targets)) + item * length
            n = self.length
        else:
            start = item * self.stride
            n = min(length, self.targets - start)
        positions = np.arange(start, start + n) % self.targets
        inputs = self.store.ids[positions - 1]  # before the first: the last one's EOS
        if lead := self.framing.lead():
            inputs = np.where(positions == 0, lead[-1], inputs)
        batch["inputs"][row, :n] = inputs
        batch["targets"][row, :n] = self.store.ids[positions]
        seen = 0 if epoch.train or item == 0 else length - self.stride
        batch["weights"][row, seen:n] = 1
        if "segments" in batch:
            begins = (inputs == self.tok.eos) | (positions == 0)
            begins[0] = True
            index = np.arange(n)
            batch["segments"][row, :n] = np.cumsum(begins)
            first = np.maximum.accumulate(np.where(begins, index, 0))
            batch["positions"][row, :n] = index - first

    def example(self, item: int) -> Mapping[str, Any]:
        """{}: a row is not an example of the source."""
        return {}

    def describe(self, item: int) -> str:
        """'wikitext2 train, window 7'."""
        return f"{self.title()}, window {item}"

    def scalars(self, total: float) -> dict[str, float]:
        """Nats per unit of the raw text, which no tokenizer changes.

        `word_perplexity`: words are what whitespace separates, and every newline.
        `bits_per_byte`: of UTF-8. Both include the nats of EOS.
        """
        words, size = max(1, self.store.words), max(1, self.store.bytes)
        nats = min(total / words, 700.0)  # beyond, exp overflows
        return {
            "word_perplexity": math.exp(nats),
            "bits_per_byte": total / math.log(2) / size,
        }
