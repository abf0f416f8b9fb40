"""Everything that a run keeps on disk, and starting from what other runs kept.

A workdir holds config.json, code/ (its plugins), the codecs (tokenizer, class names),
checkpoints/, frozen/ (parameters that are not trained, saved once), scores.json,
metrics.jsonl, runs.jsonl (a line per start), samples/ and what evaluate.py reports.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from triform import trained_codecs
from triform.configs import architecture as architectures
from triform.configs import plugins, schema
from triform.configs.schema import ExperimentConfig, InitRule
from triform.data.codecs import Codec
from triform.data.codecs import files as codec_files
from triform.data.codecs.text import Tokenizer
from triform.data.datasets import DATASETS
from triform.data.sources import is_path
from triform.experiment import Experiment, TrainState
from triform.models import ModelConfig
from triform.models.stacking import looped_layers, stacked_layers
from triform.runtime import commands, files, hosts, metrics, paths, stores
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import UserError

Tree = Any
Shape = tuple[int, ...]
# Config keys that must not change on resuming: parameters or step numbers depend on
# them. (Prefixes; FREE are the exceptions below them.)
FIXED = (
    "model.",
    "task.type",
    "data.type",
    "data.source",
    "data.train_split",
    "data.tokenizer.",
    "optim.name",
    "optim.ema_decay",
    "optim.train",
)
FREE = (
    "model.trunk.remat",
    "model.trunk.remat_keeps",
    "model.trunk.logit_chunks",
    "model.trunk.dropout",
    "model.trunk.attention_dropout",
    "data.tokenizer.path",  # the workdir has a copy
)


# The config and the files beside it


def saved_config(workdir: str) -> ExperimentConfig | None:
    """The config of a workdir; None if it holds none."""
    path = os.path.join(workdir, "config.json")
    text = files.read_text(path)
    if text is None:
        return None
    try:
        code = plugins.saved(workdir, json.loads(text).get("plugins", ()))
        config = schema.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a config of this version of Triform ({error!r}); restore the "
            "file or name another workdir"
        ) from error
    config.plugins = code
    return config


def request_command(config: ExperimentConfig, **flags: str) -> str:
    """The command that asks a run's model something; '' if nothing can be asked."""
    kind = DATASETS[type(config.data)].requests
    if not kind.answers():
        return ""
    names = codec_files.load_classes(flags["workdir"], config.data)
    asked = kind.flags(config.data, names)
    return f"{commands.line('generate', **flags)} {asked}"


def open_config(workdir: str) -> ExperimentConfig:
    """The config of a workdir that must exist; UserError if it does not."""
    config = saved_config(workdir)
    if config is None:
        raise UserError(
            f"workdir={workdir!r}: holds no config.json; name the workdir of a run "
            "that train.py has started"
        )
    return config


