"""Music in rows: windows of pieces; tokens to go on with, tokens to fill in."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from triform.data import store
from triform.data.batch import Batch, Field, Shape, Sizes, Spec
from triform.data.codecs import Codec
from triform.data.codecs.classes import Classes
from triform.data.codecs.music import (
    CODECS,
    FIRST,
    LAST,
    MASK,
    Codecs,
    MidiEvents,
    VoiceTokens,
    shifts,
)
from triform.data.datasets.base import DataConfig, Dataset, Epoch
from triform.data.datasets.requests import Item, Requests
from triform.data.music import SILENT, SUFFIXES, Music
from triform.data.progress import counted
from triform.runtime.errors import DataError


@dataclasses.dataclass
class MusicConfig(DataConfig):
    """What the kinds share: pieces longer than a row are divided into windows.

    In training a window begins up to half a row before or after its place, so that
    nothing always ends a row, and is transposed at random: by how much is a function of
    seed, epoch and item.
    """

    steps: int = 4  # steps per quarter note (4: 16th notes)
    # Largest random transposition in training, in semitones, within the range that
    # every voice has in the training pieces; 0: none.
    transpose: int = 0
    eval_stride: int = 0  # positions from one evaluation window to the next; 0: max_len

    max_len: int = 512  # positions per row

    def room(self) -> int:
        """Predictions of a row."""
        return self.max_len

    def grain(self) -> int:
        """Positions that windows begin at multiples of."""
        return 1

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        self.require(self.max_len >= 2, "max_len", "must be at least 2")
        self.require(self.steps >= 1, "steps", "must be at least 1 a quarter note")
        rule = "must lie in [0, 24] semitones; 0: pieces stay as they are"
        self.require(0 <= self.transpose <= 24, "transpose", rule)
        stride, room, grain = self.eval_stride, self.room(), self.grain()
        self.require(
            stride == 0 or (stride > 0 and room % stride == 0 and stride % grain == 0),
            "eval_stride",
            f"must be 0 or divide the {room} predictions of a row into multiples of "
            f"{grain}",
        )


@dataclasses.dataclass
class MusicTokensConfig(MusicConfig):
    """Music as tokens of a codec; the next token is predicted."""

    codec: str = "voices"  # a name in codecs.music.CODECS
    voices: int = 4  # voices, one token per step each (codec voices)
    rate: int = 100  # time steps per second (codec events)

    def make_codec(self) -> Codecs:
        """The codec that the fields say."""
        if self.codec == "voices":
            return VoiceTokens(self.voices, self.steps)
        return MidiEvents(self.rate)

    def grain(self) -> int:
        """A quarter note, so that a position in a row says which voice and beat it is:
        as far as rows allow.
        """
        codec = self.make_codec()
        beat = codec.unit(1)
        return beat if self.max_len % beat == 0 else codec.period

    def spec(self) -> Spec:
        """Rows of tokens."""
        return {
            "inputs": Field("BL", below="vocab_size", counts="weights"),
            "targets": Field("BL", below="vocab_size"),
            "weights": Field("BL", "float32"),
        }

    def shapes(self) -> tuple[Shape, ...]:
        """One."""
        return ({"L": self.max_len},)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        choices = f"expected one of {', '.join(CODECS)}"
        self.require(self.codec in CODECS, "codec", choices)
        self.require(1 <= self.voices <= 15, "voices", "must lie in [1, 15]")
        rule = "must be even and at least 2: steps in half a second"
        self.require(self.rate >= 2 and self.rate % 2 == 0, "rate", rule)
        period = self.make_codec().period
        self.require(
            self.max_len % period == 0,
            "max_len",
            f"must be a multiple of {period}: whole steps of data.voices={period}",
        )
        super().validate()


@dataclasses.dataclass
class MusicInpaintingConfig(MusicTokensConfig):
    """Steps of voices, of which some are to be found from the others.

    In every other row whole voices are hidden, as in harmonising; else random notes,
    any share of them alike (Uria et al. 2014; Huang et al. 2017).
    """

    def spec(self) -> Spec:
        """Rows of tokens, which voice each is, and which are hidden."""
        return {
            "inputs": Field("BL", below="vocab_size", counts="segments"),
            "segments": Field("BL"),
            "token_type_ids": Field("BL", below="num_types"),
            "targets": Field("BL", below="vocab_size"),
            "weights": Field("BL", "float32"),
        }

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        rule = "must be 'voices': events have no places to fill"
        self.require(self.codec == "voices", "codec", rule)
        super().validate()


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a piece: it predicts elements start + 1 to start + count."""

    piece: int
    start: int
    count: int
    seen: int  # of these the first that are scored in an earlier window
    by: int  # semitones it is transposed


