"""Seconds until programs answer, with an empty and with a filled compilation cache.

    python benchmarks/start.py [--config=transformer_cldr:smoke]

For every start: wall-clock seconds and, since a machine may do other things at the same
time, seconds of CPU time (user and system), which then say more. `import jax` is
measured beside them. Nothing outside a temporary folder is read or written.
"""

import argparse
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def measured(words: list[str], env: dict[str, str], code: int = 0) -> tuple:
    """(wall seconds, CPU seconds, output) of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        sys.exit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    cpu = sum(getattr(after, x) - getattr(before, x) for x in ("ru_utime", "ru_stime"))
    return wall, cpu, done.stdout


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="transformer_cldr:smoke")
    parser.add_argument("--input", default="3 May 2024")
    args = parser.parse_args()
    config = f"--config={args.config}"
    print(f"{platform.machine()}, {os.cpu_count()} cores", end="")
    print(f", load {os.getloadavg()[0]:.1f} when it began" * hasattr(os, "getloadavg"))
    with tempfile.TemporaryDirectory() as folder:
        hidden = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
        env = {k: v for k, v in os.environ.items() if k not in hidden}
        env |= {"TRIFORM_CACHE": f"{folder}/cache"}
        again = f"{folder}/again"
        starts = [
            ("import jax", ["-c", "import jax"], 0),
            ("--help", ["train.py", "--help"], 0),
            ("config error", ["train.py", config, "--config.nope=1"], 1),
            ("dry run, cold", ["train.py", config, "--dry_run"], 0),
            ("dry run", ["train.py", config, "--dry_run"], 0),
            ("run, cold", ["train.py", config, f"--workdir={folder}/run"], 0),
            ("run", ["train.py", config, f"--workdir={again}"], 0),
            ("finished", ["train.py", f"--workdir={again}"], 0),
            ("restart", ["train.py", f"--workdir={again}", "--config.steps=8"], 0),
            ("one line, cold", ["generate.py", f"--workdir={again}"], 0),
            ("one line", ["generate.py", f"--workdir={again}"], 0),
        ]
        for name, words, code in starts:
            if words[0] == "generate.py":
                words = [*words, f"--input={args.input}"]
            wall, cpu, text = measured(words, env, code)
            steps = re.findall(r"compiling the step for .*|first step: .*", text)
            print(f"{name:16}{wall:7.1f} s wall{cpu:7.1f} s CPU", *steps, sep="  ")


if __name__ == "__main__":
    main()
