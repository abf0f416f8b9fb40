"""generate.py for prompts, init_from, sweep.py: processes on an embedded corpus."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Each phrase of CLDR is a document of the stream.
TEXT = (
    "--config=configs/gpt_shakespeare_char.py:smoke",
    *("--config.data.source=cldr", "--config.data.text=en"),
    *("--config.data.tokenizer.kind=bytes", "--config.model.vocab_size=259"),
    *("--config.data.batch_size=64", "--config.data.max_len=16"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def go(script, *args, code=0, text=None):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            cwd=ROOT,
            env=dict(os.environ, TRIFORM_CACHE=str(cache), XLA_FLAGS=""),
            input=text,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return go


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """Of a language model of bytes with a context of 32 tokens."""
    path = tmp_path_factory.mktemp("lm")
    run("train.py", f"--workdir={path}", *TEXT)
    return path


def test_prompts_are_continued_beyond_the_context(run, workdir):
    args = (f"--workdir={workdir}", "--method=greedy", "--max_tokens=70")
    prompts = ("3 May", "a longer prompt than the context of the model holds")
    together = run("generate.py", *args, *(f"--input={p}" for p in prompts)).stdout
    for prompt, line in zip(prompts, together.splitlines(), strict=True):
        assert line.startswith(prompt)
        assert len(line) > len(prompt)
        # Alone it is shown as it is written: the same text.
        live = run("generate.py", *args, f"--input={prompt}").stdout
        assert "".join(c if c.isprintable() else " " for c in live[:-1]) == line
    scored = run("generate.py", *args, "--scores", "--input=3 May").stdout
    score, text = scored.rstrip("\n").split("\t")
    assert float(score) < 0
    assert text == together.splitlines()[0]


def test_sampling_follows_its_seed(run, workdir):
    args = (f"--workdir={workdir}", "--temperature=1", "--max_tokens=20", "--input=May")
    texts = [run("generate.py", *args, f"--seed={s}").stdout for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_pipe_of_prompts_gives_a_line_each(run, workdir):
    done = run(
        "generate.py",
        f"--workdir={workdir}",
        *("--max_tokens=4", "--batch_size=2"),
        text="one\n\nthree\n",
    )
    lines = done.stdout.split("\n")
    assert len(lines) >= 4
    assert lines[0].startswith("one")
    assert "three" in done.stdout


def test_prompts_have_no_beams(run, workdir):
    args = (f"--workdir={workdir}", "--beam_size=2", "--input=x")
    assert "--method=beam" in run("generate.py", *args, code=1).stderr


def test_a_run_starts_from_another(run, workdir, tmp_path):
    done = run(
        "train.py",
        f"--workdir={tmp_path}",
        *TEXT,
        f"--config.init_from={workdir}:latest",
        "--config.model.tie_head=False",
    )
    assert f"init_from: {workdir}, step 6" in done.stdout
    assert "newly initialised: 1 arrays" in done.stdout
    assert "head/kernel (16, 259)" in done.stdout
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n") if x
    ]
    assert lines[-1]["step"] == 6
    # Started again it resumes, rather than starting from the other once more.
    again = run(
        "train.py",
        f"--workdir={tmp_path}",
        *TEXT,
        "--config.steps=8",
        f"--config.init_from={workdir}:latest",
        "--config.model.tie_head=False",
    )
    assert "resuming after step 6" in again.stdout
    assert "init_from:" not in again.stdout
    missing = (f"--workdir={tmp_path / 'x'}", *TEXT, "--config.init_from=nowhere")
    assert "no such folder" in run("train.py", *missing, code=1).stderr


def test_a_sweep_runs_compares_and_goes_on(run, tmp_path):
    args = (f"--workdir={tmp_path}", *TEXT, "--config.steps=2")
    swept = ("--sweep=seed=0,1", "--sweep=optim.b2=0.9,0.99")
    first = run("sweep.py", *args, *swept)
    assert first.stdout.count("finished: 2 steps") == 4
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["optim.b2=0.9", "optim.b2=0.99"]
    for row in report["rows"]:
        losses = [
            r["test"]["test/loss"]
            for r in report["runs"]
            if f"optim.b2={r['settings']['optim.b2']}" == row["name"]
        ]
        mean, spread, count = row["scores"]["test/loss"]
        assert count == len(losses) == 2
        assert mean == pytest.approx(sum(losses) / 2)
        assert spread == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    again = run("sweep.py", *args, *swept)
    assert again.stdout.count("finished, 2 steps") == 4
    wrong = run("sweep.py", *args, "--sweep=seed", code=1)
    assert "expected KEY=VALUE,VALUE" in wrong.stderr
