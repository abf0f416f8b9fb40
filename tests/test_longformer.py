"""Longformer: windows, global tokens and their projections, as transformers does."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import torch
from hf_models import CASES, CLOSE, build, draw, error, load, ours, run, save

from triform.configs.schema import ExperimentConfig, to_json
from triform.experiment import Experiment
from triform.interop import families
from triform.interop.__main__ import main
from triform.interop.mapping import parameters
from triform.interop.suggest import experiment_config
from triform.models import EncoderConfig
from triform.models.config import TransformerConfig
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.parameters import ROWS, axes_of
from triform.tasks import Context
from triform.workdir import checkpoint_dir, load_variables, open_config

NAMES = [name for name in CASES if name.startswith("longformer")]
# Lengths of the rows of a batch. The widest windows hold 9, 7 and 13 positions.
BATCHES = ((64, 37, 5), (41,), (9, 16))


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(PyTorch's model, {scanned: (our config, our parameters)})."""
    model = build(request.param)
    folder = save(model, tmp_path_factory.mktemp(request.param))
    return model, {scan: load(folder, scan_layers=scan) for scan in (False, True)}


def scattered(real: np.ndarray) -> np.ndarray:
    """Other positions in every row, the first and the last one among them somewhere."""
    marked = np.random.default_rng(7).random(real.shape) < 0.15
    marked[0, [0, -1]] = marked[-1, 4] = True
    return marked.astype(np.int32)  # some at positions of padding: they stay padding


MARKED = {
    "none": np.zeros_like,
    "first": lambda real: np.eye(1, real.shape[1], dtype=np.int32) + 0 * real,
    "scattered": scattered,
}


def both(model, config, params, lengths, globals_, **changed) -> list[np.ndarray]:
    """(theirs, ours) at real positions; `changed` keys differ in our batch."""
    real = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    tokens = np.where(real, draw(real.shape, seed=len(lengths)), 1).astype(np.int32)
    theirs = run(
        model,
        input_ids=tokens.astype(np.int64),
        attention_mask=real,
        global_attention_mask=globals_(real),
    ).logits.numpy()
    batch = {
        "inputs": tokens,
        "segments": real,
        "global_attention_mask": globals_(real),
        **changed,
    }
    batch = {k: x for k, x in batch.items() if x is not None}
    found = ours(config, params, batch)
    if "targets" in found:
        return [x[real > 0] for x in (theirs, found["targets"])]
    return [theirs, found["label"]]


@pytest.mark.parametrize("globals_", MARKED.values(), ids=MARKED)
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_logits_are_those_of_the_original(case, lengths, globals_):
    model, loaded = case
    for config, params in loaded.values():
        assert error(*both(model, config, params, lengths, globals_)) < CLOSE


def test_without_marks_no_position_is_global(case):
    model, loaded = case
    pair = both(
        model, *loaded[False], (41, 17), MARKED["none"], global_attention_mask=None
    )
    assert error(*pair) < CLOSE


def test_the_comparison_tells_windows_and_global_tokens_apart(case):
    model, loaded = case
    config, params = loaded[False]
    lengths, first = (41, 17), MARKED["first"]
    bare = both(model, config, params, lengths, first, global_attention_mask=None)
    assert error(*bare) > 20 * CLOSE
    wider = tuple(w + 1 for w in config.trunk.windows)
    trunk = dataclasses.replace(config.trunk, windows=wider)
    wider = dataclasses.replace(config, trunk=trunk)
    assert error(*both(model, wider, params, lengths, first)) > 20 * CLOSE


def test_the_body_gets_fresh_heads(tmp_path):
    model = build("longformer-label").longformer
    model.pooler = type(model)(model.config).pooler  # the classifier's has none
    config, params = load(save(model, tmp_path))
    assert not config.masked_head and config.num_labels == 2
    tokens = draw((2, 23))
    first = MARKED["first"](tokens)
    pooled = run(
        model, input_ids=tokens.astype(np.int64), global_attention_mask=first
    ).pooler_output.numpy()
    head = params["label_head"]
    found = ours(config, params, {"inputs": tokens, "global_attention_mask": first})[
        "label"
    ]
    np.testing.assert_allclose(found, pooled @ head["kernel"] + head["bias"], atol=1e-5)


# --- What it becomes here ---


