"""Trains one experiment; started again with the same workdir, resumes it.

    python train.py --config=configs/NAME.py[:variant] --workdir=DIR
        [--config.any.key=value] [--dry_run]

Exit codes: 0 finished, 1 an error that one line explains, 75 interrupted (SIGTERM,
Ctrl-C) after saving: start the same command again.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from triform import cli, tokenizer
from triform.configs import base
from triform.configs.base import ExperimentConfig
from triform.evaluate import Evaluator, summary, write_samples
from triform.experiment import (
    Experiment,
    TrainState,
    checkpoint_dir,
    saved_config,
)
from triform.input_pipeline import (
    Batches,
    Prefetch,
    TrainBatches,
    build_tokenizer,
    report,
    token_store,
)
from triform.progress import Progress
from triform.runtime import metrics
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.metrics import MetricWriter
from triform.runtime.partition import parameter_table
from triform.tokenizer import Tokenizer

INTERRUPTED = 75  # EX_TEMPFAIL: try again
# What a workdir's parameters and step numbers mean: never changed on resuming.
FIXED = (
    "model.",
    "task.type",
    "data.source",
    "data.inputs",
    "data.targets",
    "data.tok",
)
FREE = ("model.trunk.remat", "model.trunk.dropout", "model.trunk.attention_dropout")


def print_plan(experiment: Experiment) -> None:
    """Devices, placement, parameters and tokens a step, from abstract shapes."""
    config = experiment.config
    devices = jax.devices()
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"devices: {len(devices)} x {devices[0].device_kind}{processes}")
    print(f"placement: {experiment.placement.describe()}")
    params = jax.eval_shape(experiment.make_state).params
    print("parameters:")
    print(parameter_table(params, experiment.placement))
    for length in config.data.lengths():
        rows = config.data.rows(length)
        print(
            f"batch: {rows} rows x {length} source and {length} target places = "
            f"{2 * rows * length:,} places, {config.optim.accumulate} micro-batches"
        )
    print(f"steps: {config.steps:,}, optimiser {config.optim.name}")


def print_first_batch(batch: dict[str, np.ndarray], tok: Tokenizer) -> None:
    """One decoded example, and the targets with their loss weights."""
    targets, weights = batch["targets"][0], batch["weights"][0]
    print("first batch:")
    print(f"  source   {tok.decode(batch['encoder_inputs'][0])}")
    print(f"  target   {tok.decode(targets)}")
    shown = [f"{t}:{w:g}" for t, w in zip(targets, weights, strict=True)]
    print(f"  id:weight  {' '.join(shown[:16])}{' ...' if len(shown) > 16 else ''}")


def check_workdir(workdir: str, config: ExperimentConfig) -> None:
    """On resuming prints what differs, and refuses what may not."""
    old = saved_config(workdir)
    if old is None:
        # A start that failed before it had a config may have left its tokenizer.
        if path := tokenizer.find(workdir):
            os.remove(path)
        return
    changed = base.differences(old, config)
    for name, (before, after) in changed.items():
        print(f"config: {name} was {before!r}, is now {after!r}")
    for name, (before, after) in changed.items():
        if name == "seed" or (name.startswith(FIXED) and name not in FREE):
            raise cli.UserError(
                f"workdir={workdir!r}: it belongs to another experiment ({name} is "
                f"{before!r} there, {after!r} here); name another workdir or change it "
                "back"
            )


def write_config(workdir: str, config: ExperimentConfig) -> None:
    """config.json: written once everything that can be wrong with it was tried."""
    path = os.path.join(workdir, "config.json")
    with open(path + ".tmp", "w") as f:
        f.write(base.to_json(config))
    os.replace(path + ".tmp", path)


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and leave."""

    def __init__(self) -> None:
        self.requested = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = signal.Signals(number).name
        print(f"\n{self.requested}: saving before leaving", file=sys.stderr)
        # A second one ends the process as usual.
        signal.signal(number, signal.SIG_DFL)


def batches_from(
    train: TrainBatches, experiment: Experiment, first: int
) -> Iterator[tuple[Any, int, int]]:
    """(batch on the devices, row length, real tokens) of the steps from `first` on."""
    for step in range(first, experiment.config.steps):
        length, ids = train.ids(step)
        batch = train.batches.collate(length, ids)
        tokens = int(
            (batch["encoder_segments"] > 0).sum() + (batch["weights"] > 0).sum()
        )
        yield experiment.put(batch), length, tokens


def check_finite(scalars: dict[str, float], step: int, train: TrainBatches) -> None:
    """Stops on a loss or gradient that is not finite, naming step and examples."""
    for name in ("train/loss", "train/grad_norm"):
        if not np.isfinite(scalars[name]):
            _, ids = train.ids(step - 1)
            shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
            raise cli.UserError(
                f"step {step}: {name} is {scalars[name]} on examples {shown} of "
                f"{train.batches.split}; nothing was saved since. Lower "
                "optim.learning_rate, set optim.clip_norm=1 or lengthen "
                "optim.warmup_steps, and start again from the last checkpoint"
            )


def compile_steps(
    experiment: Experiment, train: TrainBatches, state: TrainState
) -> dict[int, Any]:
    """The train step compiled for every row length, before the first step."""
    compiled = {}
    for length in train.shapes():
        start = time.perf_counter()
        batch = experiment.put(train.batches.collate(length, train.buckets[length][:1]))
        compiled[length] = experiment.placement.compile_train(
            experiment.train_step, state, batch
        )
        took = time.perf_counter() - start
        print(f"compiled the step for rows of {length} in {took:.1f} s", flush=True)
    return compiled


