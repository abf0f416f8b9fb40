"""Trains one experiment; started again with the same workdir, resumes it.

    python train.py --config=configs/NAME.py[:variant] --workdir=DIR
        [--config.any.key=value] [--dry_run]

Exit codes: 0 finished, 1 an error that one line explains, 75 interrupted (SIGTERM,
Ctrl-C) after saving: start the same command again. From Python: `run(config, workdir)`.
"""

import contextlib
import copy
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.data.codecs import Codec
from triform.data.codecs import files as codec_files
from triform.evaluate import Evaluator, summary, write_samples
from triform.experiment import Experiment, TrainState
from triform.input_pipeline import Prefetch, Split, TrainBatches, report
from triform.runtime import launch, metrics, paths
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.metrics import MetricWriter
from triform.runtime.partition import parameter_table
from triform.runtime.progress import Progress

INTERRUPTED = 75  # EX_TEMPFAIL: try again
Stop = Callable[[], str]  # why to save and leave, '' to go on


def print_plan(experiment: Experiment) -> None:
    """Devices, placement, parameters and batches, from abstract shapes."""
    config = experiment.config
    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind}")
    print(f"placement: {experiment.placement.describe()}")
    state = jax.eval_shape(experiment.make_state)
    print("parameters:")
    print(parameter_table(state.params, experiment.placement))
    if jax.tree.leaves(state.frozen):
        print("frozen parameters:")
        print(parameter_table(state.frozen, experiment.placement))
    k = config.optim.accumulate
    for shape in config.data.shapes():
        batch = experiment.empty_batch(shape)
        arrays = ", ".join(f"{k} {list(x.shape)}" for k, x in batch.items())
        print(f"batch: {arrays}, in {k} micro-batches")
    if experiment.task.couples_rows and k > 1:
        print("a term compares rows with one another: with those of a micro-batch only")
    print(f"steps: {config.steps:,}, optimiser {config.optim.name}")


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and leave.

    Until `listening` there is nothing to save: signals end the process at once.
    """

    def __init__(self) -> None:
        self.requested = ""  # the signal's name
        self.listening = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def __call__(self) -> str:
        """The signal's name, '' before one came."""
        return self.requested

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
    """(batch on the devices, index of its shape, real units) from step `first` on."""
    for step in range(first, experiment.config.steps):
        index, _ = train.ids(step)
        batch = train[step]
        yield experiment.put(batch), index, train.batches.real(batch)


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
    """The train step compiled for every shape of a batch, before the first step."""
    compiled, shapes = {}, experiment.config.data.shapes()
    for index in train.shapes():
        start = time.perf_counter()
        batch = experiment.put(experiment.empty_batch(shapes[index]))
        compiled[index] = experiment.placement.compile_train(
            experiment.train_step, state, batch
        )
        took = time.perf_counter() - start
        axes = ", ".join(f"{k}={n}" for k, n in shapes[index].items())
        print(f"compiled the step for {axes or 'rows'} in {took:.1f} s", flush=True)
    return compiled


