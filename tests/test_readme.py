"""The README's picture and its three examples, against the code."""

import ast
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform import input_pipeline, models, tasks
from triform.configs import transformer_cldr
from triform.data import datasets, sources, store
from triform.experiment import Experiment
from triform.models import EncoderDecoder, EncoderDecoderConfig
from triform.models.transformer import Stack
from triform.runtime.metrics import Mean
from triform.tasks import TokenPrediction, TokenPredictionConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def source(module):
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module):
    """Names under triform that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(source(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "triform"
        ):
            base = node.module.removeprefix("triform").removeprefix(".")
            found |= {base, *(f"{base}.{a.name}".strip(".") for a in node.names)}
    return found


def test_every_arrow_of_the_picture_is_an_import():
    arrows = re.findall(r"^    (\S+) --> (\S+)$", README, re.M)
    assert len(arrows) > 20
    for start, end in arrows:
        package = [start]
        if source(start).name == "__init__.py":
            package = [f"{start}.{p.stem}" for p in source(start).parent.glob("*.py")]
            package = [start, *(p for p in package if not p.endswith("__init__"))]
        assert any(end in imports(p) for p in package), f"{start} --> {end}"


def test_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("train", "test"):
        assert f"\nmake {target} " in README
        assert re.search(rf"^{target}:", makefile, re.M)


def snippet(first_line):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(b for b in blocks if b.startswith(first_line))


NAMES = {
    "dataclasses": dataclasses,
    "jax": jax,
    "jnp": jnp,
    "Mean": Mean,
    "Stack": Stack,
    "EncoderDecoder": EncoderDecoder,
    "EncoderDecoderConfig": EncoderDecoderConfig,
    "TokenPrediction": TokenPrediction,
    "TokenPredictionConfig": TokenPredictionConfig,
}


def execute(first_line):
    # A dataclass looks its module up by name.
    space = dict(NAMES, __name__="triform.tasks")
    exec(snippet(first_line), space)
    return space


def smoke():
    config = transformer_cldr.get_config("smoke")
    config.data.max_len, config.model.trunk.dropout = 8, 0.0
    return config


BATCH = {
    "encoder_inputs": jnp.array([[5, 6, 1, 0]]),
    "encoder_segments": jnp.array([[1, 1, 1, 0]]),
    "inputs": jnp.array([[0, 7, 8, 9]]),
    "targets": jnp.array([[7, 8, 9, 1]]),
    "weights": jnp.ones((1, 4)),
}


def test_the_dataset_example(monkeypatch, tmp_path):
    module = type("reverse", (), execute("# datasets/reverse.py"))
    monkeypatch.setitem(sources.EMBEDDED, "reverse", module)
    config = smoke().data
    config.source, config.inputs, config.targets = "reverse", "text", "reversed"
    config.cache_dir = str(tmp_path / "cache")
    tok = store.build_tokenizer(config, 300)
    opened = datasets.open(config, "train", tok, {"inputs": 300})
    batch = input_pipeline.TrainBatches(input_pipeline.Batches(opened), 0)[0]
    text = tok.decode(batch["encoder_inputs"][0])
    assert tok.decode(batch["targets"][0]) == text[::-1]


def test_the_task_example(monkeypatch):
    space = execute("# tasks.py")
    monkeypatch.setitem(tasks.TASKS, space["FocalConfig"], space["Focal"])
    config = smoke()
    config.task = space["FocalConfig"](gamma=0.0)
    experiment = Experiment(config)
    params = experiment.make_state().params
    focal, _ = experiment.task.loss(params, BATCH, None, False)
    plain = TokenPrediction(TokenPredictionConfig(), experiment.model)
    plain, _ = plain.loss(params, BATCH, None, False)
    # gamma = 0 is the cross-entropy.
    assert focal.value() == pytest.approx(plain.value(), rel=1e-6)


def test_the_model_example(monkeypatch):
    space = execute("# models/deep_encoder.py")
    kind = space["DeepEncoderConfig"]
    monkeypatch.setitem(models.MODELS, kind, space["DeepEncoder"])
    config = smoke()
    config.model = kind(config.model.trunk, config.model.vocab_size, encoder_layers=3)
    experiment = Experiment(config)
    params = experiment.make_state().params
    assert set(params["encoder"]) == {"layer_0", "layer_1", "layer_2"}
    assert set(params["decoder"]) == {"layer_0", "layer_1"}
    logits = experiment.model.apply({"params": params}, BATCH)["targets"]
    assert np.isfinite(logits).all()
