"""Runs the benchmarks one after another and prints their results as one table.

    python benchmarks/all.py [--only=steps,decode] [--python=PYTHON] > table.md

Nothing else should run on the machine. A benchmark that
fails is a row with its last line, and the others run on; then this ends with 1. What
each prints is told on standard error. `tokenise.py` and `stores.py` need other programs
and accelerator.py a card: they are started by hand.
"""

import argparse
import os
import platform
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# name: (arguments, how many of the last lines are the result)
RUNS = {
    "start": ("start.py", 12),
    "steps bert": ("steps.py --model=bert", 2),
    "steps translation": ("steps.py --model=translation", 2),
    "steps multi30k": ("steps.py --model=multi30k", 2),
    "steps vit": ("steps.py --model=vit", 2),
    "gpt_step char": ("gpt_step.py --shape=char --rounds=20", 1),
    "gpt_step full": ("gpt_step.py --shape=full --rounds=6", 1),
    "decode small": ("decode.py --model=small", 2),
    "decode gpt2": ("decode.py --model=gpt2 --rounds=3", 2),
    "decode sample": ("decode.py --model=small --method=sample", 2),
    "decode translation": ("decode.py --model=translation", 2),
    "pipeline": ("pipeline.py", 4),
    "lora": ("lora.py", 3),
    "memory": ("memory.py", 7),
    "packed_sweep": ("packed_sweep.py --rounds=1 --steps=200", 2),
    "attention": ("attention.py --lengths=1024,4096,16384 --rounds=1", 12),
}


def processor() -> str:
    """Its name, cores, and whether it has AVX-512."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            text = f.read()
    except OSError:
        return platform.processor()
    names = [x.partition(":")[2] for x in text.splitlines() if "model name" in x]
    wide = "with" if "avx512f" in text else "without"
    return f"{len(names)} x{names[0] if names else '?'}, {wide} AVX-512"


def main() -> None:
    """Prints the table; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names begin with one of these")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    print(f"{processor()}, {time.strftime('%d %B %Y')}\n")
    print("| command | result | minutes | load before |\n|---|---|---|---|", flush=True)
    failed = False
    for name, (command, count) in RUNS.items():
        if not name.startswith(wanted):
            continue
        load, start = os.getloadavg()[0], time.monotonic()
        script, *given = command.split()
        done = subprocess.run(
            [args.python, os.path.join(HERE, script), *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout, file=sys.stderr, flush=True)
        lines = [x for x in done.stdout.splitlines() if x.strip()] or [""]
        if done.returncode:
            failed, count = True, 1
            lines.append(f"ended with {done.returncode}: {lines[-1]}")
        told = "<br>".join(x.replace("|", "\\|").strip() for x in lines[-count:])
        minutes = (time.monotonic() - start) / 60
        print(f"| `{command}` | {told} | {minutes:.1f} | {load:.1f} |", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
