"""Trains one experiment; started again with the same workdir, resumes it.

    python train.py --config=configs/NAME.py[:variant] --workdir=DIR
        [--config.any.key=value] [--resume=STEP] [--fork=RUN:STEP]
        [--dry_run [--devices=8xH100]] [--profile=20:25]
    python train.py --workdir=DIR     continues the run in DIR with its saved config

--config takes a file, a name in configs/ (llama:8b) or the workdir of another run;
--keys lists what can be set. `triform train` is the same from any folder.

Exit codes: 0 finished, 1 an error that one line explains, 75 interrupted (SIGTERM,
SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGXCPU) after saving: start the same command
again. From Python: `run(config, workdir)`.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from triform import (
    ahead,
    capsule,
    config_flag,
    forks,
    observe,
    plan,
    recovery,
    trained_codecs,
)
from triform import workdir as workdirs
from triform.compilation import Compiled
from triform.configs import keys, plugins, schema
from triform.configs.schema import ExperimentConfig
from triform.data.codecs import Codec
from triform.data.codecs import files as codec_files
from triform.evaluate import Evaluator, summary, write_samples
from triform.experiment import Experiment, TrainState
from triform.input_pipeline import Prefetch, TrainBatches
from triform.recovery import Health, Recovery, go_back
from triform.runtime import (
    commands,
    files,
    guard,
    history,
    hosts,
    joining,
    launch,
    locks,
    paths,
    signals,
    stores,
)
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.metrics import MetricWriter, NoWriter
from triform.runtime.progress import SOON, Progress, stage
from triform.runtime.stopping import Stop
from triform.stepping import Steps

SAME = ("workdir", "resume", "fork")  # flags that processes must agree in


def batches_from(
    train: TrainBatches, experiment: Experiment, watch: guard.Watch, first: int
) -> Iterator[tuple[Any, int, int]]:
    """(batch on the devices, index of its shape, real units of the rows made here)
    from step `first` on.
    """
    for step in range(first, experiment.config.steps):
        number = watch.position(step)
        index, _ = train.ids(number)
        batch = train.batch(number, experiment.held(index))
        put = experiment.put(batch, experiment.rows(index))
        yield put, index, train.batches.real(batch)


def train_loop(
    experiment: Experiment,
    train: TrainBatches,
    state: TrainState,
    meta: dict[str, Any],
    evaluate: Callable[[TrainState, int], None],
    checkpointer: Checkpointer,
    recover: Recovery,
    writer: MetricWriter | NoWriter,
    compiled: Compiled,
    stop: Stop,
    profiled: observe.Steps,
) -> TrainState:
    """Steps until config.steps or `stop()`; the last state is saved."""
    config, start = experiment.config, meta["data"]["step"]
    progress = Progress(
        start,
        config.steps,
        config.log_every,
        experiment.schedule,
        meta["window"],
        train.batches.dataset.unit,
        meta["seen"],
    )
    source = Prefetch(
        batches_from(train, experiment, recover.watch, start), config.data.prefetch
    )
    workdir = str(checkpointer.directory.parent)
    observer = observe.Observer(experiment, progress, workdir, profiled)
    advance = Steps(experiment, train, compiled, recover, progress, writer, observer)
    try:
        for step in range(start + 1, config.steps + 1):
            with progress.waiting():
                batch, index, real = next(source)
            state = advance(state, batch, index, real, step)
            due = evaluation_due(config, step)
            if not (stop() or due or step % config.checkpoint.every == 0):
                continue
            state = advance.settle(state)
            with progress.paused():
                # Batch t is a function of (seed, t): the step is the whole position.
                meta["data"]["step"] = step
                meta["window"] = progress.saved_window()
                meta["seen"] = progress.seen
                meta["recovery"] = recover.watch.saved()
                with stage(f"saving step {step}", least=SOON):
                    saved = experiment.placement.unload(state).replace(frozen={})
                    recover.check_state(saved, step)
                    writer.flush()
                    checkpointer.save(step, saved, meta=meta)
                if due:
                    evaluate(state, step)
            if stop():
                break
    finally:
        source.close()
        observer.close()
        progress.close()
    with stage("saving the last step", least=SOON):
        checkpointer.wait()
    observer.report(checkpointer)
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
        return codec_files.build(
            data, config.model.sizes(), earlier=stores.local(source)
        ) | trained_codecs.from_runs(data, workdirs.open_run)


def restore_or_init(
    experiment: Experiment,
    train: TrainBatches,
    checkpointer: Checkpointer,
    anew: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """The newest intact state, or a new one, placed; and what is saved beside it.

    `anew`: that no step is left is right.
    """
    config = experiment.config
    data = {"seed": config.seed, "tokens": train.batches.dataset.digest}
    rules, restored = workdirs.init_rules(config), None
    if workdirs.is_imported(checkpointer):
        rules = (schema.InitRule(f"{checkpointer.directory.parent}:0"),)
    elif not anew or checkpointer.latest() is not None:
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


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the parts of a run are made; packed.run lets runs share them."""

    experiment: Callable[[ExperimentConfig], Experiment] = Experiment
    codecs: Callable[[ExperimentConfig, str], Mapping[str, Codec]] = find_codecs
    splits: Callable[..., plan.Splits] = plan.Splits.open


