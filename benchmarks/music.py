"""Is what a model writes like the corpus? Numbers of docs/applications/music.md.

    python benchmarks/music.py write --workdir=runs/music [--samples=32] [--steps=256] \
        [--temperature=1] [--top_p=1] [--output=DIR]
    python benchmarks/music.py harmonise --workdir=runs/harmonise [--pieces=77]

write: pieces from nothing, beside the training corpus, beside held-out pieces, and
beside a first-order Markov chain of every voice, fitted on the training corpus. With
--output the first 8 pieces of the model go there as MIDI, and a picture of them.
harmonise: the same for sopranos of test pieces with three voices written to them, and
how often these are Bach's.

Columns. nll: nats per token of the validation pieces. outside: share of notes beyond
the range that their voice has in the corpus. crossed: share of steps where a voice is
above a higher one. tonal: mean correlation of a piece's pitch classes with the
likeliest of 24 keys (Krumhansl & Kessler 1982). profile: correlation of pitch classes
from the tonic on with the corpus. repeated: share of 16ths with the pitch of the one
before. length: mean of notes, in 16ths. leaps, beats, chords: distance (total
variation, 0 to 1) from the corpus of melodic intervals, of where in a quarter notes
begin, of the pitch classes above the bass.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np

from triform import Sampler, evaluate
from triform.answers.music_files import picture
from triform.data.codecs.music import VoiceTokens
from triform.data.music import SILENT, Music
from triform.data.sources import source

VOICES, STEPS = 4, 4
Grids = Sequence[np.ndarray]  # int [T, 4] of every piece
# Probe-tone ratings (Krumhansl & Kessler 1982), from the tonic on.
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


def corpus(split: str) -> Grids:
    """The chorales of a split."""
    examples = source("jsb_chorales").examples(split)
    return [Music.of_example(x).voices(VOICES, STEPS) for x in examples]


class Markov:
    """p(pitch | pitch of the same voice a 16th before), with one count for each."""

    def __init__(self, grids: Grids):
        self.codec = VoiceTokens(VOICES, STEPS)
        first, size = self.codec.rest, self.codec.size - self.codec.rest
        self.first, counts = first, np.zeros((VOICES, size + 1, size))
        for grid in grids:
            ids = self._ids(grid)
            for voice in range(VOICES):
                np.add.at(counts[voice], (ids[:-1, voice], ids[1:, voice]), 1)
        seen = counts.sum((0, 1)) > 0  # others are never drawn
        smooth = counts + seen / seen.sum()
        self.chances = smooth / smooth.sum(-1, keepdims=True)

    def _ids(self, grid: np.ndarray) -> np.ndarray:
        """[1 + T, voices] from 0 on; the last number stands before a piece."""
        ids = self.codec.encode_grid(grid).reshape(grid.shape) - self.first
        start = np.full((1, VOICES), self.codec.size - self.first)
        return np.concatenate([start, ids])

    def nll(self, grids: Grids) -> float:
        """Nats per token."""
        found = []
        for grid in grids:
            ids = self._ids(grid)
            found += [
                -np.log(self.chances[v][ids[:-1, v], ids[1:, v]]) for v in range(VOICES)
            ]
        return float(np.concatenate(found).mean())

    def write(self, steps: int, rng: np.random.Generator) -> np.ndarray:
        """A piece of so many steps."""
        size = self.chances.shape[-1]
        ids = np.full((1 + steps, VOICES), size)
        for step in range(steps):
            for voice in range(VOICES):
                row = self.chances[voice][ids[step, voice]]
                ids[step + 1, voice] = rng.choice(size, p=row)
        tokens = (ids[1:] + self.first).reshape(-1)
        return self.codec.decode(tokens).voices(VOICES, STEPS)


# Statistics


def classes(grid: np.ndarray) -> np.ndarray:
    """float64 [12]: share of every pitch class, by duration."""
    found = np.bincount(grid[grid != SILENT] % 12, minlength=12).astype(float)
    return found / max(1.0, found.sum())


def tonic(profile: np.ndarray) -> tuple[float, int]:
    """(correlation with the likeliest key, its tonic) of pitch classes [12]."""
    if not profile.std():
        return 0.0, 0
    return max(
        (float(np.corrcoef(np.roll(key, i), profile)[0, 1]), i)
        for key in (MAJOR, MINOR)
        for i in range(12)
    )


def starts(line: np.ndarray) -> np.ndarray:
    """Steps where a note begins."""
    return np.flatnonzero((np.diff(line, prepend=-2) != 0) & (line != SILENT))


def shares(values: Sequence[np.ndarray], size: int) -> np.ndarray:
    """float64 [size]: share of every value."""
    found = np.concatenate([np.zeros(0, int), *values])
    return np.bincount(found, minlength=size) / max(1, len(found))


def statistics(grids: Grids, ranges: np.ndarray) -> dict:
    """Of some pieces; `ranges` [voices, 2] are the corpus's."""
    notes, outside, crossed, profile = [], [], [], np.zeros(12)
    tonal, repeated, leaps, beats, chords = [], [], [], [], []
    for grid in grids:
        best, key = tonic(classes(grid))
        tonal.append(best)
        profile += np.roll(classes(grid), -key)
        sounding = (grid != SILENT).all(1)
        crossed.append((np.diff(grid[sounding], axis=1) > 0).any(1))
        above = (grid[sounding, :3] - grid[sounding, 3:]) % 12
        chords.append(np.sort(above, 1) @ [144, 12, 1])
        for voice in range(VOICES):
            line, first = grid[:, voice], starts(grid[:, voice])
            low, high = ranges[voice]
            outside.append((line[first] < low) | (line[first] > high))
            both = (line[1:] != SILENT) & (line[:-1] != SILENT)
            repeated.append((line[1:] == line[:-1])[both])
            notes.append(np.array([(line != SILENT).sum() / max(1, len(first))]))
            leaps.append(np.clip(np.diff(line[first]), -13, 13) + 13)
            beats.append(first % STEPS)
    mean = {"outside": outside, "crossed": crossed, "repeated": repeated}
    return {
        **{k: float(np.concatenate(x).mean()) for k, x in mean.items()},
        "tonal": float(np.mean(tonal)),
        "length": float(np.concatenate(notes).mean()),
        "profile": profile / len(grids),
        "leaps": shares(leaps, 27),
        "beats": shares(beats, STEPS),
        "chords": shares(chords, 12**3),
    }


