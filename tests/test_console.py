"""The installed console command, far from the checkout: a plugin's whole life.

The package is built and installed into a folder, as a user without a checkout has it.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plugins.md"
PAPER = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with site/ (the installed package), mine/ and elsewhere/."""
    folder = tmp_path_factory.mktemp("home")
    source = folder / "source"
    hidden = shutil.ignore_patterns(".*", "build", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=hidden)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    options = ["--no-build-isolation", "--disable-pip-version-check"]
    target = ["--target", str(folder / "site"), str(source)]
    subprocess.run([*pip, *options, *target], check=True, timeout=300)
    shutil.rmtree(source)
    for name in ("mine", "elsewhere"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def environment(home):
    """Finds the installed package and its command, and not the checkout."""
    path = f"{home / 'site' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    cache = str(home / "cache")
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": str(home / "site"),
        "TRIFORM_CACHE": cache,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }


@pytest.fixture(scope="module")
def shell(home, environment):
    """(command, folder=, code=) -> what a shell in that folder of `home` prints."""

    def run(command, folder="elsewhere", code=0):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=home / folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    return run


def test_the_installed_command_works_from_any_folder(shell, home):
    assert "triform PROGRAM" in shell("triform --help").stdout
    found = shell("triform train --config=llama:8b --keys=model.trunk.ffn").stdout
    assert "model.trunk.ffn = 'swiglu'" in found
    for program in ("train", "evaluate", "export"):
        assert "workdir" in shell(f"triform {program} --help").stdout.lower()
    code = "import triform; print(triform.__file__)"
    where = shell(f"{sys.executable} -c '{code}'").stdout
    assert where.strip() == str(home / "site" / "triform" / "__init__.py")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("trian", ("triform trian", "did you mean train?")),
        ("train --config=llmaa --workdir=x", ("--config=llmaa", "mean llama?")),
        ("train --config=llama --wrkdir=x", ("unknown flag --wrkdir", "--workdir")),
        ("train --config=llama --config.modl.x=1", ("no field 'modl'", "mean model?")),
    ],
)
def test_a_typo_is_one_line(words, parts, shell):
    errors = shell(f"triform {words}", code=1).stderr.strip()
    assert errors.startswith("error: ")
    assert "\n" not in errors
    assert all(part in errors for part in parts)


def test_a_plugin_is_trained_killed_resumed_and_used_with_printed_commands(
    shell, home, environment
):
    """The file is gone after the kill: the workdir has all that is needed."""
    plugin = home / "mine" / "doubles.py"
    plugin.write_text(PAPER)
    flags = ("--config=doubles.py", "--workdir=my runs/d", "--config.log_every=2")
    flags += ("--config.steps=100000", "--config.evaluation.every=100000")
    process = subprocess.Popen(
        ["triform", "train", *flags],
        cwd=home / "mine",
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    plugin.unlink()
    workdir = home / "mine" / "my runs" / "d"
    kept = [
        int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()
    ]
    goal = f"--config.steps={max(kept) + 4}"
    again = shell(f"triform train --workdir='../mine/my runs/d' {goal}").stdout
    assert f"resuming after step {max(kept)}" in again
    commands = [x.strip() for x in again.partition("Next:\n")[2].splitlines()]
    commands = [x for x in commands if x.startswith("triform ")]
    done = {command.split()[1]: shell(command).stdout for command in commands}
    assert {"generate", "evaluate", "sweep", "train", "inspect"} <= done.keys()
    report = json.loads(done["evaluate"])
    assert report["validation/token_loss"] > 0 > report["validation/entropy_loss"]
    # A term that a task adds is not among the nats of the text.
    assert report["validation/bits_per_byte"] > 0
    assert len(done["generate"]) > len("...\n")
    assert "CalmConfig" in done["inspect"]
    assert f"resuming after step {max(kept) + 4}" in done["train"]
    rows = json.loads((workdir.parent / "d_seeds" / "sweep.json").read_text())["rows"]
    assert [n for _, _, n in rows[0]["scores"].values()] == [2] * len(rows[0]["scores"])