def train_loop(
    experiment: Experiment,
    train: TrainBatches,
    evaluator: Evaluator,
    state: TrainState,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    workdir: str,
    window: dict,
) -> TrainState | None:
    """Steps until config.steps; None if interrupted (the state is then saved)."""
    config = experiment.config
    interrupt = Interrupt()
    steps = compile_steps(experiment, train, state)
    start = int(experiment.placement.unload(state).step)
    progress = Progress(
        start, config.steps, config.log_every, experiment.schedule, window
    )
    source = Prefetch(batches_from(train, experiment, start), config.data.prefetch)
    pending = None

    def settle() -> None:
        """Reads the metrics of the step before: never waits for the one in flight."""
        if pending is not None:
            number, measured, tokens = pending
            measured = metrics.to_host(measured)
            check_finite(metrics.values(measured, "train"), number, train)
            if line := progress.update(number, measured, tokens):
                writer.write(number, line)

    def evaluate(number: int) -> dict[str, float] | None:
        params = experiment.evaluation_params(state)
        limit = config.evaluation.examples
        result = evaluator(params, "eval", limit, lambda: interrupt.requested)
        if result is None:
            return None
        writer.write(number, result.scalars)
        write_samples(workdir, f"step_{number:08d}", result.samples)
        print(f"step {number}: {summary(result)} ({result.seconds:.0f} s)", flush=True)
        return result.numbers()

    try:
        # An evaluation that was interrupted is made up for.
        missed = start and start % config.evaluation.every == 0
        if missed and not checkpointer.metrics_of(start):
            evaluate(start)
        for step in range(start + 1, config.steps + 1):
            with progress.waiting():
                batch, length, tokens = next(source)
            state, measured = steps[length](state, batch)
            settle()
            pending = (step, measured, tokens)
            last = step == config.steps
            due = step % config.evaluation.every == 0 or last
            if not (interrupt.requested or due or step % config.checkpoint.every == 0):
                continue
            settle()
            pending = None
            with progress.paused():
                scores = evaluate(step) if due and not interrupt.requested else None
                meta = {
                    "config": base.to_json(config),
                    # Batch t is a function of (seed, t): this is the whole position.
                    "data": {"seed": config.seed, "step": step},
                    "window": progress.saved_window(),
                }
                saved = experiment.placement.unload(state)
                wait = last or bool(interrupt.requested)
                checkpointer.save(step, saved, meta=meta, metrics=scores, wait=wait)
            if interrupt.requested:
                checkpointer.wait()
                print(f"{interrupt.requested}: step {step} is saved", file=sys.stderr)
                return None
    finally:
        source.close()
        progress.close()
    return state


def finish(
    experiment: Experiment,
    tok: Tokenizer,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    workdir: str,
) -> None:
    """Scores the test split with the best or averaged parameters; says what is next."""
    config = experiment.config
    average = config.evaluation.average
    params, which = experiment.load_params(
        checkpointer, f"average:{average}" if average else "best"
    )
    result = Evaluator(experiment, tok, config.data.test_split)(params, "test")
    writer.write(config.steps, result.scalars | {"test/checkpoint": which})
    write_samples(workdir, "test", result.samples)
    print(f"\n{result.samples}\ntest ({which}): {summary(result)}")
    shown = os.path.relpath(workdir)
    print(
        f"finished: {config.steps} steps in {shown}. Next:\n"
        f'  python generate.py --workdir={shown} --input="..."\n'
        f"  python evaluate.py --workdir={shown} --split={config.data.test_split}\n"
        f"  tensorboard --logdir={shown}\n"
        f"  python train.py ... --config.steps={2 * config.steps}   to go on"
    )


def main(argv: list[str]) -> int:
    """config -> mesh -> data -> state -> loop -> eval -> save."""
    config, workdir = cli.config_flag(), os.path.abspath(flags.FLAGS.workdir)
    experiment = Experiment(config)
    if flags.FLAGS.dry_run:
        print_plan(experiment)
        return 0
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise cli.UserError(f"workdir={workdir!r}: {error.strerror}") from error
    check_workdir(workdir, config)
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        done = checkpointer.latest()
        if done is not None and done >= config.steps:
            print(
                f"{workdir}: finished, {done} steps done; raise --config.steps to go on"
            )
            return 0
        print_plan(experiment)
        tok = build_tokenizer(config.data, config.model.vocab_size, workdir)
        store = token_store(config.data, config.data.train_split, tok)
        name, vocab = config.data.train_split, config.model.vocab_size
        train = TrainBatches(Batches(config.data, store, name, vocab), config.seed)
        evaluator = Evaluator(experiment, tok, config.data.eval_split)
        print(report(train))
        print_first_batch(train[0], tok)
        restored = checkpointer.restore(experiment.abstract_state())
        if restored is None:
            done, window = 0, {}
            state = experiment.placement.init(experiment.make_state)
        else:
            saved, meta = restored
            done, window = meta["data"]["step"], meta["window"]
            state = experiment.placement.load(saved)
            print(f"resuming after step {done}")
        write_config(workdir, config)
        writer = MetricWriter(workdir, done)
        try:
            state = train_loop(
                experiment,
                train,
                evaluator,
                state,
                checkpointer,
                writer,
                workdir,
                window,
            )
            if state is None:
                return INTERRUPTED
            finish(experiment, tok, checkpointer, writer, workdir)
        finally:
            writer.close()
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:variant]")
    flags.DEFINE_string("workdir", None, "Where everything of this run is kept.")
    flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.launch(main)
