"""Scores a finished or running workdir, and writes what it predicts.

python evaluate.py --workdir=DIR [--split=test] [--checkpoint=best]
    [--predictions=FILE.jsonl]
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from absl import flags

from triform import scores
from triform import workdir as workdirs
from triform.answers.writing import Targets
from triform.data.codecs import Codec
from triform.data.datasets.base import EVALUATION
from triform.data.lines import one_line
from triform.experiment import Experiment
from triform.input_pipeline import Split
from triform.runtime import files, hosts, joining, launch, metrics, paths
from triform.runtime.progress import stage


@dataclasses.dataclass
class Samples:
    """Outputs of a few examples: text, and files by what their names end with."""

    text: str = ""  # source, reference and output
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.text or self.files)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass
class Result:
    """What one evaluation measured."""

    scalars: dict[str, Any]  # 'prefix/name': value; signatures are text
    samples: Samples
    seconds: float
    predictions: list[dict[str, Any]]  # one per example, in the order of the split

    def numbers(self) -> dict[str, float]:
        """The scalars without the signatures."""
        return {k: v for k, v in self.scalars.items() if not isinstance(v, str)}


class Evaluator:
    """Evaluates variables on splits; compiled once, called at many steps.

    What it does is said on `log`; None is standard output.
    """

    def __init__(
        self,
        experiment: Experiment,
        codecs: Mapping[str, Codec],
        log: TextIO | None = None,
    ):
        self.experiment, self.codecs, self.log = experiment, codecs, log
        self.warned = [""]  # each warning is said once
        self.eval_step = experiment.placement.compile_eval(experiment.eval_step)
        config = experiment.config
        if config.evaluation.metrics or any(x.scores for x in config.evaluations):
            self.targets = Targets(experiment, codecs)

    def __call__(
        self,
        variables: Any,
        step: int,
        split: Split,
        prefix: str,
        limit: int = 0,
        stop: Callable[[], Any] = lambda: False,
        predictions: bool = False,
        names: tuple[str, ...] | None = None,
    ) -> Result | None:
        """Losses, metrics and scores of what is generated, over the whole split or at
        most `limit` examples of every corpus in it, spread evenly (0: all).

        None as soon as `stop()` is true between two batches. `predictions` keeps one
        object per example. `names` are scores in place of config.evaluation.metrics.
        """
        experiment, config = self.experiment, self.experiment.config.evaluation
        names = config.metrics if names is None else names
        start, dataset = time.perf_counter(), split.dataset
        total, ids, kept, written = None, [], [], {}
        with stage(f"scoring {dataset.title()}", least=math.inf, file=self.log) as note:
            for index, items in split.batches.parts(limit):
                if stop():
                    return None
                whole, held = experiment.rows(index), experiment.held(index, parts=1)
                batch = split.batches.collate(index, items, EVALUATION, held)
                put = experiment.put(batch, whole, parts=1)
                if names:
                    written |= self._written(variables, batch, items, whole)
                measured, rows = self.eval_step(variables, np.int32(step), put)
                total = metrics.add(total, metrics.to_host(measured))
                # Numbers of all examples fit into memory, their images may not.
                every = predictions or len(ids) < config.samples
                rows = {k: x for k, x in rows.items() if every or x.ndim == 1}
                # The batch may have more rows than examples: padding.
                rows = experiment.placement.fetch(rows)
                kept.append({k: x[: len(items)] for k, x in rows.items()})
                ids += items.tolist()
                note(f"{len(ids):,} of {limit or len(dataset):,} examples")
        found = self.experiment.values(total, step)
        # Of a sample: what the whole would have if it were all like this.
        share = len(ids) / max(1, int((~dataset.empty).sum()))
        found |= dataset.scalars(_nats(total) / share)
        found |= self.experiment.task.score(_columns(kept))
        found |= {"examples": len(ids), "cut": split.batches.truncated(limit)}
        scored, text = self._score(dataset, dict(sorted(written.items())), names)
        few = itertools.islice(_rows(kept), config.samples)
        shown = dict(zip(ids, few, strict=False))
        samples = Samples(text, dataset.samples([*shown], [*shown.values()]))
        scalars = {f"{prefix}/{name}": x for name, x in (found | scored).items()}
        lines = self._predictions(split, ids, kept, written) if predictions else []
        return Result(scalars, samples, time.perf_counter() - start, lines)

    def _written(
        self, variables: Any, batch: Any, items: np.ndarray, total: int
    ) -> dict[int, str]:
        """Example -> generated text."""
        numbers = np.stack([items, np.zeros_like(items)], 1).astype(np.int32)
        drafts = self.targets(variables, batch, numbers, total=total)
        texts = (one_line(draft.text) for draft in drafts)
        return dict(zip(items.tolist(), texts, strict=False))

    def _score(
        self, dataset: Any, written: dict[int, str], names: tuple[str, ...]
    ) -> tuple[scores.Scores, str]:
        if not written:
            return {}, ""
        config, tok = self.experiment.config.evaluation, self.codecs["text"]
        config = dataclasses.replace(
            config, metrics=names, lowercase=config.lowercase or tok.lowercase
        )
        texts = {i: dataset.text(i) for i in written}
        # What the model cannot write is no mistake of its: ligatures, say, that the
        # tokenizer takes apart. Outputs and references are compared as it has them, and
        # as they are printed.
        known = {i: one_line(tok.normalize(ref)) for i, (_, ref) in texts.items()}
        groups: dict[str, list[int]] = {}
        for i in written:
            groups.setdefault(dataset.group(i)[0], []).append(i)
        found = {}
        for group, ids in groups.items():
            lead = f"{group}/" if group else ""
            ours = [one_line(tok.normalize(written[i])) for i in ids]
            scored = scores.score(config, ours, [known[i] for i in ids])
            found |= {f"{lead}{name}": x for name, x in scored.items()}
            if scored.get("bleu_warning", "") not in self.warned:
                self.warned.append(scored["bleu_warning"])
                print(f"{lead}bleu: {scored['bleu_warning']}", file=self.log)
        if changed := sum(known[i] != one_line(texts[i][1]) for i in written):
            found["references"] = (
                f"{changed} of {len(written)} changed: normalised as the tokenizer does"
            )
        step = max(1, len(written) // max(1, config.samples))
        samples = "\n".join(
            f"source     {one_line(texts[i][0])}\nreference  {known[i]}\n"
            f"output     {one_line(tok.normalize(written[i]))}\n"
            for i in [*written][::step][: config.samples]
        )
        return found, samples

    def _predictions(
        self, split: Split, ids: list[int], kept: list, written: dict[int, str]
    ) -> list[dict[str, Any]]:
        """One object per example: number, input, and what was predicted."""
        lines, dataset = {}, split.dataset
        for item, row in zip(ids, _rows(kept), strict=True):
            line = {"split": split.name, "example": item}
            if text := dataset.input_text(item):
                line["input"] = text
            line |= {**dataset.decoded(row), **dataset.truth(item)}
            if item in written:
                line |= {"output": written[item], "reference": dataset.text(item)[1]}
            lines[item] = line
        return [lines[item] for item in sorted(lines)]


def _rows(kept: list[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Predictions, example by example."""
    for batch in kept:
        for row in range(len(next(iter(batch.values()), ()))):
            yield {k: x[row] for k, x in batch.items()}


