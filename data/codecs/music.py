"""Music <-> ids: voices step by step, or the events of a MIDI file."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from triform.data.music import (
    END,
    KEYS,
    LOWEST,
    PITCH,
    SILENT,
    START,
    VELOCITY,
    Music,
)
from triform.runtime.errors import DataError

# Ids that every codec has: padding, before a piece, after it, and what is to be filled.
PAD, FIRST, LAST, MASK = range(4)
SPECIALS = 4


@dataclasses.dataclass(frozen=True)
class VoiceTokens:
    """Every step of a grid as one id a voice, the highest voice first.

    Huang et al. 2018 and Hadjeres et al. 2017 for four voices and 16th notes. A
    repeated pitch is tied. Ids behind the specials: silence, then the piano's keys.
    """

    voices: int = 4
    steps: int = 4  # a quarter note

    size = SPECIALS + 1 + KEYS
    rest = SPECIALS
    beats = True  # ids count quarter notes, whatever the tempo

    @property
    def period(self) -> int:
        """Ids of a step."""
        return self.voices

    def encode(self, values: Music) -> np.ndarray:
        """int32 [steps * voices]; DataError for a pitch that no piano has."""
        grid = values.voices(self.voices, self.steps)
        return self.encode_grid(grid)

    def encode_grid(self, grid: np.ndarray) -> np.ndarray:
        """The same of pitches [T, voices], SILENT for silence."""
        sounding = grid != SILENT
        outside = sounding & ((grid < LOWEST) | (grid >= LOWEST + KEYS))
        if outside.any():
            raise DataError(
                f"pitch {int(grid[outside][0])} is none of a piano's, {LOWEST} to "
                f"{LOWEST + KEYS - 1}; transpose the piece or take it away"
            )
        ids = np.where(sounding, grid - LOWEST + self.rest + 1, self.rest)
        return ids.astype(np.int32).reshape(-1)

    def decode(self, ids: np.ndarray) -> Music:
        """Music of whole steps; a special id is silence."""
        ids = np.asarray(ids)
        whole = len(ids) // self.voices * self.voices
        grid = ids[:whole].reshape(-1, self.voices) - self.rest - 1 + LOWEST
        grid = np.where(grid < LOWEST, SILENT, grid)
        return Music.of_voices(grid, self.steps)

    def allowed(self) -> np.ndarray:
        """bool [period, size]: what may be written in each turn."""
        found = np.zeros((self.period, self.size), bool)
        found[:, self.rest :] = True
        found[0, LAST] = True  # a piece ends with a whole step
        return found

    def pitches(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) id of a pitch in every voice, int64 [voices].

        A voice without notes: (size, 0).
        """
        grid = ids.reshape(-1, self.voices)
        pitched = grid > self.rest
        low = np.where(pitched, grid, self.size).min(0, initial=self.size)
        return low, np.where(pitched, grid, 0).max(0, initial=0)

    def transposed(self, ids: np.ndarray, by: int) -> np.ndarray:
        """The same `by` semitones higher; nothing else changes."""
        return np.where(ids > self.rest, ids + by, ids)

    def unit(self, quarters: float) -> int:
        """Ids of so many quarter notes, whole steps."""
        return max(1, round(quarters * self.steps)) * self.period

    def digest(self) -> str:
        """Equal codecs have equal digests."""
        return _digest(self)


SHIFTS = 100  # lengths of a step in time
BINS = 32  # of velocity
PITCHES = 128  # of MIDI


