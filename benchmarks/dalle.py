"""What a trained DALL-E draws and how well its texts fit: numbers of docs/dalle.md.

    python benchmarks/dalle.py digits --workdir=runs/dalle_digits \
        --classifier=runs/vit_digits [--samples=20] [--guidance=2] [--temperature=1] \
        [--rerank=runs/contrastive_digits --of=8]
    python benchmarks/dalle.py likelihood --workdir=runs/dalle_emoji [--blind=DIR]
    python benchmarks/dalle.py retrieval --workdir=runs/dalle_emoji
    python benchmarks/dalle.py grid --workdir=runs/dalle_emoji --output=grid.png

digits: every phrasing of every digit is drawn, and the pictures are classified by a ViT
that has seen no drawn picture; ranked, each is the best of 8. likelihood: nats per code
of held-out pictures, with their captions, without, and by the frequencies of codes in
training; what captions are worth, with its standard error over figures, comes once
more for one picture a figure, without skin tone. retrieval: of these, how likely each
is under each name. grid: the first 32 names, of each the first sample and, small,
the picture.
"""

import argparse
import textwrap
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triform import Sampler, evaluate
from triform import workdir as workdirs
from triform.data import batch as batches
from triform.data.datasets import EVALUATION
from triform.data.datasets.augment import to_pillow, with_channels
from triform.data.sources.phrases import DIGITS, HANDWRITTEN
from triform.input_pipeline import Split


def digits(args: argparse.Namespace) -> None:
    """Share of drawn digits that the classifier takes for the named ones."""
    tested = evaluate.run(args.classifier, "test").numbers()["test/accuracy"]
    print(f"classifier: {tested:.2%} of held-out pictures right")
    sampler = drawing(args)
    classifier, right = Sampler(args.classifier), {}
    for label, name in enumerate(DIGITS):
        texts = [phrase.format(name) for phrase in HANDWRITTEN]
        images = drawn(sampler, texts, args)
        found = [answer.label for answer in classifier(images, batch_size=64)]
        right[name] = np.array([str(x) == str(label) for x in found])
        print(f"  {name:6} {right[name].mean():.1%} of {len(found)}", flush=True)
    every = np.concatenate([*right.values()])
    print(f"drawn as named: {every.mean():.2%} of {len(every):,}")


def drawing(args: argparse.Namespace) -> Sampler:
    """The sampler of a workdir, with the settings that are given."""
    settings = {"temperature": args.temperature, "guidance": args.guidance}
    return Sampler(args.workdir, rerank=args.rerank, **settings)


def drawn(
    sampler: Sampler, texts: Sequence[str], args: argparse.Namespace
) -> list[np.ndarray]:
    """args.samples pictures of each text; ranked, each is the best of args.of."""
    if not args.rerank:
        outputs = sampler(texts, num_samples=args.samples, seed=args.seed)
        return [x.image for output in outputs for x in output.samples or [output]]
    outputs = [
        output
        for seed in range(args.seed, args.seed + args.samples)
        for output in sampler(texts, num_samples=args.of, seed=seed)
    ]
    return [output.image for output in outputs]


class Likelihood:
    """log p(codes | text) of rows of a split, nats per code."""

    def __init__(self, workdir: str):
        self.run = workdirs.open_run(workdir)
        config, experiment = self.run.config, self.run.experiment
        apply = jax.jit(experiment.model.apply)

        def nats(batch: dict[str, np.ndarray]) -> np.ndarray:
            logits = apply(self.run.variables, batch)["codes"]
            logp = np.asarray(jax.nn.log_softmax(logits))
            chosen = np.take_along_axis(logp, batch["codes"][..., None], -1)
            return -chosen[..., 0].mean(1)

        self._nats, self.config, self.codecs = nats, config, self.run.codecs

    def split(self, name: str) -> Split:
        """A split of its data."""
        sizes = self.run.experiment.sizes
        return Split.open(self.config.data, self.codecs, name, sizes)

    def rows(self, split: Split, items: Sequence[int]) -> dict[str, np.ndarray]:
        """A batch of these items."""
        shape = {"B": len(items), **self.config.data.shapes()[0]}
        batch = batches.zeros(self.config.data.spec(), shape)
        for row, item in enumerate(items):
            split.dataset.write(batch, row, int(item), EVALUATION)
        return batch

    def __call__(self, batch: dict[str, np.ndarray], size: int = 64) -> np.ndarray:
        """Nats per code [N]."""
        found = []
        for start in range(0, len(batch["text"]), size):
            part = {k: x[start : start + size] for k, x in batch.items()}
            missing = size - len(part["text"])
            full = {
                k: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
                for k, x in part.items()
            }
            found.append(self._nats(full)[: size - missing])
        return np.concatenate(found)


