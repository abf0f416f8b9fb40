"""Starts: what they import, and that a cache of compiled steps changes no bit."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Runs a program, and writes which packages it imported.
LISTING = """
import atexit, runpy, sys
path, *sys.argv = sys.argv[1:]

def write():
    names = {name.partition(".")[0] for name in sys.modules}
    open(path, "w").write("\\n".join(names))

atexit.register(write)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What every start may import that is neither Python's nor ours. What else there is
# costs more than 20 ms (orbax 200, TFDS 500, torch 3,000): import it where it is used.
ALWAYS = {
    *("jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "filelock"),
    *("flax", "optax", "msgpack", "yaml", "rich", "pygments", "typing_extensions"),
    *("absl", "ml_collections", "etils", "google", "cloudpickle"),
    *("PIL", "jinja2", "markupsafe", "safetensors", "sentencepiece", "tokenizers"),
    "tqdm",
}
READING = {"orbax", "tensorstore", "humanize", "simplejson", "uvloop", "nest_asyncio"}
WRITING = READING | {"tensorboardX", "packaging"}


def started(*words, listing=os.devnull, code=0, **more):
    """(what a program printed, the packages that it imported)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **more}
    done = subprocess.run(
        [sys.executable, "-c", LISTING, str(listing), *map(str, words)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    names = set(pathlib.Path(listing).read_text().splitlines())
    python = {"triform", "__main__", "__mp_main__", "cython_runtime"}
    names -= python | set(sys.stdlib_module_names)
    return done, {x for x in names if not x.startswith(("_", "sitecustomize"))}


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """(start, folder): runs a program, with the cache root and a text in the folder."""
    folder = tmp_path_factory.mktemp("start")
    rows = [json.dumps({"text": f"line {n} of {n * n} words"}) for n in range(200)]
    (folder / "text.jsonl").write_text("\n".join(rows))

    def start(*words, config=True, **more):
        flags = (
            "--config=my_text:smoke",
            f"--config.data.source={folder / 'text.jsonl'}",
            "--config.data.text=text",
            "--config.optim.schedule=constant",
            "--config.checkpoint.every=2",
            "--config.log_every=1",
        )
        more = {"TRIFORM_CACHE": str(folder / "cache"), **more}
        words = (*words, *flags) if config else words
        return started(*words, listing=folder / "modules", **more)

    return start, folder


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


def arrays(workdir, step):
    """The checksums of a checkpoint's arrays, by path."""
    path = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    found = json.loads(path.read_text())["body"]["arrays"]
    return {name: about["checksum"] for name, about in found.items()}


def test_resume_is_bitwise_with_a_cold_and_a_warm_cache(text_run):
    """Compiled here and now, or taken from the cache: the same steps, and one line."""
    start, folder = text_run
    plain = folder / "plain"
    off = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    done, names = start("train.py", f"--workdir={plain}", **off)
    assert not names - ALWAYS - WRITING
    assert len(re.findall("compiling the step for L=32: ", done.stdout)) == 1
    workdir = folder / "run"
    first, _ = start("train.py", f"--workdir={workdir}", "--config.steps=4")
    assert "compiling the step for L=32: " in first.stdout
    again, _ = start("train.py", f"--workdir={workdir}", "--config.steps=6")
    assert "compiling the step for L=32, cached: " in again.stdout
    assert "resuming after step 4" in again.stdout
    assert losses(workdir) == losses(plain)
    assert sorted(losses(plain)) == [1, 2, 3, 4, 5, 6]
    assert arrays(workdir, 6) == arrays(plain, 6)
    # Finished: it says so, and imports what reads the last checkpoint.
    done, names = start("train.py", f"--workdir={workdir}", config=False)
    assert "finished, 6 steps" in done.stdout
    assert not names - ALWAYS - READING


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0),
        (("--dry_run",), 0),
        (("--workdir=nowhere", "--config.steps=-1"), 1),
        (("--workdir=nowhere", "--config.model.nope=1"), 1),
    ],
)
def test_a_start_imports_only_this(text_run, words, code):
    start, _ = text_run
    _, names = start("train.py", *words, code=code)
    assert not names - ALWAYS


@pytest.mark.parametrize("program", ["evaluate.py", "generate.py", "sweep.py"])
def test_help_imports_only_this(text_run, program):
    start, _ = text_run
    _, names = start(program, "--help", config=False)
    assert not names - ALWAYS
