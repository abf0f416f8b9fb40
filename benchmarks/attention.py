"""Time and memory of the attention algorithms over lengths, with a table and a plot.

    pip install -c constraints.txt -e '.[benchmarks]'
    python benchmarks/attention.py [--out=DIR] [--lengths=256,512,...]

One causal row of 6 heads of 64, one layer's attention alone, forward and forward with
backward. Memory is that of the compiled program's temporaries; a case that needs more
than --limit_gb is compiled and not run. Steps of all algorithms are timed in turns, and
what counts are ratios: machines are noisy. Results: benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from triform.models.algorithms import ALGORITHMS
from triform.models.mask import Mask
from triform.runtime import host

HEADS, WIDTH, WINDOW, FEATURES = 6, 64, 512, 256
NAMES = {
    "dot": {},
    "flash": {},
    "local": {},
    "performer": {"features": FEATURES},
}
# Colours that readers with any colour vision can tell apart (Okabe and Ito 2008).
COLOURS = {
    "dot": "#000000",
    "flash": "#0072B2",
    "local": "#D55E00",
    "performer": "#009E73",
}


def compiled(name: str, length: int, dtype: str, backward: bool):
    """The compiled attention of one row of `length`, and its operands."""
    rng = np.random.default_rng(0)
    shape = (4, 1, length, HEADS, WIDTH)
    arrays = [jnp.asarray(x, dtype) for x in rng.standard_normal(shape, np.float32)]

    def run(q, k, v, grad):
        where = jnp.arange(length, dtype=jnp.int32)[None]
        window = WINDOW if name == "local" else 0
        mask = Mask.self_attention(where, causal=True, window=window, aligned=True)

        def attend(q, k, v):
            options = NAMES[name] | {"scale": WIDTH**-0.5}
            return ALGORITHMS[name](q, k, v, mask, **options)

        if not backward:
            return attend(q, k, v)
        out, back = jax.vjp(attend, q, k, v)
        return out, back(grad)

    return jax.jit(run).lower(*arrays).compile(), arrays


def measure(names, length: int, args, backward: bool) -> list[dict]:
    """One row an algorithm: milliseconds (None: not run) and bytes."""
    programs = {n: compiled(n, length, args.dtype, backward) for n in names}
    sizes = {
        n: p.memory_analysis().temp_size_in_bytes for n, (p, _) in programs.items()
    }
    times: dict[str, list[float]] = {n: [] for n in names}
    for turn in range(args.rounds + 1):
        for name, (program, arrays) in programs.items():
            if sizes[name] > args.limit_gb * 1e9:
                continue
            start = time.perf_counter()
            count = 0
            while not count or time.perf_counter() - start < args.seconds:
                jax.block_until_ready(program(*arrays))
                count += 1
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start) / count)
    return [
        {
            "algorithm": name,
            "length": length,
            "backward": backward,
            "ms": statistics.median(times[name]) if times[name] else None,
            "bytes": sizes[name],
        }
        for name in names
    ]


def table(rows: list[dict]) -> str:
    """A line a length and direction: milliseconds and MB of every algorithm."""
    names = list(dict.fromkeys(r["algorithm"] for r in rows))
    lines = ["length  pass      " + "".join(f"{n:>24}" for n in names)]
    for key in dict.fromkeys((r["length"], r["backward"]) for r in rows):
        cells = ""
        for row in rows:
            if (row["length"], row["backward"]) == key:
                took = "-" if row["ms"] is None else f"{row['ms']:.1f} ms"
                cells += f"{took:>12}{row['bytes'] / 1e6:9.1f} MB"
        lines.append(f"{key[0]:6}  {'both' if key[1] else 'forward':8}  {cells}")
    return "\n".join(lines)


def crossovers(rows: list[dict]) -> list[str]:
    """From which of the lengths on each is faster than `dot` (or than `flash`)."""
    known = {(r["algorithm"], r["length"], r["backward"]): r["ms"] for r in rows}
    lengths = sorted({r["length"] for r in rows})
    found = []
    for name, other in (("flash", "dot"), ("local", "flash"), ("performer", "flash")):
        for backward in (False, True):
            both = [
                (n, known.get((name, n, backward)), known.get((other, n, backward)))
                for n in lengths
            ]
            both = [(n, a, b) for n, a, b in both if a and b]
            slower = [n for n, a, b in both if a >= b]
            faster = [n for n, a, b in both if n > max(slower, default=0)]
            where = f"from {faster[0]:,} on" if faster else "at no length measured"
            what = "forward and backward" if backward else "forward"
            found.append(f"{name} is faster than {other} {where} ({what})")
    return found


def plot(rows: list[dict], title: str, path: str) -> None:
    """Time and memory over lengths, both passes, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    for column, backward in enumerate((False, True)):
        for line, (key, label) in enumerate(
            (("ms", "milliseconds"), ("bytes", "MB of temporaries"))
        ):
            axis = axes[line][column]
            for name in NAMES:
                points = [
                    (r["length"], r[key] / (1e6 if key == "bytes" else 1))
                    for r in rows
                    if (r["algorithm"], r["backward"]) == (name, backward) and r[key]
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), "o-", c=COLOURS[name], label=name
                    )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0][column].set_title("forward and backward" if backward else "forward")
        axes[1][column].set_xlabel("length")
    axes[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/benchmarks")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--algorithms", default=",".join(NAMES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2, help="a round's least")
    parser.add_argument("--limit_gb", type=float, default=6.0)
    args = parser.parse_args()
    host.prepare()
    rows: list[dict] = []
    names = args.algorithms.split(",")
    kind = jax.devices()[0].device_kind
    for length in map(int, args.lengths.split(",")):
        for backward in (False, True):
            found = measure(names, length, args, backward)
            rows += found
            print(table(found).splitlines()[-1], flush=True)
    lines = crossovers(rows)
    print("\n" + table(rows) + "\n\n" + "\n".join(lines))
    os.makedirs(args.out, exist_ok=True)
    title = f"Attention of {HEADS} heads of {WIDTH}, causal, {args.dtype}, {kind}"
    with open(os.path.join(args.out, "attention.json"), "w") as f:
        json.dump({"title": title, "rows": rows, "crossovers": lines}, f, indent=1)
    plot(rows, title, os.path.join(args.out, "attention.png"))
    print(f"saved in {args.out}: attention.json, attention.png")


if __name__ == "__main__":
    main()
