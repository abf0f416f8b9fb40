"""A sweep on a real Slurm of one node: preempted, put back, finished as if never."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import slurm_node

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = (
    "--config=gpt_shakespeare_char:smoke",
    "--config.data.source=cldr",
    "--config.data.text=en",
    "--config.data.max_len=16",
    "--config.data.tokenizer.kind=bytes",
    "--config.model.vocab_size=259",
    "--config.steps=2000",
    "--config.log_every=100",
    "--config.evaluation.every=1000",
    "--config.evaluation.examples=64",
    "--config.checkpoint.every=1000",
)
pytestmark = pytest.mark.skipif(
    bool(slurm_node.missing()), reason=slurm_node.missing() or "Slurm is here"
)


@pytest.fixture(scope="module")
def environment():
    """Of a cluster, for programs that are started with it."""
    with slurm_node.running() as found:
        yield found | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def call(environment):
    """(words) -> what a program prints; it must succeed."""

    def run(*words):
        done = subprocess.run(
            words,
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def until(condition, seconds=300):
    """Waits for it; what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError("it did not come to that")


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def scores(workdir):
    report = json.loads((workdir / "sweep.json").read_text())
    assert [run["state"] for run in report["runs"]] == ["finished"] * 2
    return {run["name"]: (run["best"], run["test"]) for run in report["runs"]}


def test_an_array_that_is_preempted_ends_like_an_undisturbed_sweep(
    call, tmp_path, environment
):
    sweep = (sys.executable, "sweep.py", *CONFIG, "--sweep=seed=0,1")
    workdir = tmp_path / "preempted"
    begin = time.monotonic()
    out = call(*sweep, f"--workdir={workdir}", "--on=slurm:batch,0,1")
    assert "submitted: " in out and time.monotonic() - begin < 60
    runs = [workdir / f"seed={seed}" for seed in (0, 1)]
    until(lambda: all(lines_of(run / "metrics.jsonl") for run in runs))
    cores = os.cpu_count()
    urgent = ("sbatch", "--partition=urgent", "--parsable", f"--ntasks={cores}")
    number = call(*urgent, "--output=/dev/null", "--wrap=true").strip()
    until(lambda: number not in call("squeue", "--noheader", "--format=%A").split())
    # It got the node: the runs had saved and left.
    for run in runs:
        last = json.loads(lines_of(run / "runs.jsonl")[-1])
        assert last["outcome"].startswith("interrupted by SIGTERM"), last
    # The jobs wait or run again: nothing is submitted twice.
    words = [*sweep, f"--workdir={workdir}", "--on=slurm:batch,0,1"]
    again = subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert "submitted" not in again.stdout and os.listdir(workdir / "slurm") == ["1"]
    undisturbed = tmp_path / "undisturbed"
    # Not with --jobs: on other cores XLA adds up in another order.
    call(*sweep, f"--workdir={undisturbed}")
    until(lambda: not call("squeue", "--noheader"))
    for run in runs:
        outcomes = [json.loads(x)["outcome"] for x in lines_of(run / "runs.jsonl")]
        assert outcomes == ["interrupted by SIGTERM", "finished"]
        assert "resuming after step" in (run / "output.log").read_text()
    call(*sweep, f"--workdir={workdir}")  # nothing is left to do
    assert scores(workdir) == scores(undisturbed)