def for_these_devices(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its mesh, or with the batch split over all devices if another
    number of devices is here than it was trained on.
    """
    try:
        config.mesh.sizes(jax.device_count())
    except ValueError:
        config.mesh = type(config.mesh)()
    config.placement = "mesh"
    return config


def check_config(workdir: str, config: ExperimentConfig) -> ExperimentConfig | None:
    """The workdir's config before this start, None if it is a new one.

    Prints what differs, and refuses what may not.
    """
    old = saved_config(workdir)
    changed = schema.differences(old, config) if old is not None else {}
    for name, (before, after) in changed.items():
        print(f"config: {name} was {before!r}, is now {after!r}")
    if old is not None:
        require_same(workdir, old, config)
    return old


def require_same(workdir: str, old: ExperimentConfig, config: ExperimentConfig) -> None:
    """UserError if a run of `old`, in that workdir, cannot go on as `config`."""
    for name, (before, after) in schema.differences(old, config).items():
        if name == "data.source" and is_path(before) and is_path(after):
            continue  # files may move: a run knows them by their content
        if name == "seed" or (name.startswith(FIXED) and name not in FREE):
            raise UserError(
                f"workdir={workdir!r}: it belongs to another experiment ({name} is "
                f"{before!r} there, {after!r} here); name another workdir or change it "
                "back"
            )


def claim(workdir: str, config: ExperimentConfig, codecs: Mapping[str, Codec]) -> None:
    """Writes codecs and config.json. Called last, after everything that may fail."""
    if not hosts.here().is_first:
        return
    with stores.Mirror(workdir) as mirror:
        codec_files.save(codecs, mirror.folder)
        plugins.save(config.plugins, mirror.folder)
    with files.replacing(os.path.join(workdir, "config.json")) as f:
        f.write(schema.to_json(config))


def tested(workdir: str, step: int) -> dict[str, Any]:
    """The test scores that were written after this step; {} if there are none."""
    lines = metrics.read_lines(workdir)
    found = [x for x in lines if x["step"] == step and "test/loss" in x]
    line = found[-1] if found else {}
    return {k: v for k, v in line.items() if k.startswith("test/")}


# Checkpoints


def checkpoint_dir(workdir: str) -> str:
    """Where a workdir's checkpoints are."""
    return os.path.join(workdir, "checkpoints")


def _frozen(workdir: str) -> Checkpointer:
    return Checkpointer(os.path.join(workdir, "frozen"), CheckpointConfig())


def save_frozen(workdir: str, state: TrainState) -> None:
    """Saves the parameters that are not trained, once per run."""
    if jax.tree.leaves(state.frozen):
        with _frozen(workdir) as checkpointer:
            if checkpointer.latest() is None:
                frozen = {"frozen": state.frozen}
                checkpointer.save(0, frozen, meta={}, wait=True)


def restore_frozen(workdir: str, abstract: TrainState) -> Tree:
    """The parameters that `save_frozen` saved."""
    if not jax.tree.leaves(abstract.frozen):
        return abstract.frozen
    with _frozen(workdir) as checkpointer:
        return checkpointer.restore({"frozen": abstract.frozen}, 0)[0]["frozen"]


def restore(
    experiment: Experiment, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]] | None:
    """(newest intact state, not yet placed; what was saved beside it), or None."""
    abstract = experiment.abstract_state()
    restored = checkpointer.restore(abstract.replace(frozen={}))
    if restored is None:
        return None
    frozen = restore_frozen(str(checkpointer.directory.parent), abstract)
    return restored[0].replace(frozen=frozen), restored[1]


def is_imported(checkpointer: Checkpointer) -> bool:
    """Does it hold parameters only, which no training step has changed?"""
    step = checkpointer.latest()
    return step == 0 and bool(checkpointer.meta_of(0).get("params_only"))


def steps_of(checkpointer: Checkpointer, which: str, near: Sequence[int]) -> list[int]:
    """Steps of 'best', 'latest', 'average:K' (newest K of `near`) or a step number.

    Raises UserError if there are none such.
    """
    kept = checkpointer.steps()
    if not kept:
        raise UserError(
            f"{checkpointer.directory}: no checkpoint yet; train first, or name "
            "another workdir"
        )
    kind, _, count = which.partition(":")
    if kind == "average" and count.isdigit() and int(count) > 0:
        steps = list(near[-int(count) :])
        if len(steps) < int(count):
            raise UserError(
                f"checkpoint={which!r}: only {len(near)} consecutive checkpoints are "
                f"there ({', '.join(map(str, near))}); average at most so many"
            )
        return steps
    if which == "best":
        best = checkpointer.best()
        return [kept[-1] if best is None else best]
    if which == "latest":
        return kept[-1:]
    if which.isdigit() and int(which) in kept:
        return [int(which)]
    raise UserError(
        f"checkpoint={which!r}: expected best, latest, average:K or one of the steps "
        f"{', '.join(map(str, kept))}"
    )


def load_variables(
    experiment: Experiment, checkpointer: Checkpointer, which: str
) -> tuple[Tree, int, str]:
    """(variables placed, newest step among them, description) of a checkpoint.

    `which` is 'best', 'latest', 'average:K' or a step number.
    """
    # Older steps are kept for being best, not for being next in line.
    newest = experiment.config.checkpoint.keep_newest
    steps = steps_of(checkpointer, which, checkpointer.on_schedule()[-newest:])
    steps = hosts.here().broadcast("which checkpoint", steps)  # a run may be adding
    total = None
    for step in steps:
        try:
            found = _saved_variables(experiment, checkpointer, step)
        except FileNotFoundError as error:
            raise UserError(
                f"checkpoint {step} was removed by its run while it was read; try again"
            ) from error
        total = found if total is None else jax.tree.map(np.add, total, found)
    mean = total
    if len(steps) > 1:
        mean = jax.tree.map(lambda x: (x / len(steps)).astype(x.dtype), total)
    name = f"step {steps[0]}" if len(steps) == 1 else f"mean of steps {steps}"
    return experiment.placement.load(mean), steps[-1], name


