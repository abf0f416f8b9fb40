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
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from triform import cli, decode, scoring
from triform.configs.base import ExperimentConfig
from triform.experiment import (
    Experiment,
    checkpoint_dir,
    for_these_devices,
    open_workdir,
)
from triform.input_pipeline import Batches, load_tokenizer, raw_examples, token_store
from triform.runtime import metrics
from triform.runtime.checkpoint import Checkpointer
from triform.tokenizer import EOS, PAD, Tokenizer


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
    """One split, opened: its batches and its text."""

    name: str
    batches: Batches
    raw: Any

    @classmethod
    def open(cls, config: ExperimentConfig, tok: Tokenizer, name: str) -> "Split":
        """DataError if it does not exist or holds what the model cannot read."""
        store = token_store(config.data, name, tok)
        batches = Batches(config.data, store, name, config.model.vocab_size)
        batches.buckets(cut=True)
        return cls(name, batches, raw_examples(config.data, name))


class Evaluator:
    """Evaluates parameters on splits; compiled once, called at many steps."""

    def __init__(self, experiment: Experiment, tok: Tokenizer):
        self.experiment, self.tokenizer = experiment, tok
        self.eval_step = experiment.placement.compile_eval(experiment.eval_step)
        self.generate = make_generate(experiment)

    def __call__(
        self,
        params: Any,
        split: Split,
        prefix: str,
        limit: int = 0,
        stop: Callable[[], Any] = lambda: False,
    ) -> Result | None:
        """Losses over the whole split, generation for its first `limit` (0: all).

        None as soon as `stop()` is true between two batches.
        """
        experiment, config = self.experiment, self.experiment.config
        start = time.perf_counter()
        total, count, written = None, 0, {}
        bar = tqdm(total=len(split.raw), desc=prefix, disable=None, leave=False)
        for ids, batch in split.batches.evaluation():
            if stop():
                bar.close()
                return None
            measured = self.eval_step(params, experiment.put(batch))
            if config.evaluation.metrics and not (limit and ids.min() >= limit):
                inputs = experiment.placement.for_generation(params, batch)
                tokens = np.asarray(self.generate(*inputs, np.uint32(0))[0])
                texts = (self.tokenizer.decode(row) for row in tokens)
                # The batch may have more rows than examples: padding.
                written |= dict(zip(ids.tolist(), texts, strict=False))
            total = metrics.add(total, metrics.to_host(measured))
            count += len(ids)
            bar.update(len(ids))
        bar.close()
        scalars = metrics.values(total, prefix)
        scalars |= {f"{prefix}/examples": count, f"{prefix}/cut": split.batches.cut()}
        scores, samples = self._score(split, written, limit)
        scalars |= {f"{prefix}/{name}": x for name, x in scores.items()}
        return Result(scalars, samples, time.perf_counter() - start)

    def _score(
        self, split: Split, written: dict[int, str], limit: int
    ) -> tuple[scoring.Scores, str]:
        if not written:
            return {}, ""
        config = self.experiment.config
        kept = sorted(i for i in written if not limit or i < limit)
        ours = [written[i] for i in kept]
        examples = [split.raw[i] for i in kept]
        references = [e[config.data.targets] for e in examples]
        scores = scoring.score(config.evaluation, ours, references)
        count = config.evaluation.samples
        step = max(1, len(kept) // max(1, count))
        shown = list(zip(examples, references, ours, strict=True))[::step][:count]
        samples = "\n".join(
            f"source     {e[config.data.inputs]}\nreference  {r}\n"
            f"output     {one_line(o)}\n"
            for e, r, o in shown
        )
        return scores, samples


def make_generate(experiment: Experiment):
    """(params, batch, seed) -> (tokens [B, length], scores [B]), compiled a shape."""
    config = experiment.config
    model = experiment.model
    length = config.decode.max_len or config.data.max_len

    @jax.jit
    def generate(params: Any, batch: Any, seed: jax.Array):
        rows = batch["encoder_inputs"].shape[0]
        variables = {"params": params}

        def extend(tokens, positions, cache):
            return model.apply(variables, tokens, positions, cache, method="extend")

        return decode.generate(
            config.decode,
            extend,
            model.apply(variables, batch, length, method="start"),
            jnp.full((rows,), PAD, jnp.int32),  # what targets are shifted right with
            jnp.zeros((rows,), jnp.int32),
            eos=EOS,
            length=length,
            rng=jax.random.key(seed),
        )

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
    workdir = cli.folder_flag("workdir")
    config = open_workdir(workdir)
    if flag.beam_size:
        config.decode.method, config.decode.beam_size = "beam", flag.beam_size
    experiment = Experiment(for_these_devices(config))
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        params, which = experiment.load_params(checkpointer, flag.checkpoint)
    split = flag.split or config.data.eval_split
    tok = load_tokenizer(workdir)
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
    cli.launch(main)