def _columns(kept: list[dict[str, np.ndarray]]) -> dict[str, list | np.ndarray]:
    """Predictions of all examples: arrays [N], where every example has one number."""
    if not kept:
        return {}
    flat = [k for k, x in kept[0].items() if x.ndim == 1]
    return {k: np.concatenate([batch[k] for batch in kept]) for k in flat}


def _nats(total: Mapping[str, Any]) -> float:
    """The summed nats of all targets, whatever terms a task adds to its loss."""
    found = [m for m in total.values() if isinstance(m, metrics.Perplexity)]
    return sum(float(m.total) for m in found or total["terms"].values())


def run(
    workdir: str,
    split: str = "",
    checkpoint: str = "best",
    *,
    beam_size: int = 0,
    predictions: bool = False,
    examples: int = 0,
) -> Result:
    """Scores a checkpoint of a workdir on a split ('' is data.eval_split).

    At most `examples` of it, spread evenly; 0: all. `predictions` keeps one object per
    example. Raises TriformError for a workdir, split or checkpoint that is not there.
    """
    config = workdirs.open_config(paths.workdir(workdir))
    if beam_size:
        config.decode.method, config.decode.beam_size = "beam", beam_size
    opened = workdirs.open_run(workdir, checkpoint, config)
    experiment = opened.experiment
    name = split or config.data.eval_split
    part = hosts.here().in_turn(
        f"opening {config.data.source} {name}",
        lambda: Split.open(config.data, opened.codecs, name, experiment.sizes),
    )
    log = sys.stderr if hosts.here().is_first else sys.stdout  # which says nothing
    print(f"{workdir}: {opened.which}, split {name}", file=log)
    evaluator = Evaluator(experiment, opened.codecs, log)
    inputs = opened.variables, opened.step, part, name, examples
    result = evaluator(*inputs, predictions=predictions)
    about = {"checkpoint": opened.which, "split": name}
    result.scalars = about | result.scalars
    return result