def _saved_variables(
    experiment: Experiment, checkpointer: Checkpointer, step: int
) -> Tree:
    abstract = experiment.abstract_state()
    if checkpointer.meta_of(step).get("params_only"):
        params = experiment.placement.abstract(
            {"params": abstract.variables()["params"]}
        )["params"]
        return {"params": checkpointer.restore_params(params, step)}
    frozen = restore_frozen(str(checkpointer.directory.parent), abstract)
    if experiment.config.optim.ema_decay or jax.tree.leaves(abstract.extra):
        state, _ = checkpointer.restore(abstract.replace(frozen={}), step)
        return experiment.evaluation_variables(state.replace(frozen=frozen))
    params = checkpointer.restore_params(abstract.params, step)
    return abstract.replace(params=params, frozen=frozen).variables()


# A finished or running workdir, opened


@dataclasses.dataclass
class Run:
    """A workdir, opened for reading."""

    path: str
    config: ExperimentConfig
    experiment: Experiment
    variables: Tree  # placed
    codecs: Mapping[str, Codec]
    step: int  # of the checkpoint
    which: str  # description of the checkpoint


class Loaded(NamedTuple):
    """What `load` returns."""

    model: Any  # Linen module: model.apply(params, batch) -> {output name: array}
    params: Tree  # variables: {"params": ...}
    tokenizer: Tokenizer | None  # None: the data are not text
    config: ExperimentConfig


def open_run(
    path: str, checkpoint: str = "best", config: ExperimentConfig | None = None
) -> Run:
    """Config, codecs and variables of a workdir; UserError if it cannot be read."""
    path = paths.workdir(path)
    config = for_these_devices(config or open_config(path))
    experiment = Experiment(config)
    with Checkpointer(checkpoint_dir(path), config.checkpoint) as checkpointer:
        variables, step, which = load_variables(experiment, checkpointer, checkpoint)
    codecs = load_codecs(path, config.data)
    return Run(path, config, experiment, variables, codecs, step, which)


def load_codecs(path: str, data: Any) -> dict[str, Codec]:
    """The codecs that a run saved, models of other runs among them."""
    path = stores.local(path)
    return codec_files.load(path, data) | trained_codecs.load(path, data)


def load(path: str, checkpoint: str = "best") -> Loaded:
    """(model, params, tokenizer, config) of a workdir.

    `model.apply(params, batch)` gives the outputs. `open_run` gives all of a run: its
    codecs, too, and the objects that it was trained with.
    """
    run = open_run(path, checkpoint)
    model, tokenizer = run.experiment.model, run.codecs.get("text")
    return Loaded(model, run.variables, tokenizer, run.config)


# Initialisation from other runs


@dataclasses.dataclass
class Report:
    """What became of every array, by name with its shape."""

    source: str
    restored: dict[str, Shape]
    adapted: dict[str, str]  # how a saved array was fitted to another shape
    copied: dict[str, str]  # from a saved array of another name
    skipped: dict[str, Shape]
    new: dict[str, Shape]
    mismatches: list[str]  # settings that differ, if that shows

    def __str__(self) -> str:
        def size(shapes: Mapping[str, Shape]) -> str:
            return f"{sum(int(np.prod(s)) for s in shapes.values()):,} parameters"

        def lines(names: Mapping[str, Any], title: str) -> list[str]:
            shown = [f"    {name} {how}".rstrip() for name, how in names.items()]
            return [f"  {title}", *shown] if shown else []

        return "\n".join(
            [
                f"init_from: {self.source}",
                f"  restored: {len(self.restored)} arrays, {size(self.restored)}",
                *lines(self.adapted, "restored in another shape:"),
                *lines({k: f"from {v}" for k, v in self.copied.items()}, "copied:"),
                f"  skipped: {len(self.skipped)} saved arrays, {size(self.skipped)}",
                *lines(
                    self.skipped, "skipped, the model has none of that name and shape:"
                ),
                f"  newly initialised: {len(self.new)} arrays, {size(self.new)}",
                *lines(self.new, "newly initialised:"),
                *lines(dict.fromkeys(self.mismatches, ""), "other settings there:"),
            ]
        )


def parse(source: str) -> tuple[str, str]:
    """(workdir, which checkpoint) of WORKDIR or WORKDIR:best|latest|average:K|STEP.

    UserError if there is no such folder.
    """
    found = re.fullmatch(r"(.+?)(?::(best|latest|average:\d+|\d+))?", source)
    workdir = paths.workdir(found[1])
    if not files.is_folder(workdir):
        raise UserError(f"init_from={source!r}: no such folder; name a workdir")
    return workdir, found[2] or "best"


