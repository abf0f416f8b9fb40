"""What a run will do, said before anything slow begins; and what resuming changes.

Every function returns lines of text. None changes anything.
"""

import copy
import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from triform import forecast
from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.data import store
from triform.data.codecs import Codec
from triform.data.codecs import files as codec_files
from triform.experiment import Experiment, TrainState
from triform.input_pipeline import Batches, Split, TrainBatches, moved, report
from triform.interop.workdir import exportable
from triform.runtime import commands, optim, program, stores
from triform.runtime.errors import DataError, UserError
from triform.runtime.partition import TRACING, Across, parameter_table
from triform.runtime.progress import stage

BACKWARD = 2  # a gradient costs so many forward passes
DEAR = 0.5  # share of the training time from which an evaluation is called dear


def describe(experiment: Experiment, planned: str = "") -> str:
    """Devices, placement, parameters, batches and schedule, from abstract shapes.

    `planned` names devices that are not here.
    """
    config = experiment.config
    devices = jax.devices()
    state = jax.eval_shape(experiment.make_state)
    lines = [
        f"devices: {planned or f'{len(devices)} x {devices[0].device_kind}'}",
        f"placement: {experiment.placement.describe()}",
        "parameters:",
        parameter_table(state.params, experiment.placement),
    ]
    if jax.tree.leaves(state.frozen):
        lines.append("frozen parameters:")
        lines.append(parameter_table(state.frozen, experiment.placement))
    k = config.optim.accumulate
    for shape in config.data.shapes():
        batch = experiment.empty_batch(shape)
        arrays = ", ".join(f"{name} {list(x.shape)}" for name, x in batch.items())
        lines.append(f"batch: {arrays}, in {k} micro-batches")
    if experiment.task.couples_rows and k > 1:
        lines.append(
            "a term compares rows with one another: with those of a micro-batch only"
        )
    lines.append(f"steps: {config.steps:,}, optimiser {config.optim.name}")
    if config.optim.warmup_steps >= config.steps:
        reached = float(experiment.schedule(config.steps - 1))
        lines.append(
            f"optim.warmup_steps={config.optim.warmup_steps}: not below "
            f"steps={config.steps}, so the learning rate ends at {reached:.4g} on its "
            f"way to {config.optim.learning_rate:.4g}; lower warmup_steps or raise "
            "steps"
        )
    return "\n".join(lines)