def summary(scalars: Mapping[str, Any]) -> str:
    """'eval/loss 1.234  eval/bleu 40.12', without signatures."""
    numbers = {k: v for k, v in scalars.items() if not isinstance(v, str)}
    return "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())


def write_samples(workdir: str, name: str, samples: Samples) -> None:
    """Into samples/NAME.*, replacing what an interrupted evaluation left; by the first
    of several processes.
    """
    if not hosts.here().is_first:
        return
    files.make_folder(os.path.join(workdir, "samples"))
    text = {".txt": samples.text.encode(errors="replace")} if samples.text else {}
    for end, content in (text | dict(samples.files)).items():
        path = os.path.join(workdir, "samples", f"{name}{end}")
        with files.replacing(path, binary=True) as f:
            f.write(content)


def write_predictions(path: str, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line; a file that is there is replaced when all is written."""
    with files.replacing(path) as f:
        f.writelines(files.dumps(line) + "\n" for line in lines)


def write_report(workdir: str, name: str, report: Mapping[str, Any]) -> str:
    """Into NAME.json, or NAME.2.json and so on beside other results; returns the name.

    The same result again, which may have taken another time, is not written twice.
    """
    names = (f"{name}.{n}" if n > 1 else name for n in itertools.count(1))
    for chosen in names:
        path = os.path.join(workdir, f"{chosen}.json")
        there = files.read_text(path)
        if there is None:
            files.write_json(path, report)
            break
        with contextlib.suppress(ValueError):
            if {**json.loads(there), "seconds": 0} == {**report, "seconds": 0}:
                break
    return chosen


FLAGS = ("split", "checkpoint", "beam_size", "examples", "predictions")


def write_all(writers: Iterable[Callable[[], Any]]) -> None:
    """Calls all of them; then raises the first OSError that one raised."""
    failed = None
    for write in writers:
        try:
            write()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def main(argv: list[str]) -> None:
    """Prints the scores of a checkpoint as one JSON object."""
    flag = flags.FLAGS
    workdir = launch.workdir_flag()
    target = launch.file_flag("predictions")
    joining.join(joining.asked("workdir", *FLAGS))
    result = run(
        workdir,
        flag.split,
        flag.checkpoint,
        beam_size=flag.beam_size,
        predictions=bool(target),
        examples=flag.examples,
    )
    if not hosts.here().is_first:
        return
    print(result.samples, file=sys.stderr)
    config = workdirs.open_config(workdir)
    report = {"seconds": result.seconds, "decode": dataclasses.asdict(config.decode)}
    if flag.beam_size:
        report["decode"] |= {"method": "beam", "beam_size": flag.beam_size}
    report = files.strict(report | result.scalars)
    beams = f"_beam{flag.beam_size}" if flag.beam_size else ""
    name = f"evaluation_{report['split']}_{flag.checkpoint}{beams}"
    name = re.sub(r"[:/\\]", "_", name)

    def show() -> None:
        print(files.dumps(report, indent=2), flush=True)

    def keep() -> None:
        chosen = write_report(workdir, name, report)
        if result.samples:
            write_samples(workdir, chosen, result.samples)

    # Printed first, and each of them even if another cannot be written.
    writers = [show, keep]
    if target:
        writers.append(lambda: write_predictions(target, result.predictions))
    write_all(writers)


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string("workdir", None, "A workdir of train.py.", required=True)
    flags.DEFINE_string("split", "", "A split; empty: data.eval_split.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, average:K, or a step.")
    flags.DEFINE_integer("beam_size", 0, "Beams; 0: as the config says.")
    flags.DEFINE_integer("examples", 0, "Score at most so many, spread evenly; 0: all.")
    flags.DEFINE_string("predictions", "", "File for one JSON object per example.")
    joining.define()


def cli(argv: Sequence[str], program: str = "evaluate") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, answers=True)


if __name__ == "__main__":
    cli(sys.argv)
