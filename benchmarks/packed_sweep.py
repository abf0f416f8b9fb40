"""Eight small runs trained together, beside the same ones one after another.

    python benchmarks/packed_sweep.py [--runs=8] [--steps=300] [--rounds=2]
        [--layers=2] [--width=32] [--length=32] [--rows=8] [--seeds]

A GPT on CLDR's English phrases, character by character; the runs have different
learning rates, dropouts and weight decays, and with --seeds different seeds, so that
none sees another's batches. Both ways are whole runs in one process, in turns: reading,
compiling (without a cache of programs), steps, two evaluations, two checkpoints and the
test. `whole` is the time of all of that, `steps` the time of the steps alone, of each
run its fastest report of 50 steps. Results: benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time

os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax

from triform import packed, train
from triform.configs.schema import (
    CausalLMConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    LanguageModelConfig,
    OptimConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
)
from triform.runtime import host, metrics

REPORT = 50  # steps


def configured(args: argparse.Namespace, index: int, cache: str) -> ExperimentConfig:
    """One run of the sweep."""
    trunk = TransformerConfig(
        num_layers=args.layers,
        d_model=args.width,
        num_heads=2,
        d_ff=4 * args.width,
        max_len=0,
        positions="learned",
        norm_position="pre",
        dropout=0.05 * (index % 3),
        attention=args.attention,
    )
    return ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=100),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=CausalLMConfig(
            source="cldr",
            text="en",
            max_len=args.length,
            batch_size=args.rows,
            cache_dir=cache,
            tokenizer=TokenizerConfig(kind="chars"),
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3 * 2 ** (index / 4),
            schedule="cosine",
            warmup_steps=20,
            weight_decay=0.01 * (1 + index % 2),
        ),
        evaluation=EvaluationConfig(every=args.steps // 2, metrics=(), examples=64),
        checkpoint=CheckpointConfig(every=args.steps // 2),
        steps=args.steps,
        seed=index if args.seeds else 0,
        log_every=REPORT,
    )


def seconds_of_steps(workdirs: list[str]) -> list[float]:
    """Seconds that the steps of each run take, at its fastest report's pace."""
    found = []
    for workdir in workdirs:
        lines = metrics.read_lines(workdir)
        paces = [
            x["train/steps_per_second"] for x in lines if "train/steps_per_second" in x
        ]
        found.append(max(line["step"] for line in lines) / max(paces))
    return found


def main() -> None:
    """Prints a line per round, and the medians of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        *(("runs", 8), ("steps", 300), ("rounds", 2)),
        *(("layers", 2), ("width", 32), ("length", 32), ("rows", 8)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--attention", default="dot")
    parser.add_argument("--seeds", action="store_true")
    args = parser.parse_args()
    host.prepare()
    jax.config.update("jax_enable_compilation_cache", False)
    wholes, steps = [], []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            configs = [
                configured(args, i, os.path.join(folder, "cache"))
                for i in range(args.runs)
            ]
            # Prepares the data, which both read.
            quiet(lambda c=configs[0], f=folder: train.resolve(c, f))
            spent, stepped = {}, {}
            for way in ("alone", "packed")[:: 1 if number % 2 else -1]:
                places = [os.path.join(folder, f"{way}{i}") for i in range(args.runs)]
                members = [*zip(configs, places, strict=True)]
                start = time.perf_counter()
                if way == "packed":
                    found = quiet(lambda m=members: packed.run(m))
                else:
                    found = [quiet(lambda m=m: train.run(*m)) for m in members]
                spent[way] = time.perf_counter() - start
                assert all(isinstance(x, dict) and x for x in found), found
                each = seconds_of_steps(places)
                stepped[way] = sum(each) if way == "alone" else max(each)
        wholes.append(spent["packed"] / spent["alone"])
        steps.append(stepped["packed"] / stepped["alone"])
        print(
            f"round {number + 1}: whole {spent['packed']:.1f} and "
            f"{spent['alone']:.1f} s ({wholes[-1]:.2f}), steps {stepped['packed']:.2f} "
            f"and {stepped['alone']:.2f} s ({steps[-1]:.2f}), load "
            f"{os.getloadavg()[0]:.1f}",
            flush=True,
        )
    print(
        f"packed / one after another: whole {statistics.median(wholes):.2f}, "
        f"steps {statistics.median(steps):.2f}"
    )


def quiet(call):
    """What a function returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call()


if __name__ == "__main__":
    main()
