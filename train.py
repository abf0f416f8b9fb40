"""Trains one experiment; started again with the same workdir, resumes it.

    python train.py --config=configs/NAME.py[:variant] --workdir=DIR
        [--config.any.key=value] [--dry_run] [--from_step=STEP]
    python train.py --workdir=DIR     goes on with the config that is in DIR

--config takes a file, a name in configs/ (llama:8b) or the workdir of another run;
--keys lists what can be set. `triform train` is the same from any folder.

Exit codes: 0 finished, 1 an error that one line explains, 75 interrupted (SIGTERM,
SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGXCPU) after saving: start the same command
again. From Python: `run(config, workdir)`.
"""

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from triform import config_flag, plan, trained_codecs
from triform import workdir as workdirs
from triform.configs import keys, plugins, schema
from triform.configs.schema import ExperimentConfig
from triform.data.codecs import Codec
from triform.data.codecs import files as codec_files
from triform.evaluate import Evaluator, summary, write_samples
from triform.experiment import Experiment, TrainState
from triform.input_pipeline import Prefetch, TrainBatches
from triform.recovery import Health, go_back
from triform.runtime import commands, history, launch, metrics, paths, signals
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.metrics import MetricWriter
from triform.runtime.progress import SOON, Progress, stage

Stop = Callable[[], str]  # why to save and leave, '' to go on


def batches_from(
    train: TrainBatches, experiment: Experiment, first: int
) -> Iterator[tuple[Any, int, int]]:
    """(batch on the devices, index of its shape, real units) from step `first` on."""
    for step in range(first, experiment.config.steps):
        index, _ = train.ids(step)
        batch = train[step]
        yield experiment.put(batch), index, train.batches.real(batch)


def examples_of(train: TrainBatches, step: int) -> str:
    """'12, 7, 3 of train': the first examples of a step."""
    _, ids = train.ids(step - 1)
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"{shown} of {train.batches.dataset.split}"


def compile_steps(
    experiment: Experiment, train: TrainBatches, state: TrainState
) -> dict[int, Any]:
    """The train step compiled for every shape of a batch, before the first step."""
    compiled, shapes = {}, experiment.config.data.shapes()
    for index in train.shapes():
        axes = ", ".join(f"{k}={n}" for k, n in shapes[index].items())
        batch = experiment.put(experiment.empty_batch(shapes[index]))
        with stage(f"compiling the step for {axes or 'rows'}"):
            compiled[index] = experiment.placement.compile_train(
                experiment.train_step, state, batch
            )
    return compiled


def train_loop(
    experiment: Experiment,
    train: TrainBatches,
    state: TrainState,
    meta: dict[str, Any],
    evaluate: Callable[[TrainState, int], None],
    checkpointer: Checkpointer,
    health: Health,
    writer: MetricWriter,
    stop: Stop,
) -> TrainState:
    """Steps until config.steps or `stop()`; the last state is saved."""
    config, start = experiment.config, meta["data"]["step"]
    steps = compile_steps(experiment, train, state)
    progress = Progress(
        start,
        config.steps,
        config.log_every,
        experiment.schedule,
        meta["window"],
        train.batches.dataset.unit,
        meta["seen"],
    )
    source = Prefetch(batches_from(train, experiment, start), config.data.prefetch)
    pending = None

    def settle() -> None:
        """Reads the metrics of the step before: never waits for the one in flight."""
        if pending is not None:
            number, measured, real = pending
            measured = metrics.to_host(measured)
            shown = functools.partial(examples_of, train, number)
            health.check_step(metrics.values(measured, "train"), number, shown)
            if line := progress.update(number, measured, real):
                writer.write(number, line, progress.seen)

    try:
        for step in range(start + 1, config.steps + 1):
            with progress.waiting():
                batch, index, real = next(source)
            if step == start + 1:
                with stage("first step"):
                    state, measured = jax.block_until_ready(steps[index](state, batch))
            else:
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
                meta["seen"] = progress.seen
                with stage(f"saving step {step}", least=SOON):
                    saved = experiment.placement.unload(state).replace(frozen={})
                    health.check_state(saved, step)
                    checkpointer.save(step, saved, meta=meta)
                if due:
                    evaluate(state, step)
            if stop():
                break
    finally:
        source.close()
        progress.close()
    with stage("saving the last step", least=SOON):
        checkpointer.wait()
    return state


def evaluation_due(config: ExperimentConfig, step: int) -> bool:
    """Is a run evaluated after this step?"""
    return step > 0 and (step % config.evaluation.every == 0 or step >= config.steps)