def train_loop(
    experiment: Experiment,
    train: TrainBatches,
    state: TrainState,
    meta: dict[str, Any],
    evaluate: Callable[[TrainState, int], None],
    checkpointer: Checkpointer,
    writer: MetricWriter,
    stop: Stop,
) -> TrainState:
    """Steps until config.steps or `stop()`; the last state is saved."""
    config, start = experiment.config, meta["data"]["step"]
    steps = compile_steps(experiment, train, state)
    unit = train.batches.dataset.unit
    progress = Progress(
        start,
        config.steps,
        config.log_every,
        experiment.schedule,
        meta["window"],
        unit,
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
                batch, index, real = next(source)
            state, measured = steps[index](state, batch)
            settle()
            pending = (step, measured, real)
            due = evaluation_due(config, step)
            if not (stop() or due or step % config.checkpoint.every == 0):
                continue
            settle()
            pending = None
            with progress.paused():
                # Batch t is a function of (seed, t): the step is the whole position.
                meta["data"]["step"] = step
                meta["window"] = progress.saved_window()
                saved = experiment.placement.unload(state).replace(frozen={})
                checkpointer.save(step, saved, meta=meta)
                if due:
                    evaluate(state, step)
            if stop():
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
    stop: Stop,
) -> dict[str, Any]:
    """Scores the test split with the best or averaged parameters; says what is next."""
    config = experiment.config
    average = config.evaluation.average
    chosen = f"average:{average}" if average else "best"
    loaded = workdirs.load_variables(experiment, checkpointer, chosen)
    variables, trained, which = loaded
    result = evaluator(variables, trained, test, "test", stop=stop)
    if result is None:
        return {}
    step = checkpointer.latest()
    scores = result.scalars | {"test/checkpoint": which}
    writer.write(step, scores)
    if result.samples:
        write_samples(workdir, "test", result.samples)
        print(f"\n{result.samples}")
    print(f"test ({which}): {summary(result)}")
    shown = shlex.quote(os.path.relpath(workdir))
    python = shlex.quote(os.path.relpath(sys.executable))
    print(f"finished: {step} steps in {shown}. Next:")
    flag = f"--checkpoint={chosen}"
    if config.model.generates():
        print(f'  {python} generate.py --workdir={shown} {flag} --input="..."')
    print(
        f"  {python} evaluate.py --workdir={shown} {flag} "
        f"--split={shlex.quote(test.name)}\n"
        f"  {python} -m tensorboard.main --logdir={shown}\n"
        f"  {python} train.py ... --config.steps={2 * step}   to go on"
    )
    return scores


def find_codecs(config: ExperimentConfig, workdir: str) -> Mapping[str, Codec]:
    """The workdir's; else built, with the tokenizer of init_from if none is named."""
    data = config.data
    source, rules = "", workdirs.init_rules(config)
    if workdirs.saved_config(workdir) is not None:
        saved = codec_files.load(workdir, data)
        if codec_files.is_complete(saved, data):
            return saved
        source = workdir  # imported weights: their classes have no names yet
    elif rules:
        source = workdirs.parse(rules[0].source)[0]
    return codec_files.build(data, config.model.sizes(), earlier=source)


