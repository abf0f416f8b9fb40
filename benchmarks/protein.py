"""Baselines of secondary structure, and what attention looks at: docs/applications.

    python benchmarks/protein.py windows
    python benchmarks/protein.py helices --output=helices/
    python benchmarks/protein.py states --workdir=runs/protein
    python benchmarks/protein.py attention --workdir=runs/protein --output=FILE.png

windows: two baselines that count, over all resolved residues of NEW364. The first gives
a residue the most frequent state of its window of residues in training, and takes a
narrower one where that is rare; the second sums log-odds of the residues around it
(Garnier et al. 1978). Widths and counts are chosen on the validation split. helices:
writes tables of the chains and of their share of residues in helices, for
protein.py:regression, and has as a baseline least squares on how often a chain has each
residue. states: Q3 of a trained model, and of each state how many are found and how
many are right. attention: of one protein the attention of every layer, averaged over
heads, beside its states; and how far from itself a residue looks.
"""

import argparse
import collections
import csv
import os
from collections.abc import Sequence

import jax
import numpy as np
import scipy.stats
from PIL import Image, ImageDraw

from triform import Sampler, evaluate
from triform import workdir as workdirs
from triform.data.codecs.residues import ALPHABET
from triform.data.datasets import request_batch
from triform.data.sources import source
from triform.models.positions import POSITIONS, rotate

STATES = "HEC"
WIDEST = 8  # residues on either side
Counts = tuple[np.ndarray, np.ndarray]  # distinct keys, how often each has each state
COLOURS = {"H": (200, 60, 60), "E": (60, 90, 200), "C": (190, 190, 190)}


# --- Baselines ---


class Residues:
    """All residues of a split."""

    def __init__(self, split: str):
        examples = list(source("flip_ss3").examples(split))
        number = {letter: i + 1 for i, letter in enumerate(ALPHABET)}
        gap = np.zeros(WIDEST, np.int64)
        parts = [gap]
        for example in examples:
            parts += [np.array([number[c] for c in example["sequence"]]), gap]
        ids = np.concatenate(parts)
        real = np.flatnonzero(ids)
        mask = np.array([*map(int, "".join(x["mask"] for x in examples))]) > 0
        states = "".join(x["ss3"] for x in examples)
        self.state = np.array([STATES.index(c) for c in states])[mask]
        self._ids, self._at = ids, real[mask]

    def residue(self, offset: int) -> np.ndarray:
        """int64 [N]: the one at this distance from each resolved residue; 0: none."""
        return self._ids[self._at + offset]

    def window(self, side: int) -> np.ndarray:
        """int64 [N]: a number for every window of `side` residues on either side."""
        found = np.zeros(len(self._at), np.int64)
        for offset in range(-side, side + 1):
            found = found * (len(ALPHABET) + 1) + self.residue(offset)
        return found


def frequencies(keys: np.ndarray, states: np.ndarray) -> Counts:
    """(distinct keys, ascending; how often each has each state [K, 3])."""
    distinct, which = np.unique(keys, return_inverse=True)
    counts = np.zeros((len(distinct), len(STATES)), np.int64)
    np.add.at(counts, (which, states), 1)
    return distinct, counts


def by_window(tables: Sequence[Counts], test: Residues, least: int) -> np.ndarray:
    """States of a split by the widest window that training has `least` times.

    `tables` are the frequencies of training, of windows that grow by one residue on
    either side.
    """
    found = np.zeros(len(test.state), np.int64)
    for side, (keys, counts) in enumerate(tables):  # a wider window overrides
        asked = test.window(side)
        at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        known = (keys[at] == asked) & (counts[at].sum(1) >= least)
        found = np.where(known, counts[at].argmax(1), found)
    return found


def by_information(train: Residues, test: Residues, side: int) -> np.ndarray:
    """States of a split by sums of log-odds of the residues around."""
    prior = np.bincount(train.state, minlength=len(STATES)) / len(train.state)
    total = np.tile(np.log(prior), (len(test.state), 1))
    for offset in range(-side, side + 1):
        counts = np.ones((len(ALPHABET) + 1, len(STATES)))  # one of each, unseen too
        np.add.at(counts, (train.residue(offset), train.state), 1)
        share = counts / counts.sum(0)
        total += np.log(share / (share @ prior)[:, None])[test.residue(offset)]
    return total.argmax(1)


