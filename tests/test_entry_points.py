"""generate.py for prompts, init_from, sweep.py: processes on an embedded corpus."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from triform.data.lines import one_line

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
            text=not isinstance(text, bytes),
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
    done = run("generate.py", *args, *(f"--input={p}" for p in prompts))
    assert "warning: input 1: outgrown: " in done.stderr
    assert "2 of 2 answers have warnings" in done.stderr
    for prompt, line in zip(prompts, done.stdout.splitlines(), strict=True):
        assert line.startswith(prompt)
        assert len(line) > len(prompt)
        # Alone it is shown as it is written: the same text.
        live = run("generate.py", *args, f"--input={prompt}").stdout
        assert one_line(live[:-1]) == line
    scored = run("generate.py", *args, "--scores", "--input=3 May").stdout
    score, text = scored.rstrip("\n").split("\t")
    assert float(score) < 0
    assert text == done.stdout.splitlines()[0]


def test_a_pipe_gives_a_line_each(run, workdir):
    """Whatever ends its lines and whatever they hold; a file has a row for each."""
    text = b"\xef\xbb\xbfone\r\n\xff\n\nfour"
    args = (f"--workdir={workdir}", "--temperature=1", "--max_tokens=4")
    done = run("generate.py", *args, "--batch_size=2", text=text)
    lines = done.stdout.decode().split("\n")
    assert len(lines) == 5
    assert lines[0].startswith("one") and lines[3].startswith("four")
    assert b"line 2: replaced: byte 1 (0xff) is not UTF-8" in done.stderr
    assert b"line 2" in run("generate.py", *args, "--strict", text=text, code=1).stderr
    assert b"nothing was asked" in run("generate.py", *args, text=b"").stderr


def test_a_table_gives_a_file_of_rows(run, workdir, tmp_path):
    table, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = ['{"en": "3 May", "label": 1}', '{"de": "Mai"}', "no json", '"May"']
    table.write_text("\n".join(rows))
    args = (f"--workdir={workdir}", f"--input_file={table}", f"--output={out}")
    args += ("--max_tokens=6", "--num_samples=2", "--scores", "--stop=e")
    assert run("generate.py", *args).stdout == ""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [x["input"] for x in found] == [
        {"en": "3 May", "label": 1},
        {"de": "Mai"},
        "no json",
        "May",
    ]
    failed = [x["warnings"][0].startswith("failed: ") for x in found if x["warnings"]]
    assert failed == [True, True]
    for row in (found[0], found[3]):
        assert len(row["samples"]) == 2
        assert row["text"] == row["samples"][0]["text"]
        assert row["score"] == pytest.approx(sum(row["token_scores"]))
    assert "there already" in run("generate.py", *args, code=1).stderr
    strict = (*args, "--overwrite", "--strict")
    assert "line 2: failed: " in run("generate.py", *strict, code=1).stderr


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
    assert "==" not in again.stdout  # none was started
    assert "eval/loss" in again.stdout
    assert json.loads((tmp_path / "sweep.json").read_text()) == report
    wrong = run("sweep.py", *args, "--sweep=seed", code=1)
    assert "expected KEY=VALUE,VALUE" in wrong.stderr