def test_an_imported_workdir_is_whole(tmp_path):
    """Its batches mark the first token, so the experiment has all its parameters."""
    source, workdir = save(build("longformer"), tmp_path / "hf"), tmp_path / "run"
    assert main(["import", source, str(workdir)]) == 0
    config = open_config(str(workdir))
    trunk = config.model.trunk
    assert (trunk.attention, trunk.windows) == ("local", (3, 5))
    assert config.model.position_offset == 2
    assert (config.data.max_len, config.data.global_tokens) == (64, "first")
    experiment = Experiment(config)
    with Checkpointer(checkpoint_dir(str(workdir)), config.checkpoint) as saved:
        params = load_variables(experiment, saved, "best")[0]["params"]
    attention = params["encoder"]["layer_3"]["self_attention"]
    assert "value_global" in attention
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    exported = families.hf_config(config.model)
    assert exported["attention_window"] == hf["attention_window"]
    assert exported["pad_token_id"] == 1


def test_global_projections_have_the_axes_of_the_others():
    """And so their sharding and their matrices for Muon."""
    reads = families.FAMILIES["longformer"].reads
    shapes = {path: x.shape for path, x in parameters(longformer(), reads).items()}
    others = [path for path in shapes if "_global/" in path]
    assert len(others) == 6
    for path in others:
        local = path.replace("_global", "")
        assert shapes[path] == shapes[local]
        axes = axes_of(path, shapes[path], ROWS)
        assert axes == axes_of(local, shapes[local], ROWS)


def test_global_projections_learn():
    config = longformer()
    task = Experiment(experiment_config(config)).task
    batch = {
        "inputs": draw((1, 20)),
        "global_attention_mask": np.eye(1, 20, dtype=np.int32),
    }
    batch |= {"label": np.ones(1, np.int32), "label_weights": np.ones(1, np.float32)}
    params = jax.jit(task.init)(jax.random.key(0), batch)["params"]
    ctx = Context(0, {})

    @jax.jit
    def loss(params):
        outputs, _ = task.outputs({"params": params}, batch, ctx)
        return sum(task.terms(outputs, batch, ctx).values())

    grads = jax.grad(loss)(params)
    attention = grads["encoder"]["layer_0"]["self_attention"]
    for name in ("query_global", "key_global", "value_global"):
        assert np.abs(attention[name]["kernel"]).max() > 0, name


# --- What transformers cannot express ---


def longformer(windows=(3,), **fields) -> EncoderConfig:
    """A classifier that transformers has."""
    sizes = {"num_layers": 1, "d_model": 8, "num_heads": 2, "d_ff": 12, "max_len": 34}
    fields = {"attention": "local", "positions": "learned", "ffn": "gelu"} | fields
    trunk = TransformerConfig(**sizes | fields, windows=windows)
    return EncoderConfig(trunk, 40, 1, position_offset=2, masked_head=False)


# (our config's fields, what the one line says)
WHY_NOT = [
    ({"attention_options": ("dilation", 2)}, "attention_options=('dilation', 2)"),
    ({"attention": "flash"}, "attention='flash': expected 'local'"),
    ({"num_kv_heads": 1}, "num_kv_heads=1"),
    ({"head_dim": 6}, "head_dim=6"),
    ({"attention_options": ("scale", 1.0)}, "('scale', 1.0)"),
    ({"positions": "sinusoidal"}, "positions='sinusoidal': expected 'learned'"),
    ({"norm_position": "pre"}, "norm_position='pre': expected 'post'"),
    ({"windows": (2,)}, "windows=(2,): expected windows w from 3 on"),
    ({"windows": (3, 0)}, "windows=(3, 0): expected windows w from 3 on"),
    ({"windows": (4, 6)}, "each w - 1 a divisor of the largest"),
]


@pytest.mark.parametrize(("fields", "said"), WHY_NOT, ids=[w[1] for w in WHY_NOT])
def test_what_transformers_cannot_express_is_named(fields, said, tmp_path, capsys):
    assert families.family_for(longformer()).model_type == "longformer"
    folder = tmp_path / "run"
    os.makedirs(folder)
    config = ExperimentConfig(model=longformer(**fields))
    (folder / "config.json").write_text(to_json(config))
    # As if it had been imported, then changed.
    (folder / "hf_config.json").write_text('{"model_type": "longformer"}')
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: transformers' longformer") and text.count("\n") == 1
    assert f"model.trunk.{said}" in text or said in text
    assert not (tmp_path / "out").exists()


def test_what_was_trained_without_global_tokens_lacks_projections(tmp_path, capsys):
    config = experiment_config(longformer())
    config.data.global_tokens = "none"
    (tmp_path / "config.json").write_text(to_json(config))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert "data.global_tokens='none'" in text and "'first'" in text


def test_settings_that_cannot_run_there_are_those_refused_here():
    """One position on either side, and a window that does not divide the widest."""
    tokens = torch.full((1, 20), 5)
    for windows in ([2, 2], [6, 10]):
        model = build("longformer-label", attention_window=windows)
        with pytest.raises((RuntimeError, AssertionError)), torch.no_grad():
            model(tokens)
