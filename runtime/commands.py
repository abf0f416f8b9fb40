"""Commands as the user would type them: what programs print can be pasted.

A program is started by its script (`python train.py`), by the console command (`triform
train`) or from Python; what it prints starts other programs in the same way.
"""

import os
import shlex
import shutil
import sys

from triform.runtime import stores

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# Programs that the console command starts, and scripts that lie beside one another.
SCRIPTS = ("train", "evaluate", "generate", "sweep", "plot")
INTEROP = ("import", "export")


def path(name: str) -> str:
    """A path for a command typed in the present folder: relative if it lies below."""
    if stores.is_store(name):
        return name
    name = os.path.abspath(os.path.expanduser(name))
    short = os.path.relpath(name)
    return name if short.startswith(os.pardir) else short


def _program(name: str) -> str:
    """A program as it can be typed: its name alone if the shell finds it by that."""
    found = shutil.which(os.path.basename(name))
    same = found and os.path.abspath(found) == os.path.abspath(name)
    return os.path.basename(name) if same else path(name)


def start(program: str) -> list[str]:
    """The words that start a program ("train", "evaluate", "import", ...)."""
    python, script = _program(sys.executable), os.path.realpath(sys.argv[0])
    folder, file = os.path.split(script)
    stem = file.removesuffix(".py")
    if folder == ROOT and stem in SCRIPTS:
        if program in SCRIPTS:
            return [python, path(os.path.join(ROOT, f"{program}.py"))]
        if program in INTEROP and path(ROOT) == os.curdir:
            return [python, "-m", "triform.interop", program]
    if folder == os.path.join(ROOT, "interop") and program in INTEROP:
        return [python, "-m", "triform.interop", program]
    console = os.path.join(os.path.dirname(sys.executable), "triform")
    if file == "triform" and os.access(script, os.X_OK):
        return [_program(sys.argv[0]), program]
    if script == os.path.join(ROOT, "__main__.py") or not os.path.exists(console):
        return [python, "-m", "triform", program]
    return [_program(console), program]


def module(name: str, **flags: object) -> str:
    """The command line of another package's module, quoted."""
    words = [_program(sys.executable), "-m", name]
    return shlex.join([*words, *(f"--{k}={v}" for k, v in flags.items())])


def line(program: str, *arguments: str, **flags: object) -> str:
    """A command line, quoted: line("evaluate", workdir="runs/a", split="test").

    `workdir` is shown relative to the present folder. Flags that are "" are left out.
    """
    words = [*start(program), *arguments]
    for name, value in flags.items():
        text = path(str(value)) if name == "workdir" else str(value)
        if text:
            words.append(f"--{name}={text}")
    return shlex.join(words)
