"""Recommendation beside baselines, by both protocols: docs/applications/recommendation.

    python benchmarks/recommend.py table [--workdir=runs/sasrec] [--split=test]
    python benchmarks/recommend.py picture --workdir=runs/sasrec --output=FILE.png

table: popularity, a first-order Markov chain and the runs, a line each. picture: that,
and the first run's validation over its training beside bars of all (needs
matplotlib). The data are those of the first run, else of configs/sasrec.py. Popularity
counts training items; the chain counts which item followed which in training, and where
that leaves ties the popular item comes first.
"""

import argparse
from collections.abc import Mapping

import numpy as np

from triform import evaluate
from triform import workdir as workdirs
from triform.configs import sasrec
from triform.data.codecs import files
from triform.input_pipeline import Split
from triform.runtime import metrics
from triform.tasks import ranking

SHOWN = ("hr_10", "ndcg_10", "mrr")
ROWS = 256  # users that are scored at once


class Counts:
    """How often items were chosen in training, and which followed which."""

    def __init__(self, train: Split, items: int):
        dataset = train.dataset
        histories = [dataset.history(item) for item in range(len(dataset))]
        self.items = items
        self.popular = np.bincount(np.concatenate(histories), minlength=items)
        pairs = [np.stack([x[:-1], x[1:]], 1) for x in histories]
        self.pairs, self.times = np.unique(
            np.concatenate(pairs), axis=0, return_counts=True
        )
        self.first = np.searchsorted(self.pairs[:, 0], np.arange(items + 1))

    def popularity(self, last: np.ndarray) -> np.ndarray:
        """Scores [B, items], the same for everybody."""
        return np.broadcast_to(self.popular.astype(np.float64), (len(last), self.items))

    def markov(self, last: np.ndarray) -> np.ndarray:
        """Scores [B, items] after these items."""
        scores = self.popular / (self.popular.max() + 1.0)
        scores = np.repeat(scores[None], len(last), 0)
        for row, item in enumerate(last.tolist()):
            part = slice(self.first[item], self.first[item + 1])
            scores[row, self.pairs[part, 1]] += self.times[part]
        return scores


def compared(own: np.ndarray, others: np.ndarray) -> ranking.Ranked:
    """Scores [B] among others [B, N], in which they are themselves once or never."""
    above = (others > own[:, None]).sum(1).astype(np.float32)
    ties = (others == own[:, None]).sum(1).astype(np.float32)
    return ranking.Ranked(above, ties, own, own)


def baseline(split: Split, score) -> dict[str, float]:
    """Metrics of scores by the last item of a history, as evaluation reports them."""
    dataset, every, drawn, weights = split.dataset, [], [], []
    for items, batch in split.batches.evaluation():
        n = len(items)
        last = np.array([dataset.history(item)[-2] for item in items])
        scores, target = score(last), batch["targets"][:n, -1]
        own = np.take_along_axis(scores, target[:, None], 1)[:, 0]
        among = compared(own, scores)
        every.append(among.replace(ties=among.ties - 1))  # itself
        chosen = np.take_along_axis(scores, batch["candidates"][:n], 1)
        drawn.append(compared(own, chosen))
        weights.append(batch["candidate_weights"][:n])
    weights = np.concatenate(weights)
    found = {}
    for lead, parts, counts in (
        ("", every, np.ones(len(weights))),
        ("sampled_", drawn, weights),
    ):
        above, ties = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("above", "ties")
        )
        of_each = ranking.Ranked(above, ties, above, above).metrics()
        for name, x in of_each.items():
            found[lead + name] = float(np.average(np.asarray(x), weights=counts))
    return found


def opened(workdirs_given: list[str], name: str) -> tuple[Split, Split]:
    """(training data, the split that is scored)."""
    if workdirs_given:
        run = workdirs.open_run(workdirs_given[0])
        config, codecs = run.config, run.codecs
    else:
        config = sasrec.get_config()
        codecs = files.build(config.data, config.model.sizes())
        config = config.resolved(files.class_counts(config.data, codecs))
    config.data.batch_size = ROWS
    sizes = config.model.sizes()
    return tuple(
        Split.open(config.data, codecs, split, sizes)
        for split in (config.data.train_split, name)
    )


def scored(args: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """Name -> metrics of the baselines and the runs."""
    train, split = opened(args.workdir, args.split)
    counts = Counts(train, split.dataset.model_sizes["num_items"])
    found = {
        "popularity": baseline(split, counts.popularity),
        "Markov chain": baseline(split, counts.markov),
    }
    for path in args.workdir:
        # What training has scored at its end need not be scored again.
        lines = [x for x in metrics.read_lines(path) if f"{args.split}/mrr" in x]
        numbers = lines[-1] if lines else evaluate.run(path, args.split).numbers()
        name = path.rstrip("/").rsplit("/", 1)[-1]
        found[name] = {k.partition("/")[2]: x for k, x in numbers.items()}
    return found


def table(args: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """A table in Markdown; the metrics by name."""
    names, found = [*(f"sampled_{x}" for x in SHOWN), *SHOWN], scored(args)
    print(f"| {args.split} | {' | '.join(names)} |")
    print(f"|---|{'---|' * len(names)}")
    for name, row in found.items():
        print(f"| {name} | {' | '.join(f'{row[x]:.4f}' for x in names)} |")
    return found


def picture(args: argparse.Namespace) -> None:
    """Learning curve beside bars."""
    # An extra, which the table does not need.
    from matplotlib.figure import Figure

    figure = Figure((8, 3), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = metrics.read_lines(args.workdir[0])
    for key in ("sampled_hr_10", "sampled_ndcg_10", "hr_10"):
        points = [(x["step"], x[f"eval/{key}"]) for x in lines if f"eval/{key}" in x]
        left.plot(*zip(*points, strict=True), label=key)
    left.set(xlabel="step", title="validation", ylim=0)
    left.legend()
    found = table(args)
    for i, (name, row) in enumerate(found.items()):
        where = np.arange(4) + i / (len(found) + 1)
        keys = ("sampled_hr_10", "sampled_ndcg_10", "hr_10", "ndcg_10")
        right.bar(where, [row[k] for k in keys], 1 / (len(found) + 1), label=name)
    shown = [k.replace("sampled_", "sampled\n") for k in keys]
    right.set_xticks(np.arange(4) + 0.3, shown, fontsize=8)
    right.set(title=args.split)
    right.legend()
    figure.savefig(args.output)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--workdir", action="append", default=[])
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", default="recommendation.png")
    args = parser.parse_args()
    WHAT[args.what](args)


WHAT = {"table": table, "picture": picture}

if __name__ == "__main__":
    main()
