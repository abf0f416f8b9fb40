"""Trains one experiment; started again with the same workdir, resumes it.

    python train.py --config=configs/NAME.py[:variant] --workdir=DIR
        [--config.any.key=value] [--dry_run]

Exit codes: 0 finished, 1 an error that one line explains, 75 interrupted (SIGTERM,
Ctrl-C) after saving: start the same command again.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.data import datasets
from triform.data.codecs.text import Tokenizer
from triform.data.store import build_tokenizer, load_tokenizer
from triform.evaluate import Evaluator, Split, summary, write_samples
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
    report,
)
from triform.runtime import launch, metrics
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.metrics import MetricWriter
from triform.runtime.partition import parameter_table
from triform.runtime.progress import Progress

INTERRUPTED = 75  # EX_TEMPFAIL: try again
# What a workdir's parameters and step numbers mean: never changed on resuming.
FIXED = (
    "model.",
    "task.type",
    "data.type",
    "data.source",
    "data.train_split",
    "data.tok",
    "optim.name",
    "optim.ema_decay",
)
FREE = (
    "model.trunk.remat",
    "model.trunk.dropout",
    "model.trunk.attention_dropout",
    "data.tokenizer.path",  # the workdir has a copy
)


def print_plan(experiment: Experiment) -> None:
    """Devices, placement, parameters and tokens a step, from abstract shapes."""
    config = experiment.config
    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind}")
    print(f"placement: {experiment.placement.describe()}")
    params = jax.eval_shape(experiment.make_state).params
    print("parameters:")
    print(parameter_table(params, experiment.placement))
    for length in config.data.lengths():
        rows = config.data.rows(length)
        batch = experiment.empty_batch(rows, length)
        arrays = ", ".join(f"{k} {list(x.shape)}" for k, x in batch.items())
        print(f"batch: {arrays}, in {config.optim.accumulate} micro-batches")
    print(f"steps: {config.steps:,}, optimiser {config.optim.name}")


def check_workdir(workdir: str, config: ExperimentConfig) -> None:
    """On resuming prints what differs, and refuses what may not."""
    old = saved_config(workdir)
    changed = schema.differences(old, config) if old is not None else {}
    for name, (before, after) in changed.items():
        print(f"config: {name} was {before!r}, is now {after!r}")
    for name, (before, after) in changed.items():
        if name == "seed" or (name.startswith(FIXED) and name not in FREE):
            raise UserError(
                f"workdir={workdir!r}: it belongs to another experiment ({name} is "
                f"{before!r} there, {after!r} here); name another workdir or change it "
                "back"
            )


def claim_workdir(
    workdir: str, config: ExperimentConfig, tok: Tokenizer | None
) -> None:
    """Writes tokenizer and config.json, once what can be wrong with them was tried."""
    if tok is not None:
        tok.save(workdir)
    path = os.path.join(workdir, "config.json")
    with open(path + ".tmp", "w") as f:
        f.write(schema.to_json(config))
    os.replace(path + ".tmp", path)


def lock(workdir: str) -> Any:
    """Held until the process ends: two runs in one workdir would mix their files."""
    file = open(os.path.join(workdir, ".lock"), "w")  # noqa: SIM115  (kept open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"workdir={workdir!r}: another train.py runs in it; wait for it, stop it, "
            "or name another workdir"
        ) from error
    return file


def tested(workdir: str, step: int) -> bool:
    """Has the test split been scored after this step?"""
    lines = metrics.read_lines(workdir)
    return any(x["step"] == step and "test/loss" in x for x in lines)


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and leave.

    Until `listening` there is nothing to save: they end the process at once.
    """

    def __init__(self) -> None:
        self.requested = ""  # the signal's name
        self.listening = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = signal.Signals(number).name
        # Not print or raise: the signal may have arrived inside one, or inside XLA.
        if not self.listening:
            os.write(2, f"\n{self.requested} before the first step\n".encode())
            os._exit(INTERRUPTED)
        os.write(2, f"\n{self.requested}: saving before leaving\n".encode())
        # A second one ends the process as usual.
        signal.signal(number, signal.SIG_DFL)


def batches_from(
    train: TrainBatches, experiment: Experiment, first: int
) -> Iterator[tuple[Any, int, int]]:
    """(batch on the devices, row length, real units) of the steps from `first` on."""
    for step in range(first, experiment.config.steps):
        length, _ = train.ids(step)
        batch = train[step]
        yield experiment.put(batch), length, train.batches.dataset.real(batch)