def export(
    config: ExperimentConfig,
    workdir: str = "",
    codecs: Mapping[str, Codec] | None = None,
) -> str:
    """As what class of transformers the run can be exported, or why it cannot.

    With `codecs` also whether its tokenizer can be; a new workdir has none yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        if codecs and workdirs.saved_config(workdir) is None:
            codec_files.save(codecs, folder)
            workdir = folder
        try:
            found = exportable(config, stores.local(workdir) if codecs else "")
        except UserError as error:
            return f"export: not possible: {error}"
    return f"export: as {found} of transformers"


def sources(config: ExperimentConfig, read: bool = False) -> str:
    """Where the examples are; with `read`, the first one of every split is read.

    Raises DataError for what is not there or cannot be read.
    """
    lines = []
    for data, name, splits in _origins(config):
        where = store.location(data, name)
        if not where:
            lines.append(
                f"data: {name!r} is not prepared here; train.py prepares or downloads "
                "it when it starts"
            )
            continue
        counts = ""
        if read:
            counts = ": " + ", ".join(
                f"{split} {_readable(data, name, split):,}" for split in splits
            )
        found = where if where == name else f"{name!r}, {where}"
        lines.append(f"data: {found}{counts}")
    return "\n".join(lines)


def _origins(config: ExperimentConfig) -> Iterator[tuple[Any, str, list[str]]]:
    """(data config, source, splits that are read of it)."""
    data = config.data
    splits = [data.train_split, data.eval_split, data.test_split]
    splits += [x.split for x in config.evaluations if not x.source]
    for name in dict.fromkeys([f.source for f in data.features()] or [data.source]):
        yield data, name, list(dict.fromkeys(splits))
    for other in config.evaluations:
        if other.source:
            data = copy.deepcopy(config.data)
            data.source = other.source
            yield data, other.source, [other.split]


def _readable(data: Any, name: str, split: str) -> int:
    """The number of examples, of which the first can be read."""
    examples = store.examples(data, name, split)
    if not len(examples):
        raise DataError(f"{name} {split}: it has no examples; name another split")
    first = examples[0]
    for feature in data.features():
        if feature.source == name:
            store.reader(data, feature)(first)
    return len(examples)


@dataclasses.dataclass
class Splits:
    """What is trained on, evaluated and tested."""

    config: ExperimentConfig
    train: TrainBatches
    evaluated: dict[str, tuple[Split, tuple[str, ...]]]  # by prefix; names of scores
    test: Split

    @classmethod
    def open(cls, experiment: Experiment, codecs: Mapping[str, Codec]) -> "Splits":
        """Every split is opened once, however often it is used."""
        config, sizes = experiment.config, experiment.sizes
        main = config.data

        @functools.cache
        def split(name: str, source: str = main.source) -> Split:
            data = copy.deepcopy(main)
            data.source = source
            with stage(f"opening {source} {name}"):
                return Split.open(data, codecs, name, sizes)

        train = TrainBatches(split(main.train_split).batches, config.seed)
        evaluated = {"eval": (split(main.eval_split), config.evaluation.metrics)}
        for other in config.evaluations:
            opened = split(other.split, other.source or main.source)
            evaluated[other.name] = (opened, other.scores)
        return cls(config, train, evaluated, split(main.test_split))

    def digests(self) -> dict[str, Any]:
        """What decides which examples a step has, by split."""
        found = {p: split.dataset.digest for p, (split, _) in self.evaluated.items()}
        found["test"] = self.test.dataset.digest
        train = self.train.batches.dataset
        return {"data": {"train": train.digest, **found}, "rows": len(train)}

    def print(self, experiment: Experiment) -> None:
        """Sizes, the first batch, and what an evaluation costs."""
        print(report(self.train))
        first = self.train.batches.dataset.preview(self.train[0])
        print(f"first batch:\n{first}")
        print(evaluations(experiment, self), flush=True)

    def tests(self) -> str:
        """The evaluation that scores all of the test split while training, or ''."""
        config = self.config.evaluation
        for prefix, (split, names) in self.evaluated.items():
            if split is self.test and names == config.metrics and not config.examples:
                return prefix
        return ""


def evaluations(experiment: Experiment, splits: Splits) -> str:
    """What an evaluation costs beside the steps between two: positions, times what one
    costs. A position that is generated counts as one that is read, and takes longer:
    with scores of generated text the share is a lower bound.
    """
    config, count, written, cost = splits.config, 0, 0, 0.0
    limit = config.evaluation.examples
    for split, names in splits.evaluated.values():
        scored, forward = _forward(split.batches, limit)
        count, cost = count + scored, cost + forward
        if names:
            beams = config.decode.beam_size if config.decode.method == "beam" else 1
            written += scored
            length = config.decode.max_len or config.data.shapes()[-1].get("L", 1)
            cost += scored * length * beams
    shapes, rows = config.data.shapes(), config.data.rows
    steps = [rows(shapes[i]) * _length(shapes[i]) for i, _ in splits.train.plan(0)]
    every = config.evaluation.every * (1 + BACKWARD) * sum(steps) / len(steps)
    share = cost / every * position_cost(experiment)
    text = f", text for {written:,}" if written else ""
    line = (
        f"evaluation: every {config.evaluation.every:,} steps, {count:,} examples"
        f"{text}: {'at least' if written else 'about'} {share:.1%} of the time of the "
        "steps between"
    )
    if share > DEAR:
        line += "; lower evaluation.examples or raise evaluation.every to spend less"
    return line


def position_cost(experiment: Experiment) -> float:
    """FLOPs of a row's forward pass in evaluation, beside those in training."""
    counted = forecast.countable(experiment.config)
    shape = forecast.longest(counted.config)
    batch = counted.empty_batch(shape, rows=1)
    state = jax.eval_shape(counted.make_state)

    def trained(state: TrainState, batch: Any) -> Any:
        context = counted.context(state, Across(), 0)
        outputs, _ = counted.task.outputs(state.variables(), batch, context)
        return counted.task.terms(outputs, batch, context)

    def scored(state: TrainState, batch: Any) -> Any:
        return counted.eval_step(state.variables(), state.step, batch, Across())

    with TRACING:
        one, other = (
            program.trace(fn, state, batch).flops(again=False).total()
            for fn in (scored, trained)
        )
    return one / other if one and other else 1.0