def test(
    experiment: Experiment,
    evaluator: Evaluator,
    splits: plan.Splits,
    checkpointer: Checkpointer,
    scored: Mapping[int, Mapping[str, Mapping[str, Any]]],
    stop: Stop,
) -> dict[str, Any] | None:
    """Scores of the test split with the best or averaged parameters; None if stopped.

    Taken from `scored` ({step: {prefix: scalars}}) if the same parameters were scored
    on the same examples there.
    """
    chosen = plan.best_of(experiment.config)
    workdir = str(checkpointer.directory.parent)
    if (prefix := splits.tests()) and chosen == "best":
        step = workdirs.steps_of(checkpointer, chosen, ())[0]
        if found := scored.get(step, {}).get(prefix):
            named = {k.replace(f"{prefix}/", "test/", 1): x for k, x in found.items()}
            return named | {"test/checkpoint": f"step {step}"}
    loaded = workdirs.load_variables(experiment, checkpointer, chosen)
    variables, trained, which = loaded
    result = evaluator(variables, trained, splits.test, "test", stop=stop)
    if result is None:
        return None
    if result.samples:
        write_samples(workdir, "test", result.samples)
        print(f"\n{result.samples}")
    return result.scalars | {"test/checkpoint": which}


def finished(experiment: Experiment, checkpointer: Checkpointer) -> dict[str, Any]:
    """The test scores of a run that is done, {} of others; says that it is done.

    Only if the last checkpoint is intact: a damaged one is moved away as on resuming.
    """
    steps, done = experiment.config.steps, checkpointer.latest() or 0
    workdir = str(checkpointer.directory.parent)
    scores = workdirs.tested(workdir, done) if done >= steps else {}
    if scores:
        with stage("reading the last checkpoint", least=SOON):
            workdirs.restore(experiment, checkpointer)
        if checkpointer.latest() != done:
            return {}
        print(f"{workdir}: finished, {done} steps; raise --config.steps to go on")
    return scores


def find_codecs(config: ExperimentConfig, workdir: str) -> Mapping[str, Codec]:
    """The workdir's; else built, with the tokenizer of init_from if none is named."""
    data = config.data
    source, rules = "", workdirs.init_rules(config)
    if workdirs.saved_config(workdir) is not None:
        saved = workdirs.load_codecs(workdir, data)
        if codec_files.is_complete(saved, data):
            return saved
        source = workdir  # imported weights: their classes have no names yet
    elif rules:
        source = workdirs.parse(rules[0].source)[0]
    with stage(f"tokenizer and classes of {data.source!r}"):
        trained = trained_codecs.from_runs(data, workdirs.open_run)
        return codec_files.build(data, config.model.sizes(), earlier=source) | trained


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
        with stage("looking for a checkpoint", least=SOON):
            restored = workdirs.restore(experiment, checkpointer)
    if restored is None:
        meta = {"data": data | {"step": 0}, "window": {}, "seen": 0}
        if rules:
            with stage("parameters of other runs"):
                state, found = workdirs.start(experiment, rules)
            print(found)
        else:
            with stage("initialising parameters"):
                state = experiment.placement.init(experiment.make_state)
                jax.block_until_ready(state)
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
    plugins.load_all(config)
    if not config.needs_classes():
        return config.resolved(), None
    codecs = find_codecs(config, workdir)
    return config.resolved(codec_files.class_counts(config.data, codecs)), codecs


def run(
    config: ExperimentConfig,
    workdir: str,
    *,
    stop: Stop = lambda: "",
    from_step: int | None = None,
) -> dict[str, Any]:
    """Trains, or resumes, in `workdir`; returns the test scores by name.

    `stop` is asked after every step; once it returns a reason, the state is saved and
    {} is returned. `from_step`: goes on after this step, later ones are set aside.
    Raises TriformError for what a user can mend.
    """
    config, workdir = copy.deepcopy(config), paths.absolute(workdir)
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: train.py runs on one host")
    config, codecs = resolve(config, workdir)
    experiment = Experiment(config)
    os.makedirs(workdir, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.lock(workdir))
        before = workdirs.check_config(workdir, config)
        start = stack.enter_context(history.Start(workdir))
        if isinstance(stop, signals.Interrupt):
            stop.leaving = lambda came: start.end(f"interrupted by {came}")
        directory = workdirs.checkpoint_dir(workdir)
        checkpointer = stack.enter_context(Checkpointer(directory, config.checkpoint))
        if from_step is not None:
            go_back(workdir, checkpointer, config, from_step)
        if scores := finished(experiment, checkpointer):
            return scores
        print(plan.describe(experiment))
        print(plan.sources(config), flush=True)
        codecs = codecs or find_codecs(config, workdir)
        print(plan.export(config, workdir, codecs), flush=True)
        splits = plan.Splits.open(experiment, codecs)
        splits.print()
        state, meta = restore_or_init(experiment, splits.train, checkpointer)
        if from_step is not None:
            meta["from_step"] = from_step
        if before is not None:
            step = meta["data"]["step"]
            if text := plan.changes(before, config, codecs, splits.train, step):
                print(text)
        workdirs.claim(workdir, config, codecs)
        workdirs.save_frozen(workdir, experiment.placement.unload(state))
        unit = splits.train.batches.dataset.unit
        writer = MetricWriter(workdir, meta["data"]["step"], unit)
        stack.enter_context(contextlib.closing(writer))
        evaluator = Evaluator(experiment, codecs)
        scores = train_and_test(
            experiment, splits, state, meta, evaluator, checkpointer, writer, stop
        )
        if not scores:
            start.outcome = f"interrupted by {stop()}"
        return scores


