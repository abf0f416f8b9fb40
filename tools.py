"""Looks into what runs keep, without a model and without accelerators.

python -m triform.tools checkpoint verify DIR        are all arrays as they were saved?
python -m triform.tools checkpoint inspect DIR[:STEP]        the arrays of a step
python -m triform.tools checkpoint diff DIR[:STEP] DIR2[:STEP]        what differs
python -m triform.tools replay CAPSULE        a bad step again, on one CPU

DIR: a workdir or its checkpoints/. Without STEP: the newest. `triform tools ...` is the
same. Exit codes: 0 intact, or equal; 1 damaged, different or an error. Nothing is
changed or moved.
"""

import os
import re
import sys
from collections.abc import Sequence

import jax

from triform import capsule
from triform.runtime import files, launch, paths, saved
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import CheckpointError, UserError


def _opened(folder: str) -> Checkpointer:
    """The checkpoints of a workdir, or those in the folder itself."""
    inner = os.path.join(folder, "checkpoints")
    found = Checkpointer(
        inner if files.is_folder(inner) else folder, CheckpointConfig()
    )
    if not found.steps():
        found.close()
        raise UserError(f"{folder}: no checkpoint is there; name a workdir")
    return found


def _step(text: str) -> tuple[str, int | None]:
    """(folder, step) of DIR or DIR:STEP."""
    found = re.fullmatch(r"(.+?)(?::(\d+))?", text)
    folder = paths.workdir(found[1] if found else text)
    if not files.is_folder(folder):
        raise UserError(f"{text}: no such folder; name a workdir")
    return folder, int(found[2]) if found[2] else None


def _arrays(text: str) -> tuple[str, saved.Arrays]:
    """('DIR, step N', arrays) of DIR[:STEP]."""
    folder, step = _step(text)
    with _opened(folder) as checkpointer:
        step = checkpointer.latest() if step is None else step
        return f"{folder}, step {step}", saved.read(checkpointer, step)[0]


def verify(text: str) -> int:
    """Prints of every step whether its checksums hold; 1 if those of one do not."""
    folder, only = _step(text)
    frozen, bad = os.path.join(folder, "frozen"), 0
    for part in (folder, *([frozen] if files.is_folder(frozen) else [])):
        with _opened(part) as checkpointer:
            for step in checkpointer.steps() if only is None else [only]:
                name = f"{'frozen, ' if part == frozen else ''}step {step}"
                try:
                    arrays, _ = saved.read(checkpointer, step)
                except CheckpointError as error:
                    bad += 1
                    print(f"{name}: {error}")
                    continue
                size = sum(x.nbytes for x in arrays.values())
                print(f"{name}: intact, {len(arrays)} arrays, {size / 1e6:,.1f} MB")
    return int(bad > 0)


def inspect(text: str) -> int:
    """Prints the arrays of a step with shape, type, bytes and norm."""
    title, arrays = _arrays(text)
    wide = max(map(len, arrays), default=0)
    print(title)
    for name, x in arrays.items():
        kind = f"{x.dtype}{list(x.shape)}"
        print(f"  {name:{wide}}  {kind:24}{x.nbytes:>15,}  {saved.norm(x):.6g}")
    print(f"  {sum(x.nbytes for x in arrays.values()):,} bytes")
    return 0


def diff(one: str, other: str) -> int:
    """Prints what two steps do not have in common; 1 if they differ."""
    (first, a), (second, b) = _arrays(one), _arrays(other)
    print(f"- {first}\n+ {second}")
    count = 0
    for name in {**a, **b}:
        if name in a and name in b:
            text = saved.difference(a[name], b[name])
        else:
            text = f"only in {first if name in a else second}"
        if text:
            count += 1
            print(f"  {name}: {text}")
    print(f"{count} of {len({**a, **b})} arrays differ")
    return int(count > 0)


# Words -> (function, number of its arguments).
COMMANDS = {
    "checkpoint verify": (verify, 1),
    "checkpoint inspect": (inspect, 1),
    "checkpoint diff": (diff, 2),
    "replay": (lambda folder: print(capsule.replay(folder)), 1),
}


def main(argv: list[str]) -> int:
    """Runs a command; the exit code."""
    jax.config.update("jax_platforms", "cpu")  # before the first device call
    for name, (command, count) in COMMANDS.items():
        words = name.split()
        rest = argv[1 + len(words) :]
        if argv[1 : 1 + len(words)] == words and len(rest) == count:
            return command(*rest) or 0
    given, known = " ".join(argv[1:]), ", ".join(COMMANDS)
    raise UserError(f"tools {given}: expected one of {known}, and its folders; --help")


def cli(argv: Sequence[str], program: str = "tools") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, lambda: None, __doc__, argv, answers=True, arguments=True)


if __name__ == "__main__":
    cli(sys.argv)