def without_text(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with captions left out."""
    segments = np.zeros_like(batch["text_segments"])
    segments[:, 0] = 1
    return {**batch, "text_segments": segments}


def likelihood(args: argparse.Namespace) -> None:
    """Nats per code with, without and beside texts."""
    model = Likelihood(args.workdir)
    train, test = model.split(model.config.data.train_split), model.split(args.split)
    batch = model.rows(test, range(len(test.dataset)))
    with_text, blind = model(batch), model(without_text(batch))
    codes = model.rows(train, range(len(train.dataset)))["codes"]
    size = model.config.model.num_codes

    def unigram(seen: np.ndarray, wanted: np.ndarray) -> float:
        counts = np.bincount(seen.ravel(), minlength=size) + 1.0
        return float(-np.log(counts / counts.sum())[wanted].mean())

    each = [unigram(codes[:, i], batch["codes"][:, i]) for i in range(codes.shape[1])]
    print(f"{args.split}: {len(with_text)} pictures, {size} codes, nats per code")
    print(f"  uniform                {np.log(size):.4f}")
    print(f"  unigram                {unigram(codes, batch['codes']):.4f}")
    print(f"  unigram by position    {np.mean(each):.4f}")
    plain = {"captions left out": blind}
    if args.blind:
        plain["trained without texts"] = Likelihood(args.blind)(without_text(batch))
    print(f"  with captions          {with_text.mean():.4f}")
    groups, kept = figures(test), bare(test)
    for name, nats in plain.items():
        gain = nats - with_text
        print(f"  {name:22} {nats.mean():.4f}")
        print(f"    captions help by     {with_error(gain, groups)}")
        print(f"    of bare figures      {with_error(gain[kept], groups[kept])}")


def figures(split: Split) -> np.ndarray:
    """int64 [N]: a number for the figure of every picture."""
    examples = (split.dataset.example(i) for i in range(len(split.dataset)))
    names = [str(x.get("figure", i)) for i, x in enumerate(examples)]
    return np.unique(names, return_inverse=True)[1]


def with_error(values: np.ndarray, groups: np.ndarray) -> str:
    """Mean of values [N] and its standard error; within a group they depend."""
    sums = np.bincount(groups, values - values.mean())
    return f"{values.mean():.4f} +- {np.sqrt((sums**2).sum()) / len(values):.4f}"


def bare(split: Split) -> list[int]:
    """Items of a split without skin tones, one for each figure."""
    dataset, seen, found = split.dataset, set(), []
    for item in range(len(dataset)):
        example = dataset.example(item)
        figure = example.get("figure", item)
        if not example.get("toned", False) and figure not in seen:
            seen.add(figure)
            found.append(item)
    return found


def retrieval(args: argparse.Namespace) -> None:
    """Ranks of each name's own picture among all held-out ones, by likelihood."""
    model = Likelihood(args.workdir)
    split = model.split(args.split)
    items = bare(split)
    batch = model.rows(split, items)
    plain, count = model(without_text(batch)), len(items)
    nats = np.zeros((count, count))  # of the picture of a column, given a row's name
    for i in range(count):
        texts = {k: np.repeat(batch[k][i : i + 1], count, 0) for k in TEXTS}
        nats[i] = model({**batch, **texts})
    print(f"{args.split}: {count} pictures and names")
    for name, scores in (
        ("log p(picture | name) - log p(picture)", plain - nats),
        ("log p(picture | name)", -nats),
        ("log p(picture | name), of names", -nats.T),
    ):
        own = scores.diagonal()[:, None]
        rank = (scores > own).sum(1) + 1
        shares = ", ".join(f"{(rank <= k).mean():.1%} in {k}" for k in (1, 5, 10))
        print(f"  {name}: {shares}; median rank {np.median(rank):.0f}")
    shares = ", ".join(f"{k / count:.1%} in {k}" for k in (1, 5, 10))
    print(f"  chance: {shares}; median rank {(count + 1) / 2:.0f}")


TEXTS = ("text", "text_segments")


def grid(args: argparse.Namespace) -> None:
    """A PNG of the first 32 held-out names: the first sample, and what it should be."""
    sampler = drawing(args)
    run = sampler.run
    config, sizes = run.config.data, run.experiment.sizes
    split = Split.open(config, run.codecs, args.split, sizes)
    examples = [split.dataset.example(i) for i in bare(split)[:32]]
    names = [x[config.text] for x in examples]
    images = [x.image for x in sampler(names, seed=args.seed)]
    pairs = [
        (image, np.asarray(x[config.image]))
        for image, x in zip(images, examples, strict=True)
    ]
    labelled(pairs, names).save(args.output, optimize=True)
    print(f"{args.output}: of each name the first sample, right of it the picture")


SIDE, WIDE, LINE = 64, 8, 11  # pixels of a picture, pairs in a row, pixels of a line


def labelled(
    pairs: Sequence[Sequence[np.ndarray]], names: Sequence[str]
) -> Image.Image:
    """Pairs of pictures, the first sharp and the second half as large, with names."""
    font, width, height = ImageFont.load_default(LINE), SIDE * 7 // 4, SIDE + 3 * LINE
    rows = -(-len(names) // WIDE)
    sheet = Image.new("RGB", (WIDE * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        left, top = i % WIDE * width, i // WIDE * height
        for image, side, x, y in zip(
            pair, (SIDE, SIDE // 2), (0, SIDE + 4), (0, SIDE // 2), strict=True
        ):
            shown = to_pillow(with_channels(image, 3))
            shown = shown.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + x, top + y))
        lines = "\n".join(textwrap.wrap(name, 17)[:2])
        pen.multiline_text((left, top + SIDE), lines, "black", font, spacing=0)
    return sheet.quantize(160)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=WHAT)
    for name in ("workdir", "classifier", "blind", "rerank", "output"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--split", default="test")
    parser.add_argument("--samples", type=int, default=20, help="of each text")
    parser.add_argument("--of", type=int, default=8, help="drawn for one ranked first")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    WHAT[args.what](args)


WHAT = {
    "digits": digits,
    "likelihood": likelihood,
    "retrieval": retrieval,
    "grid": grid,
}

if __name__ == "__main__":
    main()