def _forward(batches: Batches, limit: int) -> tuple[int, float]:
    """(examples, positions) that an evaluation of a split reads."""
    shapes, found, positions = batches.config.shapes(), 0, 0.0
    whole = batches.buckets(truncate=True)
    total = sum(map(len, whole.values()))
    share = min(1.0, limit / total) if limit else 1.0
    for index, items in whole.items():
        found += len(items)
        positions += share * len(items) * _length(shapes[index])
    return round(share * found), positions


def _length(shape: Mapping[str, Any]) -> int:
    """Positions of a row, both sides; of images something in proportion."""
    return sum(n for n in shape.values() if isinstance(n, int)) or 1


def jump(
    old: ExperimentConfig, new: ExperimentConfig, step: int
) -> tuple[float, float] | None:
    """(rate of the step, of the next one) if `new` does not go on as `old` would."""
    before, after = (optim.learning_rate(c.optim, c.steps) for c in (old, new))
    expected, found = float(before(step)), float(after(step))
    if not step or abs(found - expected) <= 1e-3 * max(found, expected):
        return None
    return float(before(step - 1)), found


def changes(
    old: ExperimentConfig,
    new: ExperimentConfig,
    codecs: Mapping[str, Codec],
    train: TrainBatches,
    step: int,
) -> str:
    """What becomes of the epoch and the learning rate after `step`; '' if nothing."""
    lines = []
    if rates := jump(old, new, step):
        lines.append(
            f"learning rate: {rates[0]:.4g} -> {rates[1]:.4g} between steps {step} and "
            f"{step + 1}, because steps or optim.* have changed"
        )
    # Where data are: that they are the same was found out by their content.
    where = ("source", "data_dir", "manual_dir", "cache_dir")
    found = schema.differences(old, new)
    names = [k for k in found if k.startswith("data.") and k[5:] not in where]
    if step and names:
        data = copy.deepcopy(old.data)
        for name in where:
            setattr(data, name, getattr(new.data, name))
        split = Split.open(data, codecs, data.train_split, new.model.sizes())
        was = TrainBatches(split.batches, old.seed)
        if text := moved(was, train, step):
            lines.append(f"{', '.join(names)} changed after step {step}: {text}")
    return "\n".join(lines)


def best_of(config: ExperimentConfig) -> str:
    """The checkpoint that is tested, as flags name it."""
    average = config.evaluation.average
    return f"average:{average}" if average else "best"


def what_next(config: ExperimentConfig, workdir: str, step: int) -> str:
    """Commands that go on from a finished run."""
    about = {"workdir": workdir, "checkpoint": best_of(config)}
    shown, seeds = commands.path(workdir), {"sweep": "seed=0,1"}
    # A sweep needs a local folder.
    beside = os.path.basename(shown) if stores.is_store(shown) else shown
    more = copy.deepcopy(config)
    more.steps = 2 * step
    lines = []
    if asked := workdirs.request_command(config, **about):
        lines.append(asked)
    lines += [
        commands.line("evaluate", **about, split=config.data.test_split),
        commands.line("inspect", shown),
        commands.line("plot", shown),
        commands.module("tensorboard.main", logdir=shown),
        commands.line("sweep", config=shown, **seeds, workdir=f"{beside}_seeds"),
        commands.line("train", workdir=workdir, **{"config.steps": more.steps}),
    ]
    found = [f"finished: {step} steps in {shown}. Next:", *(f"  {x}" for x in lines)]
    if rates := jump(config, more, step):
        told = "with {:,} steps the learning rate jumps from {:.4g} to {:.4g}"
        found.append(told.format(more.steps, *rates))
    return "\n".join(found)