def resolve(
    config: ExperimentConfig, workdir: str = "", parts: Parts = Parts()
) -> tuple[ExperimentConfig, Mapping[str, Codec] | None]:
    """(the config with what follows from the data filled in, codecs if it needed them).

    Only numbers of classes that the config leaves to the data need the data.
    """
    plugins.load_all(config)
    if not config.needs_classes():
        return config.resolved(), None
    codecs = parts.codecs(config, workdir)
    return config.resolved(codec_files.class_counts(config.data, codecs)), codecs


def run(
    config: ExperimentConfig,
    workdir: str,
    *,
    stop: Stop = lambda: "",
    resume: int | None = None,
    fork: str = "",
    parts: Parts = Parts(),
    profile: observe.Steps = None,
) -> dict[str, Any]:
    """Trains, or resumes, in `workdir`; returns the test scores by name.

    `stop` is asked after every step; once it returns a reason, the state is saved and
    {} is returned. `resume`: goes on after this step, later ones are set aside. `fork`:
    RUN:STEP, the run and the step from which a new workdir goes on. `profile`: the
    first and the last step that are traced.
    Raises TriformError for what a user can mend.
    """
    config, workdir = copy.deepcopy(config), paths.workdir(workdir)
    group, interrupt = hosts.here(), stop
    stop = group.stop(stop)
    what = "reading the names of classes"
    config, codecs = group.in_turn(what, lambda: resolve(config, workdir, parts))
    experiment = parts.experiment(config)
    files.make_folder(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.lock(workdir))
        if fork:
            forks.begin(workdir, config, fork)
        before = workdirs.check_config(workdir, config)
        start = stack.enter_context(history.Start(workdir))
        group.leaving = lambda line: start.end(f"error: {line}")
        if isinstance(interrupt, signals.Interrupt):
            interrupt.leaving = start.interrupted
        directory = workdirs.checkpoint_dir(workdir)
        checkpointer = stack.enter_context(Checkpointer(directory, config.checkpoint))
        if resume is not None:
            go_back(workdir, checkpointer, config, resume)
        else:
            recovery.check_history(workdir, checkpointer, before or config)
        if scores := finished(experiment, checkpointer):
            return scores
        print(plan.describe(experiment))
        print(plan.sources(config), flush=True)
        if codecs is None:
            what = "building tokenizer and classes"
            codecs = group.in_turn(what, lambda: parts.codecs(config, workdir))
        print(plan.export(config, workdir, codecs), flush=True)
        what = "preparing the data"
        splits = group.in_turn(what, lambda: parts.splits(experiment, codecs))
        group.same(what, splits.digests())
        splits.print(experiment)
        about = experiment, splits.train, checkpointer
        state, meta = restore_or_init(*about, anew=resume == 0)
        if resume is not None:
            meta["resume"] = resume
        if before is not None:
            step = meta["data"]["step"]
            if text := plan.changes(before, config, codecs, splits.train, step):
                print(text)
        workdirs.claim(workdir, config, codecs)
        workdirs.save_frozen(workdir, experiment.placement.unload(state))
        unit = splits.train.batches.dataset.unit
        kind = MetricWriter if group.is_first else NoWriter
        writer = kind(workdir, meta["data"]["step"], unit)
        stack.enter_context(contextlib.closing(writer))
        evaluator = Evaluator(experiment, codecs)
        if isinstance(interrupt, signals.Interrupt):
            interrupt.listening = True
        about = evaluator, checkpointer, writer, stop, profile
        scores = train_and_test(experiment, splits, state, meta, *about)
        if not scores:
            start.outcome = f"interrupted by {stop()}"
            if isinstance(interrupt, signals.Interrupt):
                interrupt.requested = stop()  # it may have come to another process
        return scores


