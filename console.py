"""The console command: `triform train ...`, the same programs as the scripts.

    triform PROGRAM [--flags]      or: python -m triform PROGRAM [--flags]

Works from any folder.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

# Program -> (module, what it does). The module has cli(argv, program), and is imported
# only when it is asked for.
PROGRAMS = {
    "train": ("triform.train", "train an experiment, or resume it"),
    "evaluate": ("triform.evaluate", "score a workdir, and write what it predicts"),
    "generate": ("triform.generate", "answer requests with a trained workdir"),
    "sweep": ("triform.sweep", "run and compare combinations of settings"),
    "lm_eval": ("triform.lm_eval", "run the public harness lm-eval on a workdir"),
    "plot": ("triform.plot", "draw the loss curves of workdirs"),
    "inspect": ("triform.inspection", "show what a workdir holds and what is next"),
    "tools": ("triform.tools", "verify and compare checkpoints, replay a bad step"),
    "import": ("triform.interop.__main__", "Hugging Face folder -> workdir"),
    "export": ("triform.interop.__main__", "workdir -> Hugging Face folder"),
}


def usage() -> str:
    """What `triform --help` prints."""
    rows = [f"  {name:10}{about}" for name, (_, about) in PROGRAMS.items()]
    return "\n".join(
        [
            "triform PROGRAM [--flags]",
            "",
            *rows,
            "",
            "triform PROGRAM --help shows its flags; triform train --config=NAME "
            "--keys lists",
            "every key of a config.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Starts a program; the exit code."""
    words = [*(sys.argv if argv is None else argv)]
    name = words[1] if len(words) > 1 else "--help"
    if name in ("--help", "-h", "-help", "help"):
        print(usage())
        return 0
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, 1)
        hint = f"did you mean {close[0]}?" if close else ", ".join(PROGRAMS)
        print(f"error: triform {name}: no such program; {hint}", file=sys.stderr)
        return 1
    module = importlib.import_module(PROGRAMS[name][0])
    return module.cli([words[0], *words[2:]], name) or 0


if __name__ == "__main__":
    sys.exit(main())