def restore_or_init(
    experiment: Experiment, train: TrainBatches, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The newest intact state, or a new one, placed; and what is saved beside it."""
    config = experiment.config
    data = {"seed": config.seed, "tokens": train.batches.dataset.digest}
    rules, restored = workdirs.init_rules(config), None
    if workdirs.is_imported(checkpointer):
        rules = (schema.InitRule(f"{checkpointer.directory.parent}:0"),)
    else:
        restored = workdirs.restore(experiment, checkpointer)
    if restored is None:
        meta = {"data": data | {"step": 0}, "window": {}}
        if rules:
            state, found = workdirs.start(experiment, rules)
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


def resolve(
    config: ExperimentConfig, workdir: str = ""
) -> tuple[ExperimentConfig, Mapping[str, Codec] | None]:
    """(the config with what follows from the data filled in, codecs if it needed them).

    Only numbers of classes that the config leaves to the data need the data.
    """
    if not config.needs_classes():
        return config.resolved(), None
    codecs = find_codecs(config, workdir)
    return config.resolved(codec_files.class_counts(config.data, codecs)), codecs


def run(
    config: ExperimentConfig, workdir: str, *, stop: Stop = lambda: ""
) -> dict[str, Any]:
    """Trains, or resumes, in `workdir`; returns the test scores by name.

    `stop` is asked after every step; once it returns a reason, the state is saved and
    {} is returned. Raises TriformError for what a user can mend.
    """
    config, workdir = copy.deepcopy(config), paths.absolute(workdir)
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: train.py runs on one host")
    config, codecs = resolve(config, workdir)
    experiment = Experiment(config)
    os.makedirs(workdir, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.lock(workdir))
        workdirs.check_config(workdir, config)
        directory = workdirs.checkpoint_dir(workdir)
        checkpointer = stack.enter_context(Checkpointer(directory, config.checkpoint))
        done = checkpointer.latest() or 0
        if done >= config.steps and (scores := workdirs.tested(workdir, done)):
            print(f"{workdir}: finished, {done} steps; raise --config.steps to go on")
            return scores
        print_plan(experiment)
        codecs = codecs or find_codecs(config, workdir)
        splits = open_splits(experiment, codecs)
        state, meta = restore_or_init(experiment, splits[0], checkpointer)
        workdirs.claim(workdir, config, codecs)
        workdirs.save_frozen(workdir, experiment.placement.unload(state))
        writer = MetricWriter(workdir, meta["data"]["step"])
        stack.enter_context(contextlib.closing(writer))
        evaluator = Evaluator(experiment, codecs)
        return _train_and_test(
            experiment, splits, state, meta, evaluator, checkpointer, writer, stop
        )


def open_splits(
    experiment: Experiment, codecs: Mapping[str, Codec]
) -> tuple[TrainBatches, dict[str, tuple[Split, int, tuple[str, ...]]], Split]:
    """(training batches, what is evaluated by prefix, test split).

    Each evaluation is (split, number of examples to generate for, names of scores).
    """
    config, sizes = experiment.config, experiment.sizes
    train = Split.open(config.data, codecs, config.data.train_split, sizes)
    batches = TrainBatches(train.batches, config.seed)
    first = Split.open(config.data, codecs, config.data.eval_split, sizes)
    main = config.evaluation
    evaluated = {"eval": (first, main.examples, main.metrics)}
    for other in config.evaluations:
        data = copy.deepcopy(config.data)
        data.source = other.source or data.source
        split = Split.open(data, codecs, other.split, sizes)
        evaluated[other.name] = (split, other.examples, other.scores)
    test = Split.open(config.data, codecs, config.data.test_split, sizes)
    print(report(batches))
    print(f"first batch:\n{train.dataset.preview(batches[0])}")
    return batches, evaluated, test


def _train_and_test(
    experiment: Experiment,
    splits: tuple[TrainBatches, dict[str, tuple[Split, int, tuple[str, ...]]], Split],
    state: TrainState,
    meta: dict[str, Any],
    evaluator: Evaluator,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    stop: Stop,
) -> dict[str, Any]:
    config, (train, evaluated, test) = experiment.config, splits
    workdir = str(checkpointer.directory.parent)

    def evaluate(state: TrainState, step: int) -> None:
        variables, numbers = experiment.evaluation_variables(state), {}
        for prefix, (split, limit, names) in evaluated.items():
            result = evaluator(variables, step, split, prefix, limit, stop, names=names)
            if result is None:
                return
            writer.write(step, result.scalars)
            numbers |= result.numbers()
            if result.samples:
                name = f"step_{step:08d}"
                name = name if prefix == "eval" else f"{name}_{prefix}"
                write_samples(workdir, name, result.samples)
            seconds = f"({result.seconds:.0f} s)"
            print(f"step {step}: {summary(result)} {seconds}", flush=True)
        checkpointer.record(step, numbers)

    if isinstance(stop, Interrupt):
        stop.listening = True
    step = meta["data"]["step"]
    if evaluation_due(config, step) and not checkpointer.metrics_of(step):
        evaluate(state, step)  # the one that was interrupted
    if step < config.steps and not stop():
        state = train_loop(
            experiment,
            train,
            state,
            meta,
            evaluate,
            checkpointer,
            writer,
            stop,
        )
    if stop():
        return {}
    return finish(experiment, evaluator, test, checkpointer, writer, workdir, stop)


def main(argv: list[str]) -> int:
    """Reads the flags, trains; the exit code."""
    config = launch.config_flag()
    if flags.FLAGS.dry_run:
        print_plan(Experiment(resolve(config)[0]))
        return 0
    workdir = launch.folder_flag("workdir")
    interrupt = Interrupt()
    run(config, workdir, stop=interrupt)
    if interrupt.requested:
        with Checkpointer(
            workdirs.checkpoint_dir(workdir), config.checkpoint
        ) as checkpointer:
            saved = checkpointer.latest()
        print(f"{interrupt.requested}: step {saved} is saved", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:variant]")
    flags.DEFINE_string("workdir", None, "Where all of this run is kept.")
    flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
    flags.mark_flag_as_required("config")
    launch.launch(main)
