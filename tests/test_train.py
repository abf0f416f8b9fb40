"""The whole program as a user runs it: resume, interruption, other devices, mistakes.

Every run is a real process; each takes seconds, most of them for start and compilation.
"""

import fcntl
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from laws import SPEED

from triform import config_flag
from triform import train as training
from triform.configs import transformer_cldr
from triform.data.sources.tfds_source import BUILDERS
from triform.experiment import Experiment
from triform.runtime import history
from triform.runtime.checkpoint import Checkpointer
from triform.workdir import checkpoint_dir, saved_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = "configs/transformer_cldr.py:smoke"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def command(script, workdir, *args):
    return [sys.executable, str(ROOT / script), f"--workdir={workdir}", *args]


def environment(cache, devices):
    env = dict(os.environ, TRIFORM_CACHE=str(cache), JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return env


def run(script, workdir, cache, *args, devices=1, code=0, text=None):
    done = subprocess.run(
        command(script, workdir, *args),
        cwd=ROOT,
        env=environment(cache, devices),
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train(workdir, cache, *args, **kwargs):
    # Dropout on: the random numbers of a step must resume too.
    args = (f"--config={SMOKE}", "--config.log_every=3", *args)
    return run("train.py", workdir, cache, *args, **kwargs)


def started(workdir, cache, *args):
    """train.py, running on."""
    return subprocess.Popen(
        command("train.py", workdir, *args),
        cwd=ROOT,
        env=environment(cache, 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def saved_state(workdir, step):
    """Every array of a checkpoint by path, on the host, and the JSON beside them."""
    config = saved_config(str(workdir))
    config.mesh = type(config.mesh)()
    with Checkpointer(checkpoint_dir(str(workdir)), config.checkpoint) as checkpointer:
        abstract = Experiment(config).abstract_state().replace(frozen={})
        state, meta = checkpointer.restore(abstract, step)
    state = state.replace(rng=jax.random.key_data(state.rng))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}, meta


def metric_lines(workdir):
    """{(step, kind): the line without timings}."""
    result = {}
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        kind = next(k for k in line if k != "step").split("/")[0]
        kept = {k: v for k, v in line.items() if k not in SPEED}
        assert (line["step"], kind) not in result, "a step was written twice"
        result[line["step"], kind] = kept
    return result


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


STEPS = "--config.steps=10"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir, cache, STEPS)
    return workdir


def test_resume_is_bitwise(uninterrupted, tmp_path, cache):
    """Law 6: 10 steps == 4 steps + save + new process + 6 steps."""
    train(tmp_path, cache, "--config.steps=4")
    again = train(tmp_path, cache, STEPS)
    assert "resuming after step 4" in again.stdout
    assert "config: steps was 4, is now 10" in again.stdout
    whole, meta = saved_state(uninterrupted, 10)
    resumed, resumed_meta = saved_state(tmp_path, 10)
    assert_same_state(whole, resumed)
    assert meta["data"] == resumed_meta["data"]
    assert (meta["data"]["seed"], meta["data"]["step"]) == (0, 10)
    assert meta["window"] == resumed_meta["window"]
    before, after = metric_lines(uninterrupted), metric_lines(tmp_path)
    assert {k for k in before if k[1] == "train"} == {
        (3 * i, "train") for i in (1, 2, 3)
    }
    for key, line in before.items():
        assert after[key] == line


def test_sigterm_saves_and_the_next_start_goes_on(uninterrupted, tmp_path, cache):
    args = (f"--config={SMOKE}", "--config.log_every=3", "--config.steps=100000")
    # Steps of this size take milliseconds: SIGTERM arrives somewhere among them.
    args = (*args, "--config.evaluation.every=100000")
    process = started(tmp_path, cache, *args)
    for line in process.stdout:
        if line.startswith("step 6/"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "SIGTERM: step" in errors
    assert "is saved" in errors
    with Checkpointer(
        checkpoint_dir(str(tmp_path)), transformer_cldr.get_config().checkpoint
    ) as checkpointer:
        stopped = checkpointer.latest()
    assert stopped >= 6
    assert f"step {stopped} is saved" in errors
    # Going on from there gives what a run without interruption gives.
    goal = f"--config.steps={stopped + 2}"
    train(tmp_path, cache, goal)
    straight = tmp_path / "straight"
    train(straight, cache, goal)
    one, _ = saved_state(tmp_path, stopped + 2)
    other, _ = saved_state(straight, stopped + 2)
    assert_same_state(one, other)


@pytest.mark.parametrize(
    ("devices", "args"),
    [
        (8, ("--config.placement=pmap",)),
        (4, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
    ],
)
def test_resume_on_other_devices(uninterrupted, tmp_path, cache, devices, args):
    """Law 6: saved on 8 or 4 devices, resumed on 1; same examples, same losses.

    Sums over devices are taken in another order, and Adam divides by the root of tiny
    second moments early on: 1e-4 in a loss of 6 leaves room for that, and for nothing
    like a wrong example or a lost moment. Dropout is off: its bits follow the layout.
    """
    plain = ("--config.model.trunk.dropout=0.0", "--config.log_every=1")
    base = tmp_path / "one"
    train(base, cache, STEPS, *plain)
    moved = tmp_path / "moved"
    train(moved, cache, "--config.steps=4", *plain, *args, devices=devices)
    back = train(moved, cache, STEPS, *plain)
    assert "resuming after step 4" in back.stdout
    a, b = metric_lines(base), metric_lines(moved)
    for step in range(1, 11):
        one, other = a[step, "train"], b[step, "train"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)
        assert one["train/learning_rate"] == other["train/learning_rate"]


def test_an_interruption_before_the_first_step_ends_at_once(tmp_path, cache):
    process = started(tmp_path, cache, f"--config={SMOKE}")
    for line in process.stdout:
        if line.startswith("steps: "):  # the corpus comes next
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGINT before the first step" in errors
    assert not (tmp_path / "config.json").exists()
    assert history.read(str(tmp_path))[-1]["outcome"] == "interrupted by SIGINT"


def test_finished_run_says_so_and_evaluates(uninterrupted, cache):
    before = (uninterrupted / "metrics.jsonl").read_text()
    again = train(uninterrupted, cache, STEPS)
    assert "finished, 10 steps; raise --config.steps" in again.stdout
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    flags = ("--checkpoint=latest", "--examples=8")  # as evaluation.examples
    scored = run("evaluate.py", uninterrupted, cache, *flags)
    report = json.loads(scored.stdout)
    line = metric_lines(uninterrupted)[10, "eval"]
    assert report["validation/loss"] == pytest.approx(line["eval/loss"], rel=1e-6)
    assert report["validation/bleu_signature"] == line["eval/bleu_signature"]
    assert (uninterrupted / "evaluation_validation_latest.json").exists()
    for name in ("config.json", "tokenizer.json", "samples/step_00000010.txt"):
        assert (uninterrupted / name).exists()
    assert list((uninterrupted / "tensorboard").glob("events.out.tfevents.*"))


def test_a_run_killed_while_it_was_scored_is_scored_later(
    uninterrupted, tmp_path, cache
):
    """All steps are done and saved, but neither evaluation has come to its end."""
    workdir = tmp_path / "killed"
    shutil.copytree(uninterrupted, workdir)
    lines = metric_lines(workdir)
    text = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [x for x in text if json.loads(x)["step"] < 10]
    torn = text[-1][:40]
    (workdir / "metrics.jsonl").write_text("".join(kept) + torn)
    scores = json.loads((workdir / "scores.json").read_text())
    early = {step: found for step, found in scores.items() if step != "10"}
    (workdir / "scores.json").write_text(json.dumps(early))
    again = train(workdir, cache, STEPS)
    assert "resuming after step 10" in again.stdout
    assert metric_lines(workdir) == lines
    assert json.loads((workdir / "scores.json").read_text()) == scores


def test_one_run_at_a_time(uninterrupted, cache):
    with open(uninterrupted / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = train(uninterrupted, cache, STEPS, code=1)
    assert "another train.py runs in it" in done.stderr


def test_other_data_under_the_same_name_are_noticed(uninterrupted, tmp_path, cache):
    workdir = tmp_path / "other"
    shutil.copytree(uninterrupted, workdir)
    # Another tokenizer makes other tokens of the same text.
    (workdir / "tokenizer.json").unlink()
    (workdir / "tokenizer.bytes").write_text("cased")
    done = train(workdir, cache, "--config.steps=12", code=1)
    assert "it was trained on other data than today's 'cldr'" in done.stderr


def test_generate(uninterrupted, cache):
    """A line out for a line in; batch size and company change nothing."""
    lines = ["3 days", "", "May 4, 2020", "Germany and France"]
    text = "\n".join(lines) + "\n"
    done = run("generate.py", uninterrupted, cache, "--batch_size=3", text=text)
    out = done.stdout.split("\n")
    assert len(out) == 5
    assert out[1] == out[4] == ""
    alone = run(
        "generate.py", uninterrupted, cache, *(f"--input={x}" for x in lines if x)
    )
    assert alone.stdout.split("\n")[:3] == [out[0], out[2], out[3]]
    long = "--input=" + "3 " * 300
    assert "tokens left out" in run("generate.py", uninterrupted, cache, long).stderr
    wrong = run("generate.py", uninterrupted, cache, long, "--strict", code=1)
    assert "data.max_len=32" in wrong.stderr


MISTAKES = [
    (["--config=configs/nope.py"], "no such file"),
    ([f"--config={SMOKE}", "--config.model.trunk.nun_layers=1"], "trunk.num_layers?"),
    ([f"--config={SMOKE}", "--config.steps=many"], "--config.steps=many"),
    ([f"--config={SMOKE}", "--config.model.trunk.num_heads=3"], "must divide d_model"),
    ([f"--config={SMOKE}", "--config.mesh.tensor=3"], "number of devices, 1"),
    ([f"--config={SMOKE}", "--config.data.source=nope_corpus"], "nope_corpus"),
    ([f"--config={SMOKE}", "--config.data.inputs=fr"], "no feature 'fr'"),
    ([f"--config={SMOKE}", "--config.model.vocab_size=40"], "model.vocab_size=40"),
    (["--config=configs/transformer_cldr.py:tiny"], "expected one of '', 'smoke'"),
    ([f"--config={SMOKE}", "config.steps=3"], "unexpected argument 'config.steps=3'"),
    ([f"--config={SMOKE}", "--workdir="], "--workdir is empty"),
    ([f"--config={SMOKE}", "--workdir=README.md"], "is a file; name a folder"),
    (["--config.steps=3"], "no --config, and no --workdir of a run"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES)
def test_a_mistake_is_one_line(args, message, tmp_path, cache):
    done = run("train.py", tmp_path, cache, *args, code=1)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_workdir_of_another_experiment_is_refused(uninterrupted, cache):
    before = (uninterrupted / "config.json").read_text()
    done = train(uninterrupted, cache, "--config.model.trunk.d_ff=48", code=1)
    assert "belongs to another experiment (model.trunk.d_ff is 32 there" in done.stderr
    assert (uninterrupted / "config.json").read_text() == before
    done = run("evaluate.py", uninterrupted, cache, "--checkpoint=77", code=1)
    assert "expected best, latest, average:K or one of the steps" in done.stderr
    done = run("evaluate.py", uninterrupted / "nothing", cache, code=1)
    assert "holds no config.json" in done.stderr


def test_non_finite_loss_stops_with_step_and_examples(tmp_path, cache):
    """Law 10. A rate of 1e38 overflows at once; the checkpoint before it stays."""
    train(tmp_path, cache, "--config.steps=2")
    done = train(tmp_path, cache, STEPS, "--config.optim.learning_rate=1e38", code=1)
    assert "error: step" in done.stderr
    assert "on examples" in done.stderr
    assert "the newest checkpoint is 2: lower optim.learning_rate" in done.stderr
    _, meta = saved_state(tmp_path, 2)
    assert meta["data"]["step"] == 2


# Those on files of one's own have tests of their own, which write the files; so has
# what needs the workdir of another run (test_dalle.py).
NAMES = [
    name
    for name in config_flag.names()
    if not name.startswith("my_") and name != "dalle"
]


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path, cache, shared_data, monkeypatch):
    """The smoke variant of every config trains, evaluates, saves and scores."""
    data = importlib.import_module(f"triform.configs.{name}").get_config("smoke").data
    read = data.features() or (data,)
    for source in {part.source for part in read} & BUILDERS.keys():
        shared_data(BUILDERS[source].folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(cache / "tfds"))
    monkeypatch.setenv("TRIFORM_CACHE", str(cache))
    config = importlib.import_module(f"triform.configs.{name}").get_config("smoke")
    scores = training.run(config, str(tmp_path))
    assert np.isfinite(scores["test/loss"])
    lines = metric_lines(tmp_path)
    assert {kind for _, kind in lines} == {"train", "eval", "test"}
    # Started again it is finished, and gives the same.
    assert training.run(config, str(tmp_path)) == scores


def test_dry_run_needs_neither_corpus_nor_weights(tmp_path, cache):
    done = run(
        "train.py",
        tmp_path / "none",
        cache,
        "--config=configs/transformer_wmt14.py:big",
        "--dry_run",
        "--config.mesh.tensor=2",
        "--config.mesh.fsdp=4",
        devices=8,
    )
    assert "214,245,376 parameters, 857.0 MB, 107" in done.stdout
    assert not (tmp_path / "none").exists()


def test_dry_run_of_devices_that_are_not_here(tmp_path, cache):
    args = ("--config=llama:8b", "--dry_run", "--config.model.trunk.attention=flash")
    done = run("train.py", tmp_path / "none", cache, *args, "--devices=2x8xH100")
    assert "devices: 16 x H100" in done.stdout
    assert "does not fit: " in done.stdout
    assert "--config.mesh.data=1 --config.mesh.fsdp=16" in done.stdout
    wrong = run(
        "train.py",
        tmp_path / "none",
        cache,
        *args,
        "--devices=v5e-8",
        "--config.mesh.fsdp=3",
        code=1,
    )
    (line,) = wrong.stderr.strip().splitlines()
    assert "number of devices, 8" in line