def train_and_test(
    experiment: Experiment,
    splits: plan.Splits,
    state: TrainState,
    meta: dict[str, Any],
    evaluator: Evaluator,
    checkpointer: Checkpointer,
    writer: MetricWriter | NoWriter,
    stop: Stop,
    profiled: observe.Steps,
) -> dict[str, Any]:
    """The test scores, after the steps that are left; {} if it was stopped."""
    config, workdir = experiment.config, str(checkpointer.directory.parent)
    start = meta["data"]["step"]
    health = Health(checkpointer, start)
    watch = guard.Watch(config.recovery, meta.get("recovery", {}))
    keep = functools.partial(capsule.keep, experiment, splits.train, workdir, watch)
    recover = Recovery(config.recovery, health, watch, keep)
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
        writer.flush()
        checkpointer.record(step, numbers)
        scored[step] = found

    if evaluation_due(config, start) and not checkpointer.metrics_of(start):
        # The one that was interrupted; perhaps between two splits.
        writer.go_back(start, scores=False)
        evaluate(state, start)
    with Compiled(experiment, splits.train, state, start) as compiled:
        while meta["data"]["step"] < config.steps and not stop():
            about = state, meta, evaluate, checkpointer, recover, writer, compiled, stop
            try:
                state = train_loop(experiment, splits.train, *about, profiled)
            except recovery.Rewind as bad:
                state = about = None  # its memory is wanted
                step = recovery.rewind(
                    workdir, checkpointer, watch, config.recovery, bad
                )
                about = experiment, splits.train, checkpointer
                state, meta = restore_or_init(*about, anew=step == 0)
                watch.losses = meta.get("recovery", {}).get("losses", [])
                writer.go_back(step)
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
        ahead.dry_run(config, resolve)
        return 0
    workdir, profile = launch.workdir_flag(), observe.asked()
    about = {"config": json.loads(schema.to_json(config)), **joining.asked(*SAME)}
    about["plugins"] = {x.name: x.digest for x in plugins.closure(config.plugins)}
    group = joining.join(about)
    interrupt = signals.Interrupt()
    interrupt.leaving = lambda came: group.leave_at_once(came, signals.INTERRUPTED)
    resume, fork = flags.FLAGS.resume, flags.FLAGS.fork
    run(config, workdir, stop=interrupt, resume=resume, fork=fork, profile=profile)
    if interrupt.requested:
        with Checkpointer(
            workdirs.checkpoint_dir(workdir), config.checkpoint
        ) as checkpointer:
            saved = checkpointer.latest()
        again = commands.line("train", workdir=workdir)
        if group.count > 1:
            again = f"start all processes again, or one alone: {again}"
        if group.is_first:
            print(f"{interrupt.requested}: step {saved} is saved", file=sys.stderr)
            print(f"to go on: {again}", file=sys.stderr)
        return signals.INTERRUPTED
    return 0


def define() -> None:
    """Defines the flags but for --config."""
    joining.define()
    ahead.define()
    observe.define()
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    about = "Continue after this step; later checkpoints are set aside."
    flags.DEFINE_integer("resume", None, about)
    about = "RUN:STEP: start this workdir from the state of RUN after STEP."
    flags.DEFINE_string("fork", "", about)
    flags.DEFINE_bool("dry_run", False, "Print the plan and exit.")
    flags.DEFINE_string(
        "keys", None, "List the keys below this one for --config.KEY=VALUE, and exit."
    )


def cli(argv: Sequence[str], program: str = "train") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, prepare=config_flag.define)


if __name__ == "__main__":
    cli(sys.argv)