def init_rules(config: ExperimentConfig) -> tuple[InitRule, ...]:
    """The rules of a config: `init_from` is one that takes everything."""
    return (InitRule(config.init_from),) if config.init_from else config.init


def architecture(source: str, here: ModelConfig) -> ModelConfig:
    """The model of WORKDIR with the heads of `here`; UserError if there is none."""
    return architectures.taken(open_config(parse(source)[0]).model, here)


def _saved_params(
    rule: InitRule, config: ExperimentConfig
) -> tuple[dict[str, np.ndarray], str, list[str], list[str]]:
    """(looped parameters by our names, description, mismatches of the model, and of
    what it reads, with `config`) of a rule's source.
    """
    workdir, which = parse(rule.source)
    run = open_run(workdir, which)
    params = looped_layers(jax.device_get(run.variables["params"]))
    found = {}
    for name, x in flatten_dict(params, sep="/").items():
        for pattern, replacement in rule.rename:
            name = re.sub(pattern, replacement, name)
        if re.search(rule.only, name):
            found[name] = x
    if not found:
        raise UserError(
            f"init: no array of {rule.source!r} is left after only={rule.only!r}; "
            f"saved names are such as {next(iter(flatten_dict(params, sep='/')))!r}"
        )
    differing = architectures.mismatches(run.config.model, config.model)
    inputs = architectures.inputs(run.config.data, config.data)
    return found, f"{workdir}, {run.which}", differing, inputs


def _stacked(saved: Tree, wanted: Tree) -> Tree:
    """Saved looped layers stacked wherever `wanted` has scanned ones."""
    if not isinstance(saved, dict) or not isinstance(wanted, dict):
        return saved
    if "layers" in wanted and "layers" not in saved:
        return stacked_layers(saved, len(wanted["layers"]), np)
    return {k: _stacked(x, wanted.get(k)) for k, x in saved.items()}


def start(
    experiment: Experiment, rules: Sequence[InitRule]
) -> tuple[TrainState, Report]:
    """(first state of a run, placed; report) from what fits of other runs' parameters.

    Later rules replace what earlier ones restored.
    """
    saved, sources, differing, read = {}, [], [], []
    model, placement = experiment.config.model, experiment.placement
    for rule in rules:
        found, source, mismatches, inputs = _saved_params(rule, experiment.config)
        saved |= found
        sources.append(source)
        differing += mismatches
        read += inputs
    shapes = jax.eval_shape(experiment.make_state)
    wanted = shapes.variables()
    tree = _stacked(unflatten_dict(saved, sep="/"), wanted["params"])
    saved = flatten_dict(tree, sep="/")
    shardings = placement.shardings(wanted)
    variables = jax.jit(experiment.init_variables, out_shardings=shardings)()
    report = Report("; ".join(sources), {}, {}, {}, {}, {}, [])

    def choose(path: tuple, fresh: jax.Array) -> jax.Array:
        name = paths.path_name(path)
        origin = name if name in saved else model.origin(name)
        found = saved.get(origin)
        if found is not None and found.shape != fresh.shape:
            fitted = model.adapt(name, np.asarray(found), np.asarray(fresh))
            found, how = fitted if fitted is not None else (None, "")
            if found is not None:
                report.adapted[name] = f"{saved[origin].shape} -> {fresh.shape}: {how}"
        if found is None:
            report.new[name] = fresh.shape
            return fresh
        if origin != name:
            report.copied[name] = origin
        elif name not in report.adapted:
            report.restored[name] = fresh.shape
        return jax.device_put(np.asarray(found, fresh.dtype), fresh.sharding)

    params = jax.tree_util.tree_map_with_path(choose, variables["params"])
    used = {*report.restored, *report.adapted, *report.copied.values()}
    report.skipped |= {k: x.shape for k, x in saved.items() if k not in used}
    # A saved array of the same name and another shape is not what was asked for.
    shows = any(name in saved for name in report.new)
    report.mismatches = (differing if shows else []) + read
    if not used:
        causes = "; ".join(differing) or "their names differ"
        raise UserError(
            f"init_from={rules[0].source!r}: none of its {len(saved)} arrays has a "
            f"name and shape of model={type(model).__name__}: {causes}; set these, "
            f"take --config.model=from:{rules[0].source}, or rename its arrays with "
            "config.init"
        )
    places = placement.shardings(shapes)
    state = jax.jit(experiment.state_of, out_shardings=places)(
        {**variables, "params": params}
    )
    return placement.load(state), report