def compared(found: dict, reference: dict) -> dict[str, float]:
    """Distributions as their distance from those of the reference."""
    row = {k: x for k, x in found.items() if not isinstance(x, np.ndarray)}
    pair = found["profile"], reference["profile"]
    row["profile"] = float(np.corrcoef(*pair)[0, 1])
    for name in ("leaps", "beats", "chords"):
        row[name] = float(np.abs(found[name] - reference[name]).sum() / 2)
    return row


COLUMNS = ("nll", "outside", "crossed", "tonal", "profile", "repeated", "length")
COLUMNS += ("leaps", "beats", "chords")


def show(name: str, row: dict[str, float]) -> None:
    """A line of the table."""
    cells = (f"{row[k]:.3f}" if k in row else "" for k in COLUMNS)
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def head() -> None:
    """The first two lines of the table."""
    print("| pieces | " + " | ".join(COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")


def ranges_of(train: Grids) -> np.ndarray:
    """[voices, 2]: the lowest and the highest pitch of each voice."""
    stacked = np.concatenate(train)
    return np.array([(x[x != SILENT].min(), x.max()) for x in stacked.T])


def write(args: argparse.Namespace) -> None:
    """The table of what is written."""
    train, held = corpus("train"), corpus("validation")
    ranges = ranges_of(train)
    reference = statistics(train, ranges)
    markov, rng = Markov(train), np.random.default_rng(args.seed)
    chain = [markov.write(args.steps, rng) for _ in range(args.samples)]
    sampler = Sampler(args.workdir, temperature=args.temperature, top_p=args.top_p)
    options = {"num_samples": args.samples, "batch_size": args.samples}
    most = args.steps * VOICES
    (output,) = sampler([""], max_tokens=most, seed=args.seed, **options)
    pieces = [x.music for x in output.samples]
    model = [x.voices(VOICES, STEPS) for x in pieces]
    loss = evaluate.run(args.workdir, "validation").numbers()["validation/loss"]
    head()
    show(f"training corpus, {len(train)}", compared(reference, reference))
    show(f"validation, {len(held)}", compared(statistics(held, ranges), reference))
    found = compared(statistics(model, ranges), reference) | {"nll": loss}
    show(f"model, {len(model)}", found)
    found = compared(statistics(chain, ranges), reference) | {"nll": markov.nll(held)}
    show(f"Markov, {len(chain)}", found)
    if args.output:
        os.makedirs(args.output, exist_ok=True)
        for number, piece in enumerate(pieces[:8], 1):
            with open(os.path.join(args.output, f"chorale_{number}.mid"), "wb") as f:
                f.write(piece.to_midi())
        with open(os.path.join(args.output, "chorales.png"), "wb") as f:
            f.write(picture(pieces[:8]))


def harmonise(args: argparse.Namespace) -> None:
    """Agreement with Bach where only the soprano is given, and the same table."""
    # A batch takes as long as its longest piece.
    true = sorted(corpus("test")[: args.pieces], key=len)
    given = []
    for grid in true:
        alone = grid.copy()
        alone[:, 1:] = SILENT
        given.append(Music.of_voices(alone, STEPS))
    sampler = Sampler(args.workdir, temperature=args.temperature, top_p=args.top_p)
    outputs = sampler(given, seed=args.seed, batch_size=16)
    pieces, train = [x.music.voices(VOICES, STEPS) for x in outputs], corpus("train")
    ranges = ranges_of(train)
    reference = statistics(train, ranges)
    head()
    for name, grids in (("Bach", true), ("model", pieces)):
        row = compared(statistics(grids, ranges), reference)
        show(f"{name}, {len(grids)} of test", row)
    drawn, bach = np.concatenate(pieces), np.concatenate(true)
    train = np.concatenate(train)
    print(f"sopranos kept: {bool((drawn[:, 0] == bach[:, 0]).all())}")
    for voice, name in enumerate(("alto", "tenor", "bass"), 1):
        usual = np.bincount(train[:, voice] + 1).argmax() - 1
        same, close = drawn[:, voice] == bach[:, voice], drawn % 12 == bach % 12
        print(
            f"{name}: {same.mean():.1%} of 16ths as Bach has them, "
            f"{close[:, voice].mean():.1%} by pitch class; the commonest pitch: "
            f"{(bach[:, voice] == usual).mean():.1%}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("write", "harmonise"))
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=77)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    {"write": write, "harmonise": harmonise}[args.what](args)


if __name__ == "__main__":
    main()