class Pieces(Dataset):
    """Base: pieces as arrays, and the windows that rows hold.

    A piece of N elements has N - 1 predictions. Evaluation: every one counts exactly
    once. A window of as many as a row has begins every `eval_stride` of them, of which
    all count in the first, and the last `eval_stride` in a later one. Training: windows
    that follow one another, moved at random within the piece.
    """

    axis = "L"
    added = 0  # positions of a row besides its predictions
    truncates = True

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        super().__init__(config, split, codecs, sizes)
        folder = store.cached(
            config, "music", config.source, split, self.keys(), self._write_cache
        )
        self.digest = os.path.basename(folder)
        self.flat = np.load(os.path.join(folder, "pieces.npy"), mmap_mode="r")
        self.offsets = np.load(os.path.join(folder, "offsets.npy"))
        predictions = np.diff(self.offsets) - 1
        room = config.room()
        stride = config.eval_stride or room
        windows = 1 + -(-np.maximum(predictions - room, 0) // stride)
        self.piece = np.repeat(np.arange(len(predictions)), windows)
        first = np.repeat(np.cumsum(windows) - windows, windows)
        self.start = (np.arange(len(self.piece)) - first) * stride
        held = np.minimum(predictions, room)[self.piece]
        self.sizes = {self.axis: (held + self.added).astype(np.int64)}
        self.empty = np.zeros(len(held), bool)
        self._ranges = [self.pitches(self.elements(p)) for p in range(len(predictions))]
        low, high = (np.array(x) for x in zip(*self._ranges, strict=True))
        self._lowest, self._highest = low.min(0), high.max(0)

    # What a kind says

    def keys(self) -> list[str]:
        """What its arrays depend on, besides the source."""
        raise NotImplementedError

    def encoded(self, music: Music) -> np.ndarray:
        """A piece as an array of elements."""
        raise NotImplementedError

    def pitches(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) pitch of every voice [V]."""
        raise NotImplementedError

    # What they share

    def elements(self, piece: int) -> np.ndarray:
        """All of a piece."""
        return np.asarray(self.flat[self.offsets[piece] : self.offsets[piece + 1]])

    def order(
        self, items: np.ndarray, epoch: Epoch, rng: np.random.Generator
    ) -> np.ndarray:
        """Windows that do not overlap: of evaluation's, those a whole row apart."""
        return rng.permutation(items[self.start[items] % self.config.room() == 0])

    def window(self, item: int, epoch: Epoch) -> Window:
        """The window of an item in an epoch."""
        config, piece, start = self.config, int(self.piece[item]), int(self.start[item])
        total = int(self.offsets[piece + 1] - self.offsets[piece]) - 1
        room = config.room()
        if not epoch.train:
            seen = room - config.eval_stride if start and config.eval_stride else 0
            return Window(piece, start, min(room, total - start), seen, 0)
        rng, last, grain = epoch.rng(item), max(0, total - room), config.grain()
        start += int(rng.integers(-(room // 2), room // 2 + 1))
        start = min(max(start, 0), last)
        if start < last:  # the end of a piece is its end wherever that is
            start -= start % grain
        else:
            start = -(-start // grain) * grain
        by = self.shifts(piece)
        by = int(rng.choice(by)) if len(by) > 1 else 0
        return Window(piece, start, min(room, total - start), 0, by)

    def shifts(self, piece: int) -> Sequence[int]:
        """Transpositions of a piece in which every voice stays in its range."""
        found = self._ranges[piece]
        return shifts(*found, self._lowest, self._highest, self.config.transpose)

    def _write_cache(self, folder: str, parts: str) -> None:
        examples = store.examples(self.config, self.config.source, self.split)
        pieces, faults = [], []
        for item in counted(range(len(examples)), "reading music", len(examples)):
            try:
                pieces.append(self._encoded(examples[item], item))
            except DataError as error:
                faults.append(str(error))
        if faults:  # all at once: of a large folder every reading takes long
            more = f" (and {len(faults) - 1:,} more: {'; '.join(faults[1:4])})"
            raise DataError(faults[0] + (more if faults[1:] else ""))
        offsets = np.cumsum([0, *map(len, pieces)])
        np.save(os.path.join(folder, "pieces.npy"), np.concatenate(pieces))
        np.save(os.path.join(folder, "offsets.npy"), offsets)

    def _encoded(self, example: Mapping[str, Any], item: int) -> np.ndarray:
        try:
            music = Music.of_example(example)
            if not music.length:
                raise DataError("the piece is empty; take it away")
            return self.encoded(music)
        except DataError as error:
            where = store.place(self.config, self.config.source, self.split, item)
            raise DataError(f"{where}: {error}") from error

    def example(self, item: int) -> Mapping[str, Any]:
        """{}: a row is not an example of the source."""
        return {}

    def describe(self, item: int) -> str:
        """'jsb_chorales train, example 7, from position 512'."""
        place = store.place(
            self.config, self.config.source, self.split, int(self.piece[item])
        )
        return f"{place}, from position {self.start[item]}"

    def remarks(self) -> list[str]:
        """How far pieces are transposed."""
        counts = [len(self.shifts(p)) for p in range(len(self._ranges))]
        if not self.config.transpose:
            return []
        return [f"transposed: {np.mean(counts):.1f} keys a piece, its own among them"]

    def preview(self, batch: Batch) -> str:
        """The first row's beginning."""
        name = next(k for k, field in self.spec.items() if field.counts)
        return f"  {name:9}{self.shown(batch[name][0])}"

    def shown(self, row: np.ndarray) -> str:
        """A row, for the eye."""
        return " ".join(map(str, row[:24].tolist())) + " ..."


class Openings(Requests):
    """Openings to go on with: a MIDI file, Music, or '' for none."""

    gives, example = ("music", "score"), ""  # an opening may be none

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """Music needs a file."""
        return f"{super().flags(config, classes)} --output=music.mid"

    def __init__(self, config: Any, codecs: Mapping[str, Codec], sizes: Sizes):
        super().__init__(config, codecs, sizes)
        self.codec = config.make_codec()

    def read(self, request: Any) -> Item:
        """The tokens of an opening, after the first of all pieces."""
        music = read_music(request)
        ids = self.codec.encode(music)
        return Item([np.concatenate([[FIRST], ids]).astype(np.int32)], music)

    def size(self, item: Item) -> int:
        """All of it."""
        return len(item.parts[0])


def read_music(request: Any) -> Music:
    """Of a MIDI file's path, or Music; '' is none. DataError for anything else."""
    if isinstance(request, Music):
        return request
    if isinstance(request, os.PathLike):
        request = os.fspath(request)
    if not isinstance(request, str):
        raise DataError(f"{type(request).__name__} is no music; give a path or Music")
    if not request.strip():
        return Music.of_notes([], 0)
    if not request.lower().endswith(SUFFIXES):
        raise DataError(f"{request!r} is no MIDI file; name one that ends in .mid")
    return Music.of_midi(request)


class MusicTokens(Pieces):
    """Row: tokens of a piece, each with the one that follows.

    A piece is FIRST token token ... token LAST.
    """

    requests = Openings

    def __init__(
        self, config: Any, split: str, codecs: Mapping[str, Codec], sizes: Sizes
    ):
        self.codec = config.make_codec()
        super().__init__(config, split, codecs, sizes)

    def keys(self) -> list[str]:
        """The codec's."""
        return [type(self).__name__, self.codec.digest()]

    def encoded(self, music: Music) -> np.ndarray:
        """With the first and the last."""
        ids = self.codec.encode(music)
        return np.concatenate([[FIRST], ids, [LAST]]).astype(np.uint16)

    def pitches(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the tokens between the specials."""
        return self.codec.pitches(elements[1:-1].astype(np.int64))

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The window, transposed in training."""
        part = self.window(item, epoch)
        ids = self.elements(part.piece)[part.start : part.start + part.count + 1]
        ids = self.codec.transposed(ids.astype(np.int32), part.by)
        batch["inputs"][row, : part.count] = ids[:-1]
        batch["targets"][row, : part.count] = ids[1:]
        batch["weights"][row, part.seen : part.count] = 1


class Melodies(Openings):
    """Music with some voices, the first ones of a choir; the others are found."""

    example = "soprano.mid"

    def read(self, request: Any) -> Item:
        """Tokens of all voices; those without a single note are to be filled in."""
        music = read_music(request)
        grid = music.voices(self.codec.voices, self.codec.steps)
        if not len(grid):
            return Item([], music)
        ids = self.codec.encode_grid(grid).reshape(grid.shape)
        ids[:, (grid == SILENT).all(0)] = MASK
        item = Item([ids.reshape(-1)], music)
        if not (item.parts[0] == MASK).any():
            item.notes.append("all voices are there: nothing was filled in")
        return item


class MusicInpainting(MusicTokens):
    """Row: steps of voices, some of them hidden."""

    requests = Melodies

    def encoded(self, music: Music) -> np.ndarray:
        """After the first: windows predict what follows it."""
        return super().encoded(music)[:-1]

    def pitches(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the tokens behind the first."""
        return self.codec.pitches(elements[1:].astype(np.int64))

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The window with a random part hidden."""
        part = self.window(item, epoch)
        ids = self.elements(part.piece)[part.start + 1 : part.start + part.count + 1]
        ids = self.codec.transposed(ids.astype(np.int32), part.by)
        hidden = self.hidden(len(ids), epoch.rng(item, 0))
        write_steps(batch, row, np.where(hidden, MASK, ids), self.codec.voices)
        batch["targets"][row, : len(ids)] = ids
        batch["weights"][row, part.seen : len(ids)] = hidden[part.seen :]

    def hidden(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """bool [count]: at least one; of whole voices, or of single notes."""
        voices = self.codec.voices
        if voices > 1 and rng.random() < 0.5:
            chosen = rng.permutation(voices)[: rng.integers(1, voices)]
            return np.isin(np.arange(count) % voices, chosen)
        order = rng.permutation(count)
        return order < rng.integers(1, count + 1)


def write_steps(batch: Batch, row: int, ids: np.ndarray, voices: int) -> None:
    """Tokens of whole steps, and the voice of each."""
    n = len(ids)
    batch["inputs"][row, :n], batch["segments"][row, :n] = ids, 1
    batch["token_type_ids"][row, :n] = np.arange(n) % voices