@dataclasses.dataclass(frozen=True)
class MidiEvents:
    """Keys down and up, steps in time, changes of velocity (Oore et al. 2018, 3.1).

    Ids behind the specials: 128 keys down, 128 up, 100 steps in time, 32 velocities.
    """

    rate: int = 100  # steps in time a second

    size = SPECIALS + 2 * PITCHES + SHIFTS + BINS
    period = 1
    beats = False  # but time
    on, off = SPECIALS, SPECIALS + PITCHES
    shift = SPECIALS + 2 * PITCHES
    loud = SPECIALS + 2 * PITCHES + SHIFTS

    def encode(self, values: Music) -> np.ndarray:
        """int32 [n]: of the notes; voices are not told apart."""
        notes = values.notes
        times = values.seconds(notes[:, [START, END]]) * self.rate
        start, end = np.floor(times + 0.5).astype(np.int64).T
        end = np.maximum(end, start + 1)
        bins = np.minimum(notes[:, VELOCITY] * BINS // 128, BINS - 1)
        # What ends comes first: a repeated key goes up before it goes down.
        columns = (start, end, notes[:, PITCH], bins)
        rows = [*zip(*(x.tolist() for x in columns), strict=True)]
        events = [(t, 0, pitch, 0) for _, t, pitch, _ in rows]
        events = sorted(events + [(t, 1, pitch, v) for t, _, pitch, v in rows])
        ids, now, velocity = [], 0, -1
        for time, kind, pitch, volume in events:
            while time > now:
                step = min(time - now, SHIFTS)
                ids.append(self.shift + step - 1)
                now += step
            if kind and volume != velocity:
                ids.append(self.loud + volume)
                velocity = volume
            ids.append((self.on if kind else self.off) + pitch)
        return np.array(ids, np.int32)

    def decode(self, ids: np.ndarray) -> Music:
        """Music at 120 quarters a minute; a key that never goes up ends with it.

        Special ids, and keys that go up without having been down, are passed over.
        """
        down: dict[int, tuple[int, int]] = {}
        notes, now, velocity = [], 0, BINS * 5 // 8

        def up(pitch: int) -> None:
            if pitch in down:
                start, volume = down.pop(pitch)
                notes.append((start, max(now, start + 1), pitch, volume, 0))

        for i in np.asarray(ids).tolist():
            if i >= self.loud:
                velocity = i - self.loud
            elif i >= self.shift:
                now += i - self.shift + 1
            elif i >= self.off:
                up(i - self.off)
            elif i >= self.on:
                up(i - self.on)
                middle = velocity * 128 // BINS + 64 // BINS
                down[i - self.on] = (now, middle)
        for pitch in [*down]:
            up(pitch)
        return Music.of_notes(notes, now, self.rate // 2)

    def allowed(self) -> np.ndarray:
        """bool [1, size]: all but padding, the first and what is to be filled."""
        found = np.ones((1, self.size), bool)
        found[:, [PAD, FIRST, MASK]] = False
        return found

    def pitches(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) pitch of keys that go down, int64 [1]."""
        found = ids[(ids >= self.on) & (ids < self.off)] - self.on
        low = found.min(initial=self.size)
        return np.array([low]), np.array([found.max(initial=0)])

    def transposed(self, ids: np.ndarray, by: int) -> np.ndarray:
        """The same `by` semitones higher; times and velocities stay."""
        key = (ids >= self.on) & (ids < self.shift)
        return np.where(key, ids + by, ids)

    def unit(self, quarters: float) -> int:
        """One: events have no grid."""
        return 1

    def digest(self) -> str:
        """Equal codecs have equal digests."""
        return _digest(self)


def _digest(codec: VoiceTokens | MidiEvents) -> str:
    facts = type(codec).__name__, dataclasses.astuple(codec), codec.size
    return hashlib.sha256(repr(facts).encode()).hexdigest()


CODECS = {"voices": VoiceTokens, "events": MidiEvents}
Codecs = VoiceTokens | MidiEvents


def shifts(
    low: np.ndarray,
    high: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
    most: int,
) -> Sequence[int]:
    """Transpositions of a piece by up to `most` semitones in which every voice stays
    between `lowest` and `highest`; 0 is always one of them.

    All are of every voice [V]; a voice of the piece without notes has low > high.
    """
    sounds = low <= high
    if not sounds.any():
        return range(1)
    down = int(np.clip((low - lowest)[sounds].min(), 0, most))
    up = int(np.clip((highest - high)[sounds].min(), 0, most))
    return range(-down, up + 1)
