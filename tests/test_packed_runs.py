"""Runs that train together: each as it would alone, whatever becomes of the others."""

import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from laws import SPEED

from triform import packed, train
from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import (
    CheckpointConfig,
    ClassificationConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    SequenceClassificationConfig,
    TokenizerConfig,
    TransformerConfig,
    vary,
)
from triform.experiment import Experiment
from triform.runtime import history, metrics
from triform.runtime.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 10
CLOSE = 1e-5  # relative, of losses over ten steps: sums are ordered otherwise
# Whatever can be an input of the program, and the seed: batches, too, are others.
OTHER = {
    "seed": 1,
    "optim": {
        **{"learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0.0},
        **{"b1": 0.8, "b2": 0.9, "eps": 1e-8, "clip_norm": 0.5, "ema_decay": 0.6},
    },
    "model.trunk": {"dropout": 0.0, "attention_dropout": 0.3},
    "task.label_smoothing": 0.1,
}
DIVERGES = {"optim.learning_rate": 1e38}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of three lengths, of three classes."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, count in (("train", 60), ("validation", 12), ("test", 12)):
        with open(folder / f"{split}.jsonl", "w") as f:
            for i in range(count):
                text = "".join(rng.choices("abcd"[: 2 + i % 3], k=3 + 2 * (i % 4)))
                f.write(json.dumps({"text": text, "label": i % 3}) + "\n")
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Prepared arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIFORM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(data, **changes):
    """An encoder of one layer, with two lengths of rows."""
    trunk = TransformerConfig(
        num_layers=1,
        d_model=8,
        num_heads=2,
        d_ff=12,
        max_len=0,
        positions="learned",
        attention="flash",
        dropout=0.1,
        attention_dropout=0.1,
    )
    found = ExperimentConfig(
        model=EncoderConfig(
            trunk, vocab_size=12, num_types=0, masked_head=False, num_labels=3
        ),
        task=ClassificationConfig(),
        data=SequenceClassificationConfig(
            source=data,
            max_len=16,
            batch_size=8,
            buckets=(8,),
            tokenizer=TokenizerConfig(kind="chars"),
        ),
        optim=OptimConfig(
            name="adamw",
            schedule="cosine",
            warmup_steps=2,
            weight_decay=0.1,
            clip_norm=1.0,
            ema_decay=0.5,
        ),
        evaluation=EvaluationConfig(every=4, metrics=()),
        checkpoint=CheckpointConfig(every=4),
        steps=STEPS,
        log_every=1,
    )
    return vary(found, {"x": changes}, "x")


def members(data, folder):
    changes = {"base": {}, "other": OTHER, "diverges": DIVERGES}
    return [(config(data, **x), str(folder / name)) for name, x in changes.items()]


@pytest.fixture(scope="module")
def pack(data, tmp_path_factory):
    """(folder of three members, what came of them), never interrupted."""
    folder = tmp_path_factory.mktemp("pack")
    return folder, packed.run(members(data, folder))


def lines(workdir):
    """The lines of metrics.jsonl without what depends on the machine."""
    found = metrics.read_lines(str(workdir))
    return [{k: x for k, x in line.items() if k not in SPEED} for line in found]


def state(workdir, step=STEPS):
    """Every array of a checkpoint as bytes, by path."""
    saved = workdirs.open_config(str(workdir))
    directory = workdirs.checkpoint_dir(str(workdir))
    with Checkpointer(directory, saved.checkpoint) as checkpointer:
        abstract = Experiment(saved).abstract_state().replace(frozen={})
        found = checkpointer.restore(abstract, step)[0]
    found = found.replace(rng=jax.random.key_data(found.rng))
    paths = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(k): np.asarray(x).tobytes() for k, x in paths}


def after(times):
    """Asks to leave once it was asked so many times."""
    count = itertools.count()
    return lambda: "SIGTERM" if next(count) >= times else ""


def assert_close(ours, alone):
    assert len(ours) == len(alone)
    for a, b in zip(ours, alone, strict=True):
        assert a.keys() == b.keys()
        for key, x in a.items():
            if isinstance(x, float) and key.endswith("loss"):
                assert abs(x - b[key]) <= CLOSE * abs(b[key]), (a["step"], key)
            elif isinstance(x, float):
                assert x == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
            else:
                assert x == b[key], key


def kept(workdir):
    """Names of what a run keeps, but for what it printed and its lock."""
    found = (os.path.join(a, x) for a, _, b in os.walk(workdir) for x in b)
    names = (os.path.relpath(path, workdir) for path in found)
    folders = ("tensorboard", "checkpoints", "frozen")
    named = {x for x in names if not x.startswith(folders)}
    steps = os.listdir(os.path.join(workdir, "checkpoints"))
    return named - {packed.OUTPUT} | {f"checkpoints/{x}" for x in steps}


def test_a_member_is_as_the_run_alone(pack, data, tmp_path):
    """The same files, numbers and scores, and train.py goes on with it."""
    folder, outcomes = pack
    ours, alone = folder / "other", tmp_path / "other"
    chosen = config(data, **OTHER)
    scores = train.run(chosen, str(alone))
    assert_close(lines(ours), lines(alone))
    assert_close([outcomes[1]], [scores])
    assert (ours / "config.json").read_text() == (alone / "config.json").read_text()
    assert kept(ours) == kept(alone)
    shutil.copytree(ours, tmp_path / "copy")
    chosen.steps = STEPS + 1
    more = train.run(chosen, str(tmp_path / "copy"))
    assert np.isfinite(more["test/loss"])
    assert lines(tmp_path / "copy")[: len(lines(ours)) - 1] == lines(ours)[:-1]