def check_finite(scalars: dict[str, float], step: int, train: TrainBatches) -> None:
    """Stops on a loss or gradient that is not finite, naming step and examples."""
    for name in ("train/loss", "train/grad_norm"):
        if not np.isfinite(scalars[name]):
            _, ids = train.ids(step - 1)
            shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
            raise UserError(
                f"step {step}: {name} is {scalars[name]} on examples {shown} of "
                f"{train.batches.dataset.split}; nothing was saved since. Lower "
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
        rows = experiment.config.data.rows(length)
        batch = experiment.put(experiment.empty_batch(rows, length))
        compiled[length] = experiment.placement.compile_train(
            experiment.train_step, state, batch
        )
        took = time.perf_counter() - start
        rows = f" for rows of {length}" if length else ""
        print(f"compiled the step{rows} in {took:.1f} s", flush=True)
    return compiled


def train_loop(
    experiment: Experiment,
    train: TrainBatches,
    state: TrainState,
    meta: dict[str, Any],
    evaluate: Callable[[TrainState, int], None],
    checkpointer: Checkpointer,
    writer: MetricWriter,
    interrupt: Interrupt,
) -> TrainState:
    """Steps until config.steps or an interruption; the last state is saved."""
    config, start = experiment.config, meta["data"]["step"]
    steps = compile_steps(experiment, train, state)
    progress = Progress(
        start,
        config.steps,
        config.log_every,
        experiment.schedule,
        meta["window"],
        train.batches.dataset.unit,
    )
    source = Prefetch(batches_from(train, experiment, start), config.data.prefetch)
    pending = None

    def settle() -> None:
        """Reads the metrics of the step before: never waits for the one in flight."""
        if pending is not None:
            number, measured, real = pending
            measured = metrics.to_host(measured)
            check_finite(metrics.values(measured, "train"), number, train)
            if line := progress.update(number, measured, real):
                writer.write(number, line)

    try:
        for step in range(start + 1, config.steps + 1):
            with progress.waiting():
                batch, length, real = next(source)
            state, measured = steps[length](state, batch)
            settle()
            pending = (step, measured, real)
            due = evaluation_due(config, step)
            if not (interrupt.requested or due or step % config.checkpoint.every == 0):
                continue
            settle()
            pending = None
            with progress.paused():
                # Batch t is a function of (seed, t): the step is the whole position.
                meta["data"]["step"] = step
                meta["window"] = progress.saved_window()
                saved = experiment.placement.unload(state)
                checkpointer.save(step, saved, meta=meta)
                if due:
                    evaluate(state, step)
            if interrupt.requested:
                break
    finally:
        source.close()
        progress.close()
    checkpointer.wait()
    return state


def evaluation_due(config: ExperimentConfig, step: int) -> bool:
    """Is a run evaluated after this step?"""
    return step > 0 and (step % config.evaluation.every == 0 or step >= config.steps)


def finish(
    experiment: Experiment,
    evaluator: Evaluator,
    test: Split,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    workdir: str,
    interrupt: Interrupt,
) -> None:
    """Scores the test split with the best or averaged parameters; says what is next."""
    config = experiment.config
    average = config.evaluation.average
    params, which = experiment.load_params(
        checkpointer, f"average:{average}" if average else "best"
    )
    result = evaluator(params, test, "test", stop=lambda: interrupt.requested)
    if result is None:
        return
    step = checkpointer.latest()
    writer.write(step, result.scalars | {"test/checkpoint": which})
    if result.samples:
        write_samples(workdir, "test", result.samples)
        print(f"\n{result.samples}")
    print(f"test ({which}): {summary(result)}")
    shown = shlex.quote(os.path.relpath(workdir))
    python = shlex.quote(os.path.relpath(sys.executable))
    chosen = f"--checkpoint=average:{average}" if average else "--checkpoint=best"
    print(f"finished: {step} steps in {shown}. Next:")
    if hasattr(experiment.model, "extend"):
        print(f'  {python} generate.py --workdir={shown} {chosen} --input="..."')
    print(
        f"  {python} evaluate.py --workdir={shown} {chosen} "
        f"--split={shlex.quote(test.name)}\n"
        f"  {python} -m tensorboard.main --logdir={shown}\n"
        f"  {python} train.py ... --config.steps={2 * step}   to go on"
    )


def prepare_data(
    config: ExperimentConfig, workdir: str
) -> tuple[Tokenizer | None, TrainBatches, Split, Split]:
    """Tokenizer, training batches, evaluation and test split, checked."""
    tok = find_tokenizer(config, workdir)
    limits = config.model.limits()
    opened = datasets.open(config.data, config.data.train_split, tok, limits)
    train = TrainBatches(Batches(opened), config.seed)
    evaluation = Split.open(config, tok, config.data.eval_split)
    test = Split.open(config, tok, config.data.test_split)
    print(report(train))
    print(f"first batch:\n{opened.preview(train[0], tok)}")
    return tok, train, evaluation, test


def find_tokenizer(config: ExperimentConfig, workdir: str) -> Tokenizer | None:
    """The workdir's; else the one named; else that of init_from; else a new one."""
    data = config.data
    if not datasets.needs_tokenizer(data):
        return None
    if saved_config(workdir) is not None:
        return load_tokenizer(workdir)
    if config.init_from and not data.tokenizer.path:
        return load_tokenizer(workdirs.parse(config.init_from)[0])
    return build_tokenizer(data, config.model.vocab_size)


def restore_or_init(
    experiment: Experiment, train: TrainBatches, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The newest intact state, or a new one, and what is saved beside it."""
    config = experiment.config
    data = {"seed": config.seed, "tokens": train.batches.dataset.digest}
    source = config.init_from
    if imported(checkpointer):
        source = f"{checkpointer.directory.parent}:0"
    restored = None
    if not imported(checkpointer):
        restored = checkpointer.restore(experiment.abstract_state())
    if restored is None:
        meta = {"data": data | {"step": 0}, "window": {}}
        if source:
            state, found = workdirs.start(experiment, source)
            print(found)
        else:
            state = experiment.placement.init(experiment.make_state)
    else:
        saved, meta = restored
        if meta["data"]["tokens"] != data["tokens"]:
            raise UserError(
                f"{checkpointer.directory}: it was trained on other data than today's "
                f"{config.data.source!r} (the corpus, its generator, its features or "
                "the tokenizer changed); restore them or name another workdir"
            )
        if meta["data"]["seed"] != data["seed"]:
            raise UserError(
                f"seed={data['seed']}: it was trained with {meta['data']['seed']}; set "
                "that or name another workdir"
            )
        state = experiment.placement.load(saved)
        print(f"resuming after step {meta['data']['step']}")
    return state, meta | {"config": schema.to_json(config)}


def imported(checkpointer: Checkpointer) -> bool:
    """Does it hold parameters only, which no step of ours has changed?"""
    step = checkpointer.latest()
    return step == 0 and bool(checkpointer.meta_of(0).get("params_only"))


def main(argv: list[str]) -> int:
    """config -> mesh -> data -> state -> loop -> eval -> save."""
    config = launch.config_flag()
    experiment = Experiment(config)
    if flags.FLAGS.dry_run:
        print_plan(experiment)
        return 0
    workdir = launch.folder_flag("workdir")
    interrupt = Interrupt()
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: train.py runs on one host")
    os.makedirs(workdir, exist_ok=True)
    held = lock(workdir)
    check_workdir(workdir, config)
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            Checkpointer(checkpoint_dir(workdir), config.checkpoint)
        )
        done = checkpointer.latest() or 0
        if done >= config.steps and tested(workdir, done):
            print(f"{workdir}: finished, {done} steps; raise --config.steps to go on")
            return 0
        print_plan(experiment)
        tok, train, evaluation, test = prepare_data(config, workdir)
        state, meta = restore_or_init(experiment, train, checkpointer)
        claim_workdir(workdir, config, tok)
        evaluator = Evaluator(experiment, tok)
        writer = stack.enter_context(
            contextlib.closing(MetricWriter(workdir, meta["data"]["step"]))
        )

        def evaluate(state: TrainState, step: int) -> None:
            result = evaluator(
                experiment.evaluation_params(state),
                evaluation,
                "eval",
                config.evaluation.examples,
                lambda: interrupt.requested,
            )
            if result is None:
                return
            writer.write(step, result.scalars)
            if result.samples:
                write_samples(workdir, f"step_{step:08d}", result.samples)
            checkpointer.record(step, result.numbers())
            print(
                f"step {step}: {summary(result)} ({result.seconds:.0f} s)", flush=True
            )

        interrupt.listening = True
        step = meta["data"]["step"]
        if evaluation_due(config, step) and not checkpointer.metrics_of(step):
            evaluate(state, step)  # the one that was interrupted
        if step < config.steps and not interrupt.requested:
            state = train_loop(
                experiment,
                train,
                state,
                meta,
                evaluate,
                checkpointer,
                writer,
                interrupt,
            )
        if not interrupt.requested:
            finish(
                experiment, evaluator, test, checkpointer, writer, workdir, interrupt
            )
        if interrupt.requested:
            saved = checkpointer.latest()
            print(f"{interrupt.requested}: step {saved} is saved", file=sys.stderr)
            return INTERRUPTED
    held.close()
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:variant]")
    flags.DEFINE_string("workdir", None, "Where all of this run is kept.")
    flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
    flags.mark_flag_as_required("config")
    launch.launch(main)
