"""The commands, paths, keys and examples of the README and docs/, against the code."""

import dataclasses
import functools
import json
import pathlib
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from triform import models, tasks
from triform.configs import schema, transformer_cldr
from triform.data import sources
from triform.data.codecs import files
from triform.data.datasets import DATASETS
from triform.data.sources import Embedded
from triform.experiment import Experiment
from triform.input_pipeline import Split, TrainBatches
from triform.models import EncoderDecoder
from triform.tasks import Context, TokenPredictionConfig
from triform.tasks.prediction import TokenPrediction

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {p: p.read_text() for p in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
RUN, EXTEND = (PAGES[ROOT / "docs" / f"{x}.md"] for x in ("run", "extend"))
RENAMED = json.loads((ROOT / "tests" / "renamed_keys.json").read_text())


def keys(part, lead):
    """Dotted names of all fields below a config."""
    found = set()
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{lead}.{field.name}"
        found |= keys(value, name) if dataclasses.is_dataclass(value) else {name}
    return found


def test_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("train", "test", "test-long"):
        assert f"\nmake {target} " in README
        assert re.search(rf"^{target}:", makefile, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_are_there(page):
    named = re.findall(r"`((?:\w+/)+[\w.]*|\w+\.py)`", PAGES[page])
    roots = (ROOT, ROOT / "configs")
    # Names in a workdir, of parameters and of metrics.
    others = (
        "tensorboard/",
        "checkpoints/",
        "samples/",
        "corrupt/",
        "frozen/",
        "code/",
    )
    others += ("set_aside/", "capsules/", "runs/", "workdir/", "encoder/", "train/")
    others += ("decoder/", "profile/")
    for name in named:
        if not name.startswith(others):
            assert any((root / name).exists() for root in roots), name
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", PAGES[page]):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_renamed_keys_are_in_the_table_and_in_the_config():
    known = keys(schema.ExperimentConfig(), "config")
    for kind in DATASETS:
        known |= keys(kind(), "config.data")
    for before, now in RENAMED.items():
        assert before not in known
        assert now in known
        assert f"`--{before}=" in RUN
        assert f"--{now}=" in RUN


def example(first_line, name):
    """The module of the Python block that starts so."""
    blocks = re.findall(r"```python\n(.*?)```", EXTEND, re.S)
    module = types.ModuleType(name)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    try:
        code = next(b for b in blocks if b.startswith(first_line))
        exec(code, vars(module))
    finally:
        del sys.modules[name]
    return module


def smoke():
    config = transformer_cldr.get_config("smoke")
    config.data.max_len, config.model.trunk.dropout = 12, 0.0
    return config


BATCH = {
    "encoder_inputs": jnp.array([[5, 6, 1, 0]]),
    "encoder_segments": jnp.array([[1, 1, 1, 0]]),
    "inputs": jnp.array([[0, 7, 8, 9]]),
    "targets": jnp.array([[7, 8, 9, 1]]),
    "weights": jnp.ones((1, 4)),
}


def test_the_source_example(monkeypatch, tmp_path):
    module = example("# data/sources/reverse.py", "reverse")
    row = functools.partial(Embedded, module)
    monkeypatch.setitem(sources.SOURCES, "reverse", row)
    data, sizes = smoke().data, {"vocab_size": 300}
    data.source, data.inputs, data.targets = "reverse", "text", "reversed"
    data.cache_dir = str(tmp_path / "cache")
    codecs = files.build(data, sizes)
    split = Split.open(data, codecs, "train", sizes)
    batch = TrainBatches(split.batches, 0)[0]
    text = codecs["text"].decode(batch["encoder_inputs"][0])
    assert codecs["text"].decode(batch["targets"][0]) == text[::-1]


def test_the_task_example(monkeypatch):
    module = example("# tasks/focal.py", "focal")
    monkeypatch.setitem(tasks.TASKS, module.FocalConfig, module.Focal)
    config = smoke()
    config.task = module.FocalConfig(gamma=0.0)
    config.checkpoint.metric = "eval/loss"
    experiment = Experiment(config.resolved())
    variables = experiment.init_variables()
    plain = TokenPrediction(TokenPredictionConfig(), experiment.model)
    ctx = Context(jnp.int32(0), {}, False)
    totals, weights = [], []
    for task in (experiment.task, plain):
        outputs, _ = task.outputs(variables, BATCH, ctx)
        totals.append(float(task.terms(outputs, BATCH, ctx)["token"]))
        weights.append(float(task.weights(BATCH)["token"]))
    # gamma = 0 is the cross-entropy.
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    assert weights[0] == weights[1] == 4


def test_the_model_example(monkeypatch):
    kind = example("# models/deep_encoder.py", "deep_encoder").DeepEncoderConfig
    monkeypatch.setitem(models.MODELS, kind, EncoderDecoder)
    config = smoke()
    config.model = kind(config.model.trunk, config.model.vocab_size, encoder_layers=3)
    experiment = Experiment(config.resolved())
    params = experiment.make_state().params
    assert set(params["encoder"]) == {"layer_0", "layer_1", "layer_2"}
    assert set(params["decoder"]) == {"layer_0", "layer_1"}
    logits = experiment.model.apply({"params": params}, BATCH)["targets"]
    assert np.isfinite(logits).all()