def test_a_member_that_diverges_ends_alone(pack, capfd):
    folder, outcomes = pack
    assert isinstance(outcomes[0], dict) and isinstance(outcomes[1], dict)
    told = outcomes[2]
    assert "train/loss is nan" in told or "infinite or NaN" in told
    assert "\n" not in told and "optim.learning_rate" in told
    (start,) = history.read(str(folder / "diverges"))
    assert start["outcome"].startswith("error: step ")
    assert len(history.read(str(folder / "base"))) == 1
    printed = (folder / "diverges" / packed.OUTPUT).read_text()
    assert "first step" in printed


def test_interrupted_members_go_on_bitwise(pack, data, tmp_path):
    """They end as if nothing had happened."""
    folder, _ = pack
    stopped = packed.run(members(data, tmp_path), stop=after(16))
    assert stopped[:2] == [{}, {}] and isinstance(stopped[2], str)
    for name in ("base", "other"):
        directory = workdirs.checkpoint_dir(str(tmp_path / name))
        assert 0 < max(map(int, os.listdir(directory))) < STEPS
    ended = packed.run(members(data, tmp_path))
    assert all(isinstance(x, dict) and x for x in ended[:2])
    for name in ("base", "other"):
        assert lines(tmp_path / name) == lines(folder / name)
        assert state(tmp_path / name) == state(folder / name)


def test_a_member_that_is_ahead_trains_with_the_others(pack, data, tmp_path):
    """One was trained further alone; the scores are those of the run alone."""
    folder, outcomes = pack
    (base, here), (other, there) = members(data, tmp_path)[:2]
    train.run(base, here, stop=after(6))
    train.run(other, there, stop=after(3))
    found = packed.run(members(data, tmp_path)[:2])
    for name, ours, other in zip(("base", "other"), found, outcomes, strict=False):
        assert_close(lines(tmp_path / name), lines(folder / name))
        assert_close([ours], [other])


def test_at_most_so_many_at_once_and_one_workdir_each(data, tmp_path):
    with pytest.raises(packed.pack.UserError, match="same workdir"):
        packed.run([(config(data), str(tmp_path / "x"))] * 2)
    chosen = [(config(data, steps=2, seed=x), str(tmp_path / str(x))) for x in (0, 1)]
    found = packed.run(chosen, at_most=1)
    assert all(np.isfinite(x["test/loss"]) for x in found)
    assert packed.run(chosen) == found  # finished: nothing is trained again


def test_frozen_parameters_that_members_share_are_not_copied(data, tmp_path):
    """Probes of one model: the trunk is one array for all, and is not trained."""
    changes = {"optim.train": (".*label_head.*",), "steps": 3, "data.buckets": ()}
    chosen = [
        (config(data, **changes, **{"optim.learning_rate": x}), str(tmp_path / str(x)))
        for x in (1e-3, 1e-2)
    ]
    found = packed.run(chosen)
    frozen = [
        workdirs.restore_frozen(w, Experiment(c.resolved()).abstract_state())
        for c, w in chosen
    ]
    equal = jax.tree.map(np.array_equal, *frozen)
    assert jax.tree.all(equal) and jax.tree.leaves(equal)
    alone = train.run(chosen[1][0], str(tmp_path / "alone"))
    assert_close([found[1]], [alone])


def rows_of(folder):
    """{name: (state, note)} of a sweep's runs."""
    found = json.loads((folder / "sweep.json").read_text())["runs"]
    return {row["name"]: (row["state"], row["note"], row["test"]) for row in found}


def test_a_sweep_is_packed_killed_and_goes_on(data, tmp_path):
    """sweep.py --on=packed, SIGTERM, SIGKILL: it ends as one that nobody disturbed."""
    chosen = config(data, steps=60)
    plugin = tmp_path / "mine.py"
    text = schema.to_json(chosen)
    plugin.write_text(
        "from triform.configs import schema\n"
        f"def get_config(variant=''):\n    return schema.from_json({text!r})\n"
    )
    command = [sys.executable, str(ROOT / "sweep.py"), f"--config={plugin}"]
    command += ["--sweep=optim.learning_rate=1e-3,1e-2,-1", "--on=packed"]
    environment = dict(os.environ, XLA_FLAGS="", PYTHONUNBUFFERED="1")

    def start(folder):
        return subprocess.Popen(
            [*command, f"--workdir={folder}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    undisturbed = start(tmp_path / "a")
    output = undisturbed.communicate(timeout=600)[0]
    assert undisturbed.returncode == 1, output
    expected = rows_of(tmp_path / "a")
    assert [x[0] for x in expected.values()] == ["finished", "finished", "failed"]
    assert "must be positive" in [*expected.values()][2][1]
    for how, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        disturbed = start(tmp_path / "b")
        for line in disturbed.stdout:
            if re.search(r"1e-3 \| step \d*[13579]/60 ", line):
                break
        if how == signal.SIGTERM:
            disturbed.send_signal(how)  # which passes it on
        else:
            os.killpg(disturbed.pid, how)
        rest = disturbed.communicate(timeout=600)[0]
        assert disturbed.returncode == code, rest
    ended = start(tmp_path / "b")
    output = ended.communicate(timeout=600)[0]
    assert ended.returncode == 1, output
    assert rows_of(tmp_path / "b") == expected
    for name, (state, *_) in expected.items():
        if state == "finished":
            assert lines(tmp_path / "b" / name) == lines(tmp_path / "a" / name)
