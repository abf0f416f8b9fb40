"""Music as files: MIDI, and a picture of the piano rolls."""

import glob
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from triform.data.music import VOICE, Music
from triform.runtime import files
from triform.runtime.errors import UserError

# Of voices, in their order.
COLOURS = ((196, 60, 57), (226, 147, 46), (62, 142, 84), (50, 92, 168))
PAPER, LINE, BLACK_KEYS = (255, 255, 255), (214, 214, 214), (243, 243, 243)
BLACK = (1, 3, 6, 8, 10)  # pitches of an octave that have black keys
STEP, KEY, GAP = 4, 4, 12  # pixels of a step, of a key, between pieces
STEPS = 4  # of a quarter note
MARGIN = 2  # keys around the lowest and the highest
LINE_STEPS = 256  # of a line of a picture, as of a score: 64 quarter notes


class MusicFiles:
    """A MIDI file of one piece, or NAME_1.mid and so on of several; NAME.png beside.

    UserError if they are there already, unless `overwrite`.
    """

    rows = False

    def __init__(self, path: str, overwrite: bool = False):
        self.path, self._found = path, []
        self.stem = os.path.splitext(path)[0]
        pattern = glob.escape(self.stem)
        there = [path, f"{self.stem}.png", *glob.glob(f"{pattern}_[0-9]*.mid")]
        found = [x for x in there if os.path.exists(x)]
        if found and not overwrite:
            raise UserError(
                f"--output={path}: {found[0]} is there already; name another file, or "
                "add --overwrite"
            )

    def open(self) -> None:
        """Its folder is there."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the pieces of an answer."""
        found = [sample["music"] for sample in row.get("samples", [row])]
        self._found += [music for music in found if music is not None]

    def close(self) -> list[str]:
        """Writes the files; their paths."""
        if not self._found:
            return []
        content = {f"{self.stem}.png": picture(self._found)}
        several = len(self._found) > 1
        for number, music in enumerate(self._found, 1):
            name = f"{self.stem}_{number}.mid" if several else self.path
            content[name] = music.to_midi()
        for name, x in content.items():
            with files.replacing(name, binary=True) as f:
                f.write(x)
        return [*content]


def picture(pieces: Sequence[Music], steps: int = STEPS) -> bytes:
    """A PNG: the piano roll of every piece, one below another, a colour a voice.

    A long one has several lines, with less space between. A thin line at every fourth
    quarter note.
    """
    rolls = [image(piece, steps) for piece in pieces]
    wide = LINE_STEPS * STEP
    width = min(wide, max(x.shape[1] for x in rolls))
    sheet = []
    for roll in rolls:
        for first in range(0, roll.shape[1], wide):
            line = roll[:, first : first + wide]
            above = GAP if first == 0 else GAP // 3
            space = ((above, 0), (GAP, GAP + width - line.shape[1]), (0, 0))
            sheet.append(np.pad(line, space, constant_values=255))
    sheet.append(np.full((GAP, width + 2 * GAP, 3), 255, np.uint8))
    file = io.BytesIO()
    content = Image.fromarray(np.concatenate(sheet))
    content.quantize(32).save(file, "png", optimize=True)
    return file.getvalue()


def image(piece: Music, steps: int) -> np.ndarray:
    """uint8 [h, w, 3]: time from left to right, high notes above."""
    start, end, length = piece.spans(steps)
    pitches = piece.notes[:, 2]
    low = int(pitches.min(initial=60)) - MARGIN
    high = int(pitches.max(initial=60 if len(pitches) == 0 else 0)) + MARGIN
    canvas = np.empty((high - low + 1, KEY, length, STEP, 3), np.uint8)
    canvas[:] = PAPER
    for pitch in range(low, high + 1):
        if pitch % 12 in BLACK:
            canvas[high - pitch] = BLACK_KEYS
    canvas[:, :, :: 4 * steps, 0] = LINE
    for note, first, last in zip(piece.notes, start, end, strict=True):
        colour = COLOURS[note[VOICE] % len(COLOURS)]
        row = canvas[high - note[2]]
        row[:, first:last] = colour
        # The gap that tells one note from the next.
        row[:, last - 1, STEP - 1] = PAPER
    return canvas.reshape((high - low + 1) * KEY, length * STEP, 3)