def train_and_test(
    experiment: Experiment,
    splits: plan.Splits,
    state: TrainState,
    meta: dict[str, Any],
    evaluator: Evaluator,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    stop: Stop,
) -> dict[str, Any]:
    """The test scores, after the steps that are left; {} if it was stopped."""
    config, workdir = experiment.config, str(checkpointer.directory.parent)
    health = Health(checkpointer, meta["data"]["step"])
    scored: dict[int, dict[str, Any]] = {}  # step -> prefix -> scalars

    def evaluate(state: TrainState, step: int) -> None:
        variables, numbers = experiment.evaluation_variables(state), {}
        limit, found = config.evaluation.examples, {}
        for prefix, (split, names) in splits.evaluated.items():
            result = evaluator(variables, step, split, prefix, limit, stop, names=names)
            if result is None:
                return
            writer.write(step, result.scalars, meta["seen"])
            numbers |= result.numbers()
            found[prefix] = result.scalars
            if result.samples:
                name = f"step_{step:08d}"
                name = name if prefix == "eval" else f"{name}_{prefix}"
                write_samples(workdir, name, result.samples)
            seconds = f"({result.seconds:.1f} s)"
            print(f"step {step}: {summary(result.scalars)} {seconds}", flush=True)
            health.check_evaluation(result.scalars, step)
        checkpointer.record(step, numbers)
        scored[step] = found

    if isinstance(stop, signals.Interrupt):
        stop.listening = True
    step = meta["data"]["step"]
    if evaluation_due(config, step) and not checkpointer.metrics_of(step):
        evaluate(state, step)  # the one that was interrupted
    if step < config.steps and not stop():
        state = train_loop(
            experiment,
            splits.train,
            state,
            meta,
            evaluate,
            checkpointer,
            health,
            writer,
            stop,
        )
    if stop():
        return {}
    scores = test(experiment, evaluator, splits, checkpointer, scored, stop)
    if scores is None:
        return {}
    step = checkpointer.latest()
    writer.write(step, scores, meta["seen"])
    print(f"test ({scores['test/checkpoint']}): {summary(scores)}")
    print(plan.what_next(config, workdir, step))
    return scores


def main(argv: list[str]) -> int:
    """Reads the flags, trains; the exit code."""
    config = config_flag.value()
    if flags.FLAGS.keys is not None:
        print("\n".join(map(str, keys.listing(config, flags.FLAGS.keys))))
        return 0
    if flags.FLAGS.dry_run:
        config = resolve(config)[0]
        print(plan.describe(Experiment(config)))
        print(plan.export(config))
        print(plan.sources(config, read=True))
        return 0
    workdir = launch.folder_flag("workdir")
    interrupt = signals.Interrupt()
    run(config, workdir, stop=interrupt, from_step=flags.FLAGS.from_step)
    if interrupt.requested:
        with Checkpointer(
            workdirs.checkpoint_dir(workdir), config.checkpoint
        ) as checkpointer:
            saved = checkpointer.latest()
        print(f"{interrupt.requested}: step {saved} is saved", file=sys.stderr)
        print(f"to go on: {commands.line('train', workdir=workdir)}", file=sys.stderr)
        return signals.INTERRUPTED
    return 0


def define() -> None:
    """Defines the flags but for --config."""
    flags.DEFINE_string("workdir", None, "Where all of this run is kept.")
    about = "Go on after this step; checkpoints of later ones are set aside."
    flags.DEFINE_integer("from_step", None, about)
    flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
    flags.DEFINE_string(
        "keys", None, "List what --config.KEY=VALUE can set, below this key, and stop."
    )


def cli(argv: Sequence[str], program: str = "train") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, prepare=config_flag.define)


if __name__ == "__main__":
    cli(sys.argv)
