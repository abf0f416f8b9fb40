"""Scores a finished or running workdir.

python evaluate.py --workdir=runs/transformer_cldr [--split=test] [--checkpoint=best]
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from triform.configs.schema import ExperimentConfig
from triform.data import datasets
from triform.data.codecs.text import Tokenizer
from triform.data.datasets import Dataset
from triform.data.store import load_tokenizer
from triform.experiment import (
    Experiment,
    checkpoint_dir,
    for_these_devices,
    open_workdir,
)
from triform.input_pipeline import Batches
from triform.models import decode
from triform.runtime import launch, metrics
from triform.runtime.checkpoint import Checkpointer
from triform.scores import text as scores


@dataclasses.dataclass
class Result:
    """What one evaluation found."""

    scalars: dict[str, Any]  # 'prefix/name': value; signatures are text
    samples: str  # source, reference and output of a few examples
    seconds: float

    def numbers(self) -> dict[str, float]:
        """The scalars without the signatures."""
        return {k: v for k, v in self.scalars.items() if not isinstance(v, str)}


@dataclasses.dataclass
class Split:
    """One split, opened."""

    name: str
    batches: Batches
    dataset: Dataset

    @classmethod
    def open(cls, config: ExperimentConfig, tok: Tokenizer | None, name: str):
        """DataError if it does not exist or holds what the model cannot read."""
        limits = config.model.limits()
        dataset = datasets.open(config.data, name, tok, limits)
        batches = Batches(dataset)
        batches.buckets(cut=True)
        return cls(name, batches, dataset)


class Evaluator:
    """Evaluates parameters on splits; compiled once, called at many steps."""

    def __init__(self, experiment: Experiment, tok: Tokenizer | None):
        self.experiment, self.tokenizer = experiment, tok
        self.eval_step = experiment.placement.compile_eval(experiment.eval_step)
        if experiment.config.evaluation.metrics:
            self.generate = make_generate(experiment, tok)

    def __call__(
        self,
        params: Any,
        split: Split,
        prefix: str,
        limit: int = 0,
        stop: Callable[[], Any] = lambda: False,
    ) -> Result | None:
        """Losses over the whole split, generation for its first `limit` (0: all), of
        every part of a mixture.

        None as soon as `stop()` is true between two batches.
        """
        experiment, config = self.experiment, self.experiment.config
        start = time.perf_counter()
        total, count, written = None, 0, {}
        items = len(split.dataset.sizes)

        def chosen(item: int) -> bool:
            return not limit or split.dataset.group(item)[1] < limit

        bar = tqdm(total=items, desc=prefix, disable=None, leave=False)
        for ids, batch in split.batches.evaluation():
            if stop():
                bar.close()
                return None
            measured = self.eval_step(params, experiment.put(batch))
            if config.evaluation.metrics and any(map(chosen, ids.tolist())):
                inputs = experiment.placement.for_generation(params, batch)
                tokens = np.asarray(self.generate(*inputs, np.uint32(0))[0])
                texts = (self.tokenizer.decode(row) for row in tokens)
                # The batch may have more rows than examples: padding.
                written |= dict(zip(ids.tolist(), texts, strict=False))
            total = metrics.add(total, metrics.to_host(measured))
            count += len(ids)
            bar.update(len(ids))
        bar.close()
        found = {name: m.value() for name, m in total.items()}
        found |= split.dataset.scalars(float(total["loss"].total))
        found |= {"examples": count, "cut": split.batches.cut()}
        texts = {i: text for i, text in sorted(written.items()) if chosen(i)}
        scores, samples = self._score(split, texts)
        found |= scores
        scalars = {f"{prefix}/{name}": x for name, x in found.items()}
        return Result(scalars, samples, time.perf_counter() - start)

    def _score(
        self, split: Split, written: dict[int, str]
    ) -> tuple[scores.Scores, str]:
        if not written:
            return {}, ""
        config = self.experiment.config.evaluation
        texts = {i: split.dataset.text(i) for i in written}
        groups: dict[str, list[int]] = {}
        for i in written:
            groups.setdefault(split.dataset.group(i)[0], []).append(i)
        scores = {}
        for group, ids in groups.items():
            found = scores.score(
                config, [written[i] for i in ids], [texts[i][1] for i in ids]
            )
            lead = f"{group}/" if group else ""
            scores |= {f"{lead}{name}": x for name, x in found.items()}
        step = max(1, len(written) // max(1, config.samples))
        samples = "\n".join(
            f"source     {texts[i][0]}\nreference  {texts[i][1]}\n"
            f"output     {one_line(written[i])}\n"
            for i in [*written][::step][: config.samples]
        )
        return scores, samples


def make_generate(experiment: Experiment, tok: Tokenizer):
    """(params, batch, seed) -> (tokens [B, length], scores [B]), compiled a shape."""
    config, model = experiment.config, experiment.model
    length = config.decode.max_len or config.data.max_len

    @jax.jit
    def generate(params: Any, batch: Any, seed: jax.Array):
        variables = {"params": params}

        def extend(tokens, positions, cache):
            return model.apply(variables, tokens, positions, cache, method="extend")

        start = model.apply(variables, batch, length, method="start")
        options = {"eos": tok.eos, "length": length, "rng": jax.random.key(seed)}
        return decode.generate(config.decode, extend, *start, **options)

    return generate


def one_line(text: str) -> str:
    """Text without what would break a line or move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def summary(result: Result) -> str:
    """'eval/loss 1.234  eval/bleu 40.12'."""
    return "  ".join(f"{k} {v:.4g}" for k, v in result.numbers().items())


def write_samples(workdir: str, name: str, samples: str) -> None:
    """Into samples/NAME.txt, replacing what an interrupted evaluation left."""
    os.makedirs(os.path.join(workdir, "samples"), exist_ok=True)
    with open(os.path.join(workdir, "samples", f"{name}.txt"), "w") as f:
        f.write(samples)


def main(argv: list[str]) -> None:
    """Loads a checkpoint of --workdir, prints its scores as one JSON object."""
    flag = flags.FLAGS
    workdir = launch.folder_flag("workdir")
    config = open_workdir(workdir)
    if flag.beam_size:
        config.decode.method, config.decode.beam_size = "beam", flag.beam_size
    experiment = Experiment(for_these_devices(config))
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        params, which = experiment.load_params(checkpointer, flag.checkpoint)
    split = flag.split or config.data.eval_split
    tok = load_tokenizer(workdir) if datasets.needs_tokenizer(config.data) else None
    opened = Split.open(config, tok, split)
    print(f"{workdir}: {which}, split {split}", file=sys.stderr)
    result = Evaluator(experiment, tok)(params, opened, split)
    print(result.samples, file=sys.stderr)
    report = {"checkpoint": which, "split": split, "seconds": result.seconds}
    report |= {"decode": dataclasses.asdict(config.decode), **result.scalars}
    name = f"evaluation_{split}_{flag.checkpoint}".replace(":", "_")
    with open(os.path.join(workdir, f"{name}.json"), "w") as f:
        json.dump(report, f, indent=2, ensure_ascii=False)
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A workdir of train.py.", required=True)
    flags.DEFINE_string("split", "", "A split; empty: data.eval_split.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, average:K, or a step.")
    flags.DEFINE_integer("beam_size", 0, "Beams; 0: as the config says.")
    launch.launch(main)