def windows(args: argparse.Namespace) -> None:
    """The baselines, chosen on validation and scored on test."""
    train, valid, test = (Residues(s) for s in ("train", "validation", "test"))
    common = np.bincount(train.state).argmax()
    print(f"{'residues':34}{len(test.state):,} of test")
    print(f"{'most frequent state':34}{share(test.state == common)}")
    tables = [frequencies(train.window(side), train.state) for side in range(5)]
    scored = {
        (side, least): (
            by_window(tables[: side + 1], valid, least) == valid.state
        ).mean()
        for side in range(1, len(tables))
        for least in (1, 2, 4, 8, 16, 32)
    }
    side, least = max(scored, key=scored.get)
    guessed = by_window(tables[: side + 1], test, least)
    name = f"window of {2 * side + 1}, seen {least} times"
    print(f"{name:34}{share(guessed == test.state)}")
    scored = {
        n: (by_information(train, valid, n) == valid.state).mean()
        for n in range(4, WIDEST + 1)
    }
    side = max(scored, key=scored.get)
    guessed = by_information(train, test, side)
    name = f"log-odds of {2 * side + 1} residues"
    print(f"{name:34}{share(guessed == test.state)}")


def share(right: np.ndarray) -> str:
    """'38.6 %'."""
    return f"{100 * right.mean():.1f} %"


# --- A number for a chain ---


def helices(args: argparse.Namespace) -> None:
    """Writes train.csv and so on; prints Spearman's correlation of the baseline."""
    folder = args.output or "helices"
    os.makedirs(folder, exist_ok=True)
    chains = {}
    for split in ("train", "validation", "test"):
        sequences, targets = [], []
        for x in source("flip_ss3").examples(split):
            known = [s for s, m in zip(x["ss3"], x["mask"], strict=True) if m == "1"]
            sequences.append(x["sequence"])
            targets.append(known.count("H") / len(known))
        with open(os.path.join(folder, f"{split}.csv"), "w", newline="") as f:
            table = csv.writer(f)
            table.writerow(("sequence", "target"))
            table.writerows(zip(sequences, targets, strict=True))
        shares = [[1, *(s.count(c) / len(s) for c in ALPHABET)] for s in sequences]
        chains[split] = np.array(shares), np.array(targets)
    weights = np.linalg.lstsq(*chains["train"])[0]
    shares, targets = chains["test"]
    found = scipy.stats.spearmanr(shares @ weights, targets).statistic
    print(f"composition: Spearman {found:.3f}, {len(targets)} chains of test")


# --- A trained model ---


def states(args: argparse.Namespace) -> None:
    """Q3, and what of every state is found."""
    result = evaluate.run(args.workdir, args.split, predictions=True)
    examples = source("flip_ss3").examples(args.split)
    pairs: collections.Counter = collections.Counter()
    for line in result.predictions:
        example = examples[line["example"]]
        resolved = [
            state
            for state, real in zip(example["ss3"], example["mask"], strict=True)
            if real == "1"
        ]
        pairs.update(zip(resolved, line["tags"], strict=True))
    total = sum(pairs.values())
    right = sum(n for (a, b), n in pairs.items() if a == b)
    print(f"Q3 {100 * right / total:.2f} % of {total:,} residues")
    for state in STATES:
        there = sum(n for (a, _), n in pairs.items() if a == state)
        said = sum(n for (_, b), n in pairs.items() if b == state)
        hits = pairs[state, state]
        print(f"  {state}: {hits / there:.1%} found, {hits / max(said, 1):.1%} right")


def attention_of(run: workdirs.Run, sequence: str) -> np.ndarray:
    """float32 [layers, heads, L, L]: who looks at whom among the residues."""
    experiment, trunk = run.experiment, run.config.model.trunk
    data, sizes = run.config.data, experiment.sizes
    batch = request_batch(data, [sequence], 1, run.codecs, sizes)
    kept = ("query", "key", "relative_bias")
    _, found = experiment.model.apply(
        run.variables,
        batch,
        capture_intermediates=lambda module, _: module.name in kept,
        mutable=["intermediates"],
    )
    _, mask = experiment.model.apply(
        run.variables, batch, method=lambda model, batch: model.frontend(batch)
    )
    inner, maps = found["intermediates"]["encoder"], []
    bias, rotation = 0.0, None
    if "relative_bias" in inner:
        (bias,) = inner["relative_bias"]["__call__"]
    elif attend := POSITIONS[trunk.positions].attend:
        rotation = attend(trunk, mask).rotation
    for i in range(trunk.num_layers):
        layer = inner[f"layer_{i}"]["self_attention"]
        query, key = (layer[name]["__call__"][0] for name in ("query", "key"))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        window, _ = trunk.limits_of(i)
        seen = mask.replace(window=window).allowed()[:, None]
        scores = trunk.scale() * np.einsum("blhe,bshe->bhls", query, key) + bias
        maps.append(jax.nn.softmax(np.where(seen, scores, -np.inf), -1)[0])
    residues = slice(1, 1 + len(sequence))
    return np.stack(maps)[:, :, residues, residues]


