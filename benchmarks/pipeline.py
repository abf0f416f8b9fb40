"""How fast batches are made, and how fast the training step takes them.

    python benchmarks/pipeline.py [--configs=transformer_cldr,vit_mnist] [--steps=50]

Batches of consecutive steps are made in one thread, as the reader of a run does beside
the device; the step is timed once a shape. The corpora are prepared where runs have
theirs. The ratio is time of steps over time of batches. Results: RESULTS.md.
"""

import argparse
import collections
import statistics
import tempfile
import time

import jax

from triform import config_flag, plan, train
from triform.experiment import Experiment
from triform.runtime import host, metrics

CONFIGS = "transformer_cldr,gpt_shakespeare_char:cpu,vit_mnist,bert_finetune:clinc150"


def seconds_of_steps(experiment: Experiment, shapes: collections.Counter) -> float:
    """Of as many steps of each shape as counted."""
    total, placement = 0.0, experiment.placement
    for index, count in shapes.items():
        state = placement.init(experiment.make_state)
        batch = experiment.empty_batch(experiment.config.data.shapes()[index])
        batch = experiment.put(batch)
        step = placement.compile_train(experiment.train_step, state, batch)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            state, measured = step(state, batch)
            metrics.to_host(measured)["loss"].value()
            times.append(time.perf_counter() - start)
        total += count * statistics.median(times[1:])
    return total


def compare(name: str, steps: int) -> None:
    """Prints a line."""
    config = config_flag.load(name)
    config.steps = steps
    with tempfile.TemporaryDirectory() as workdir:
        config, codecs = train.resolve(config, workdir)
        codecs = codecs or train.find_codecs(config, workdir)
        experiment = Experiment(config)
        batches = plan.Splits.open(experiment, codecs).train
    batches[0]
    start = time.perf_counter()
    for step in range(steps):
        batches[step]
    making = time.perf_counter() - start
    shapes = collections.Counter(batches.ids(step)[0] for step in range(steps))
    taking = seconds_of_steps(experiment, shapes)
    print(
        f"{name}: {1e3 * making / steps:.2f} ms a batch, {1e3 * taking / steps:.2f} ms "
        f"a step; {taking / making:.0f} times as fast",
        flush=True,
    )


def main() -> None:
    """Prints a line a config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    host.prepare()
    print(f"{jax.devices()[0].device_kind}, {args.steps} steps")
    for name in args.configs.split(","):
        compare(name, args.steps)


if __name__ == "__main__":
    main()
