"""T5's pre-training: spans are left out of a text and predicted."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.datasets.base import Dataset, Epoch, TextConfig
from triform.data.datasets.seq2seq import (
    PairsConfig,
    Sources,
    write_source,
    write_target,
)
from triform.data.store import Feature
from triform.runtime.errors import DataError


@dataclasses.dataclass
class SpanCorruptionConfig(TextConfig):
    """Raffel et al. 2020, 3.1.4 and 3.3.4. max_len is the encoder's length."""

    SPECIALS: ClassVar[tuple[str, ...]] = tuple(f"<extra_id_{i}>" for i in range(100))
    USE: ClassVar[str] = "source"

    text: str = "text"  # name of the text feature; one document per example
    noise_rate: float = 0.15  # share of the tokens that is replaced by sentinels
    span_length: float = 3.0  # mean length of a span, in tokens

    def features(self) -> tuple[Feature, ...]:
        """What is read: also what a new tokenizer is trained on."""
        return (Feature("text", self.source, self.text),)

    def spec(self) -> Spec:
        """The text without its spans, and the spans."""
        return PairsConfig.spec(self)

    def shapes(self) -> tuple[Shape, ...]:
        """One: `max_len` is the encoder's length."""
        return ({"S": self.max_len, "L": self.target_length()},)

    def rows(self, shape: Shape) -> int:
        """Rows of a batch."""
        return self.batch_size

    def noise(self, tokens: int) -> tuple[int, int]:
        """(tokens left out, spans) of a text of at least 2 tokens."""
        noise = min(max(round(tokens * self.noise_rate), 1), tokens - 1)
        spans = max(round(noise / self.span_length), 1)
        return noise, min(spans, noise, tokens - noise)

    def chunk(self) -> int:
        """The longest text whose rest, with sentinels and EOS, fits into max_len."""
        tokens = self.max_len - 1
        while True:
            noise, spans = self.noise(tokens + 1)
            if tokens + 1 - noise + spans + 1 > self.max_len:
                return tokens
            tokens += 1

    def target_length(self) -> int:
        """What is left out of a chunk, with sentinels and EOS."""
        return sum(self.noise(self.chunk())) + 1

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(not self.buckets, "buckets", "must be (): all rows are full")
        self.require(self.max_len >= 4, "max_len", "must be at least 4")
        self.require(0 < self.noise_rate < 1, "noise_rate", "must lie between 0 and 1")
        self.require(self.span_length >= 1, "span_length", "must be at least 1")


class Gaps(Sources):
    """Texts in which '<extra_id_0>' and so on stand for what is left out."""

    columns = ("text",)

    def decode(self, ids: np.ndarray) -> str:
        """What is written, with its sentinels."""
        ids = ids.tolist()
        over = (i for i, x in enumerate(ids) if x in self.tok.ends)
        return self.tok.show(ids[: next(over, len(ids))])


class SpanCorruption(Dataset):
    """Row: a chunk of the documents, end to end, with a sentinel for every span.

    The decoder predicts every sentinel and its span. Chunks are as long as fills the
    encoder's rows; the last of a split may be shorter.
    """

    requests = Gaps

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        opened = store.open_store(config, split, self.tok, config.features())
        self.digest, self.ids = opened.digest, opened.tokens["text"].ids
        self.chunk, self.sentinels = config.chunk(), self.tok.sentinels()
        _, spans = config.noise(self.chunk)
        if spans > len(self.sentinels):
            raise DataError(
                f"data.max_len={config.max_len}: its rows have {spans} spans, but the "
                f"tokenizer has {len(self.sentinels)} sentinels (<extra_id_0> ...); "
                "lower it, or train a new tokenizer"
            )
        if self.framing.added(1) > 1:
            raise DataError(
                f"data.tokenizer.path={config.tokenizer.path!r}: it puts "
                f"{self.framing.added(1)} special tokens around a text, and rows have "
                "room for one; use another tokenizer or train a new one"
            )
        count, rest = divmod(len(self.ids), self.chunk)
        count += rest >= 2  # one token alone cannot be left out of anything
        self.sizes = {"S": np.full(count, config.max_len, np.int64)}
        self.empty = np.zeros(count, bool)

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """A chunk without its spans, and the spans."""
        ids = self.ids[item * self.chunk : (item + 1) * self.chunk].astype(np.int32)
        noise, spans = self.config.noise(len(ids))
        rng = epoch.rng(item)
        # Text and span alternate, text first, as in t5's random_spans_noise_mask.
        lengths = np.stack(
            [parted(len(ids) - noise, spans, rng), parted(noise, spans, rng)], 1
        ).ravel()
        starts = np.cumsum(lengths) - lengths
        left_out = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
        rows = []
        for begins, keep in ((starts[1::2], ~left_out), (starts[::2], left_out)):
            # What is not kept becomes a sentinel at its first position.
            shown, keep = ids.copy(), keep.copy()
            shown[begins], keep[begins] = self.sentinels[:spans], True
            rows.append(shown[keep])
        write_source(batch, row, rows[0], self.framing)
        write_target(batch, row, rows[1], self.tok)

    def example(self, item: int) -> Mapping[str, Any]:
        """{}: a row is not an example of the source."""
        return {}

    def describe(self, item: int) -> str:
        """'classic_books train, chunk 7'."""
        return f"{self.title()}, chunk {item}"


def parted(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `parts` non-empty parts of `items`, every way as likely."""
    ends = np.sort(rng.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(ends, prepend=0, append=items)