def attention(args: argparse.Namespace) -> None:
    """Writes the picture; prints how far each layer looks, and at which states."""
    run = workdirs.open_run(args.workdir)
    example = source("flip_ss3").examples(args.split)[args.example]
    sequence, known = example["sequence"], example["ss3"]
    maps = attention_of(run, sequence)
    said = run_states(run, sequence)
    path = args.output or "attention.png"
    picture(maps.mean(1), known, said).save(path, optimize=True)
    print(f"{args.split} {args.example}: {len(sequence)} residues")
    same = np.array([[a == b for b in known] for a in known])
    steps = np.arange(len(known))
    distance = abs(steps[:, None] - steps)
    for i, heads in enumerate(maps):
        weights = heads / heads.sum(-1, keepdims=True)
        far = (weights * distance).sum(-1).mean(-1)
        # The same with weights that only know the distance.
        near = [weights.mean(0)[distance == d].mean() for d in range(len(known))]
        blind = np.array(near)[distance]
        blind /= blind.sum(-1, keepdims=True)
        shares = [(w * same).sum(-1).mean() for w in (weights.mean(0), blind)]
        print(
            f"layer {i + 1}: mean distance {far.mean():.1f} residues (heads "
            f"{far.min():.1f} to {far.max():.1f}); {shares[0]:.1%} at residues of the "
            f"same state, {shares[1]:.1%} by distance alone"
        )


def run_states(run: workdirs.Run, sequence: str) -> str:
    """The predicted state of every residue."""
    (answer,) = Sampler(run.path)([sequence])
    return "".join(tag or "C" for _, tag in answer.tags)


STRIPE, MARGIN, COLUMNS = 6, 20, 2  # pixels, pixels, panels in a row


def picture(maps: np.ndarray, known: str, said: str) -> Image.Image:
    """Panels of maps [layers, L, L]: rows look at columns, the darker the more.

    Above and on the left the states: outer stripe the true ones, inner the predicted.
    """
    scale = max(1, 360 // len(known))
    panels = [panel(layer, (known, said), scale) for layer in maps]
    size = panels[0].width + MARGIN
    rows = -(-len(panels) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * size, rows * size), "white")
    draw = ImageDraw.Draw(canvas)
    for i, one in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        canvas.paste(one, (column * size + MARGIN // 2, row * size + MARGIN))
        where = column * size + MARGIN // 2, row * size + 6
        draw.text(where, f"layer {i + 1}", "black")
    return canvas.convert("P", palette=Image.ADAPTIVE, colors=128)


def panel(layer: np.ndarray, stripes: Sequence[str], scale: int) -> Image.Image:
    """One map [L, L] with stripes of states above it and on its left."""
    edge, size = len(stripes) * (STRIPE + 1), scale * len(layer)
    found = Image.new("RGB", (edge + size, edge + size), "white")
    shade = 255 * (1 - np.sqrt(np.clip(layer / np.quantile(layer, 0.995), 0, 1)))
    tile = Image.fromarray(shade.astype(np.uint8)).resize((size, size), 0)
    found.paste(tile, (edge, edge))
    draw = ImageDraw.Draw(found)
    for number, states in enumerate(stripes):
        begin = number * (STRIPE + 1)
        across = begin, begin + STRIPE - 1
        for at, state in enumerate(states):
            along = edge + scale * at, edge + scale * (at + 1) - 1
            for x, y in ((along, across), (across, along)):
                draw.rectangle((x[0], y[0], x[1], y[1]), COLOURS[state])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    kinds = {
        "windows": windows,
        "helices": helices,
        "states": states,
        "attention": attention,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--workdir", default="runs/protein")
    parser.add_argument("--split", default="test")
    parser.add_argument("--example", type=int, default=48)
    parser.add_argument("--output", default="")
    args = parser.parse_args(argv)
    kinds[args.what](args)


if __name__ == "__main__":
    main()
