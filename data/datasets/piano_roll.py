"""Piano rolls in rows: frames of 88 keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from triform.data.batch import Batch, Field, Shape, Spec
from triform.data.codecs.classes import Classes
from triform.data.datasets.base import Epoch
from triform.data.datasets.music import MusicConfig, Pieces, read_music
from triform.data.datasets.requests import Item, Requests
from triform.data.music import KEYS, LOWEST, Music


@dataclasses.dataclass
class FramesConfig(MusicConfig):
    """Frames of 88 keys, one a step, as Boulanger-Lewandowski et al. 2012 have it."""

    steps: int = 1  # frames per quarter note
    max_len: int = 256  # frames per row; a silent frame precedes each piece
    buckets: tuple[int, ...] = ()  # row lengths below max_len, ascending

    def room(self) -> int:
        """Predictions of a row: of all frames but the first."""
        return self.max_len - 1

    def spec(self) -> Spec:
        """Frames, and which are scored."""
        return {
            "frames": Field("BTM", "float32", counts="frame_weights"),
            "frame_weights": Field("BT", "float32"),
        }

    def shapes(self) -> tuple[Shape, ...]:
        """One per row length."""
        return tuple({"T": n, "M": KEYS} for n in (*self.buckets, self.max_len))

    def rows(self, shape: Shape) -> int:
        """Rows of a batch: as many frames whatever the length."""
        return self.batch_size * self.max_len // shape["T"]

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        super().validate()
        lengths = (*self.buckets, self.max_len)
        self.require(
            all(isinstance(n, int) and n >= 2 for n in lengths)
            and sorted(set(lengths)) == list(lengths),
            "buckets",
            f"must ascend from at least 2 to below max_len={self.max_len}",
        )


class FrameOpenings(Requests):
    """Openings of piano rolls: a MIDI file, Music, or '' for none."""

    gives, example = ("music", "score"), ""  # an opening may be none

    @classmethod
    def flags(cls, config: Any, classes: Mapping[str, Classes]) -> str:
        """Music needs a file."""
        return f"{super().flags(config, classes)} --output=music.mid"

    def read(self, request: Any) -> Item:
        """Frames after a silent one, as no piece begins."""
        music = read_music(request)
        roll = with_silence(music.roll(self.config.steps))
        return Item([roll.astype(np.float32)], music)

    def size(self, item: Item) -> int:
        """All of it."""
        return len(item.parts[0])


class Frames(Pieces):
    """Row: frames of a piece, after a silent one.

    The first frame of a piece is not scored in evaluation (Bai et al. 2018); that it is
    predicted in training is what openings are drawn from.
    """

    axis, added, unit, requests = "T", 1, "frames", FrameOpenings

    def keys(self) -> list[str]:
        """The grid."""
        return [type(self).__name__, str(self.config.steps)]

    def encoded(self, music: Music) -> np.ndarray:
        """bool [1 + T, 88]."""
        return with_silence(music.roll(self.config.steps))

    def pitches(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of all keys that sound: a roll does not tell voices apart."""
        keys = np.flatnonzero(elements.any(0))
        return np.array([keys.min(initial=KEYS)]), np.array([keys.max(initial=0)])

    def write(self, batch: Batch, row: int, item: int, epoch: Epoch) -> None:
        """The window, transposed in training."""
        part = self.window(item, epoch)
        frames = self.elements(part.piece)[part.start : part.start + part.count + 1]
        batch["frames"][row, : part.count + 1] = np.roll(frames, part.by, 1)
        seen = part.seen if epoch.train or part.start else 1
        batch["frame_weights"][row, 1 + seen : part.count + 1] = 1

    def shown(self, row: np.ndarray) -> str:
        """The pitches of the first frames."""
        return " ".join(
            "+".join(map(str, (np.flatnonzero(x) + LOWEST).tolist())) for x in row[1:7]
        )


def with_silence(roll: np.ndarray) -> np.ndarray:
    """A roll [T, 88] after a silent frame, which stands for the beginning."""
    return np.concatenate([np.zeros_like(roll[:1], shape=(1, KEYS)), roll])
