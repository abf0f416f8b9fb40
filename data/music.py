"""Music as notes: from and to MIDI files, grids of voices and piano rolls."""

import dataclasses
import io
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from triform.runtime.errors import DataError

START, END, PITCH, VELOCITY, VOICE = range(5)  # columns of notes
LOWEST, KEYS = 21, 88  # of a piano: MIDI pitches 21 to 108
SILENT = -1  # in a grid of voices
TEMPO = 500_000  # microseconds a quarter where nothing is said: 120 a minute
DRUMS, PEDAL = 9, 64  # the channel of drums, the controller of the sustain pedal
LOUDNESS = 80  # velocity of notes that have none
SUFFIXES = (".mid", ".midi")
BROKEN = (OSError, EOFError, ValueError, LookupError)  # what mido says of a torn file


@dataclasses.dataclass(frozen=True)
class Music:
    """Notes in ticks, `resolution` of them a quarter note."""

    # int32 [N, 5], sorted: first tick, tick where it has ended, MIDI pitch, velocity,
    # voice (from 0, the highest first where there are parts of a choir).
    notes: np.ndarray
    length: int  # ticks
    resolution: int = 4
    tempi: tuple[tuple[int, int], ...] = ()  # (tick, microseconds a quarter from there)

    @classmethod
    def of_notes(cls, notes: Any, length: int, *rest: Any) -> "Music":
        """From rows of five numbers in any order."""
        found = np.asarray(notes, np.int32).reshape(-1, 5)
        found = found[np.lexsort(found.T[::-1])]
        return cls(found, max([int(length), *found[:, END].tolist()]), *rest)

    # Grids: a step is a fraction of a quarter

    @classmethod
    def of_voices(cls, grid: np.ndarray, resolution: int = 4) -> "Music":
        """Of MIDI pitches [T, V] a step, SILENT or a pitch; a repeated one is tied."""
        grid, notes = np.asarray(grid), []
        for voice, line in enumerate(grid.T):
            bounds = np.flatnonzero(np.diff(line, prepend=-2, append=-2))
            for start, end in itertools.pairwise(bounds.tolist()):
                if line[start] != SILENT:
                    notes.append((start, end, line[start], LOUDNESS, voice))
        return cls.of_notes(notes, len(grid), resolution)

    def voices(self, count: int, steps: int = 4) -> np.ndarray:
        """int32 [T, count]: what each voice sounds at each step, `steps` a quarter.

        Of two notes of one voice the later one sounds. Where there are more voices, the
        highest notes of a step are the first voices.
        """
        start, end, length = self.spans(steps)
        grid = np.full((length, count), SILENT, np.int32)
        if self.notes[:, VOICE].max(initial=0) >= count:
            roll = self.roll(steps, 0, 128)
            for step in range(length):
                sounding = np.flatnonzero(roll[step])[::-1][:count]
                grid[step, : len(sounding)] = sounding
            return grid
        for note, first, last in zip(self.notes, start, end, strict=True):
            grid[first:last, note[VOICE]] = note[PITCH]
        return grid

    @classmethod
    def of_roll(
        cls, roll: np.ndarray, resolution: int = 1, lowest: int = LOWEST
    ) -> "Music":
        """Of a piano roll bool [T, keys]; a key that stays down is one note."""
        roll = np.asarray(roll) > 0
        edges = np.diff(np.pad(roll, ((1, 1), (0, 0))).astype(np.int8), axis=0)
        notes = []
        for key in range(roll.shape[1]):
            starts, ends = (np.flatnonzero(edges[:, key] == x) for x in (1, -1))
            for start, end in zip(starts, ends, strict=True):
                notes.append((start, end, key + lowest, LOUDNESS, 0))
        return cls.of_notes(notes, len(roll), resolution)

    def roll(
        self, steps: int = 1, lowest: int = LOWEST, keys: int = KEYS
    ) -> np.ndarray:
        """bool [T, keys]: which keys sound at each step; other pitches are left out."""
        start, end, length = self.spans(steps)
        roll = np.zeros((length, keys), bool)
        for note, first, last in zip(self.notes, start, end, strict=True):
            if 0 <= (key := note[PITCH] - lowest) < keys:
                roll[first:last, key] = True
        return roll

    def spans(self, steps: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(first step of every note, step where it has ended, steps in all)."""

        def nearest(ticks: np.ndarray) -> np.ndarray:
            return (2 * ticks.astype(np.int64) * steps + self.resolution) // (
                2 * self.resolution
            )

        start = nearest(self.notes[:, START])
        end = np.maximum(nearest(self.notes[:, END]), start + 1)
        length = int(nearest(np.array(self.length)))
        return start, end, max([length, *end.tolist()])

    # Time

    def seconds(self, ticks: np.ndarray) -> np.ndarray:
        """float64 of the same shape: when ticks are, by the tempi."""
        marks = [(0, TEMPO), *self.tempi]
        at = np.array([tick for tick, _ in marks], np.float64)
        pace = np.array([tempo for _, tempo in marks]) / 1e6 / self.resolution
        begun = np.concatenate([[0.0], np.cumsum(np.diff(at) * pace[:-1])])
        which = np.searchsorted(at, ticks, "right") - 1
        return begun[which] + (ticks - at[which]) * pace[which]

    # Examples of a source

    def example(self) -> dict[str, Any]:
        """As a source has it."""
        tempi = np.array(self.tempi, np.int64).reshape(-1, 2)
        return {
            "notes": self.notes,
            "length": self.length,
            "resolution": self.resolution,
            "tempi": tempi,
        }

    @classmethod
    def of_example(cls, example: Mapping[str, Any]) -> "Music":
        """The inverse; DataError if the example holds no music."""
        if "notes" not in example:
            raise DataError(
                f"no music in {', '.join(sorted(example)) or 'it'}; name a folder of "
                ".mid files or a corpus of music, jsb_chorales say"
            )
        tempi = tuple(map(tuple, np.asarray(example["tempi"]).tolist()))
        notes = np.asarray(example["notes"], np.int32).reshape(-1, 5)
        return cls(notes, int(example["length"]), int(example["resolution"]), tempi)

    # MIDI files

    @classmethod
    def of_midi(cls, path: str) -> "Music":
        """Of a MIDI file; DataError if it is none.

        Every track and channel with notes is a voice, in their order. Drums are left
        out; what the sustain pedal holds lasts until it is up or the key is struck
        again.
        """
        mido = library()
        try:
            with open(path, "rb") as f:
                file = mido.MidiFile(file=f)
        except (*BROKEN, mido.KeySignatureError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "it is cut off"
            raise DataError(
                f"{path}: cannot be read as a MIDI file ({reason}); replace it or take "
                "it away"
            ) from error
        if file.type == 2 or file.ticks_per_beat <= 0:
            raise DataError(
                f"{path}: a MIDI file of independent tracks or in frames of film, of "
                "which no beats are known; save it as type 0 or 1"
            )
        notes, tempi, length = _messages(file.tracks)
        if not notes:
            raise DataError(f"{path}: holds no note besides drums; take it away")
        return cls.of_notes(notes, length, file.ticks_per_beat, tuple(sorted(tempi)))

    def at_tempi_of(self, other: "Music") -> "Music":
        """The same at another's tempi, of the same quarter notes."""
        found = {
            tick * self.resolution // other.resolution: tempo
            for tick, tempo in other.tempi
        }
        return dataclasses.replace(self, tempi=tuple(found.items()))

    def to_midi(self) -> bytes:
        """A MIDI file with a track for every voice."""
        mido = library()
        file = mido.MidiFile(type=1, ticks_per_beat=self.resolution)
        conductor = mido.MidiTrack()
        last = 0
        for tick, tempo in self.tempi:
            conductor.append(
                mido.MetaMessage("set_tempo", tempo=tempo, time=tick - last)
            )
            last = tick
        end = mido.MetaMessage("end_of_track", time=max(0, self.length - last))
        conductor.append(end)
        file.tracks.append(conductor)
        for voice in np.unique(self.notes[:, VOICE]):
            file.tracks.append(self._track(mido, int(voice)))
        content = io.BytesIO()
        file.save(file=content)
        return content.getvalue()

    def _track(self, mido: Any, voice: int) -> Any:
        # Ends come before beginnings at the same tick: a repeated note is struck again.
        events = []
        for start, end, pitch, velocity, _ in self.notes[
            self.notes[:, VOICE] == voice
        ].tolist():
            events += [(start, 1, pitch, velocity), (end, 0, pitch, 0)]
        track, last = mido.MidiTrack(), 0
        channel = voice % 15 + (voice % 15 >= DRUMS)
        for tick, kind, pitch, velocity in sorted(events):
            name = "note_on" if kind else "note_off"
            values = {"note": pitch, "velocity": velocity, "channel": channel}
            track.append(mido.Message(name, time=tick - last, **values))
            last = tick
        return track


def library() -> Any:
    """The module mido; DataError if it is not installed."""
    try:
        import mido
    except ImportError as error:
        raise DataError(
            f"MIDI files: mido, which reads and writes them, is not installed ({error})"
            "; run pip install 'triform[music]'"
        ) from error
    return mido


def _messages(tracks: Iterable[Any]) -> tuple[list, list, int]:
    """(notes, tempi, ticks in all) of the tracks of a file."""
    notes, tempi, length = [], [], 0
    voices: dict[tuple[int, int], int] = {}
    for number, track in enumerate(tracks):
        keys: dict[int, Keys] = {}
        tick = 0
        for message in track:
            tick += message.time
            if message.type == "set_tempo":
                tempi.append((tick, message.tempo))
            channel = getattr(message, "channel", DRUMS)
            if channel == DRUMS:
                continue
            played = keys.setdefault(channel, Keys())
            if message.type in ("note_on", "note_off"):
                loud = message.velocity if message.type == "note_on" else 0
                played.strike(tick, message.note, loud)
            elif message.type == "control_change" and message.control == PEDAL:
                played.pedal(tick, message.value >= 64)
        for channel, played in keys.items():
            found = played.ended(tick)
            if found:
                voice = voices.setdefault((number, channel), len(voices))
                notes += [(*note, voice) for note in found]
        length = max(length, tick)
    return notes, tempi, length


class Keys:
    """The keys of one channel while its messages are read."""

    def __init__(self) -> None:
        self._down: dict[int, tuple[int, int]] = {}  # pitch -> (first tick, velocity)
        self._held: set[int] = set()  # pitches that only the pedal holds
        self._pressed, self._notes = False, []

    def strike(self, tick: int, pitch: int, velocity: int) -> None:
        """A key goes down, or up with a velocity of 0."""
        if velocity:
            self._end(tick, pitch)
            self._down[pitch] = (tick, velocity)
        elif self._pressed and pitch in self._down:
            self._held.add(pitch)
        else:
            self._end(tick, pitch)

    def pedal(self, tick: int, pressed: bool) -> None:
        """The pedal goes down or up."""
        if not pressed:
            for pitch in sorted(self._held):
                self._end(tick, pitch)
        self._pressed = pressed

    def ended(self, tick: int) -> list[tuple[int, int, int, int]]:
        """(start, end, pitch, velocity) of all notes; those still down end here."""
        for pitch in [*self._down]:
            self._end(tick, pitch)
        return self._notes

    def _end(self, tick: int, pitch: int) -> None:
        self._held.discard(pitch)
        if pitch in self._down:
            start, velocity = self._down.pop(pitch)
            self._notes.append((start, max(tick, start + 1), pitch, velocity))
