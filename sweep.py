"""Runs one experiment for every combination of some settings, and compares them.

    python sweep.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --sweep="init_from=RUN," --sweep=seed=0,1,2,3,4 [--config.steps=500 ...]
    python sweep.py ... --sweep=optim.learning_rate=log:1e-4:1e-2 --search=tpe:64
    python sweep.py ... --jobs=2 | --on=packed | --on=slurm:PARTITION,GPUS,HOURS
    python sweep.py --workdir=DIR            goes on with the sweep that is in DIR
    python sweep.py report --workdir=DIR     table and curves, also while it runs

Each combination is a run of train.py in DIR/NAME. Started again, what is unfinished
goes on, and nothing else is started; --retry repeats failed runs. `seed`, if it is
swept, is what means and standard deviations are taken over. DIR/sweep.json says what
each run is and what came of it.

Exit codes: 0 all finished (or submitted), 1 a run failed (the others are done), 75
interrupted as train.py is, the running runs saved: start the same command again.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from triform import config_flag
from triform.configs import plugins, schema
from triform.configs import sweeps as files_of_sweeps
from triform.configs.schema import CHOICES, ExperimentConfig
from triform.runtime import commands, files, launch, paths, signals, stores
from triform.runtime.errors import UserError
from triform.sweeps import local, packs, report, runs, search, slurm, values
from triform.sweeps.local import Stop
from triform.sweeps.runs import Member, Sweep

# Kind of --on -> fn(the sweep, the runs to do, what follows ':' in --on, stop) -> what
# to print. What came of a run its folder says. A function that returns before the runs
# are done (a submission) is one of LATER.
Executor = Callable[[Sweep, list[Member], str, Stop], str]


def _local(sweep: Sweep, todo: list[Member], where: str, stop: Stop) -> str:
    local.run(sweep, todo, stop)
    return ""


def _slurm(sweep: Sweep, todo: list[Member], where: str, stop: Stop) -> str:
    jobs = slurm.submit(sweep, todo, slurm.place(where, flags.FLAGS.sbatch))
    if not jobs:
        return "nothing is left to do"
    shown = commands.line("sweep", "report", workdir=sweep.workdir)
    return f"submitted: {' '.join(jobs)}\n  squeue --me\n  {shown}"


def _print(sweep: Sweep, todo: list[Member], where: str, stop: Stop) -> str:
    if not where:
        return local.show(sweep, todo)
    place = slurm.place(where, flags.FLAGS.sbatch)
    shown = []
    for path, after in slurm.scripts(sweep, todo, place):
        words = slurm.sbatch(path, after, "JOB_ABOVE")
        shown.append(f"# {shlex.join(words)}\n{files.read_text(path)}")
    return "\n".join(shown)


EXECUTORS: Mapping[str, Executor] = {
    "local": _local,
    "packed": packs.run,
    "slurm": _slurm,
    "print": _print,
}
LATER = ("slurm", "print")


# What is asked for


def _numbers(config: ExperimentConfig, keys: Sequence[str]) -> dict[str, type]:
    """The type of each key whose value is a number. UserError for no such key."""
    found = {}
    for key in keys:
        if key in CHOICES:  # model=from:RUN: a type, whose name --config.model takes
            continue
        config_flag.check_key(config, key, "...")
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = type(value)
    return found


def _file_plan(name: str) -> values.Plan:
    """What get_sweep() of a file returns: a path, or a name in configs/sweeps/."""
    path = name if name.endswith(".py") else ""
    path = path or os.path.join(files_of_sweeps.FOLDER, f"{name}.py")
    if not os.path.isfile(paths.absolute(path)):
        known = ", ".join(files_of_sweeps.names())
        raise UserError(
            f"--sweep_file={name}: no such file; name a Python file or one of {known}"
        )
    # Not plugins.load: it may have the name of the config's file.
    path = paths.absolute(path)
    module = types.ModuleType("triform_sweep_file")
    module.__file__, sys.modules[module.__name__] = path, module
    with plugins.one_line(path):
        with open(path, "rb") as f:
            exec(compile(f.read(), path, "exec", dont_inherit=True), module.__dict__)
        if not callable(getattr(module, "get_sweep", None)):
            raise UserError(f"--sweep_file={name}: defines no get_sweep()")
        return values.checked(module.get_sweep())


def asked(workdir: str, passed: list[str]) -> tuple[Sweep, ExperimentConfig]:
    """(the sweep that the flags describe, the config that its runs have in common).

    UserError before anything starts.
    """
    flag = flags.FLAGS
    if not flag.config:
        raise UserError("--config is missing: name a config, a file or a workdir")
    config = config_flag.configured(flag.config, passed)
    first = _file_plan(flag.sweep_file) if flag.sweep_file else None
    swept = [text.partition("=")[0] for text in flag.sweep or ()]
    if isinstance(first, values.Search):
        swept += first.space
    for text in flag.sweep or ():
        values.parse(text)  # what is no sweep is said before a key that is none
    plan = values.combined(
        flag.sweep or (), flag.search, first, _numbers(config, swept)
    )
    if plan == [{}]:
        raise UserError("nothing is swept: give --sweep=KEY=VALUE,VALUE,...")
    sweep = Sweep(
        workdir,
        flag.config,
        passed,
        os.getcwd(),
        config.steps,
        config.checkpoint.metric,
        config.checkpoint.mode,
        flag.jobs,
        flag.prune,
    )
    _check_values(sweep, plan)
    if isinstance(plan, values.Search):
        sweep.search = plan
    else:
        sweep.members = [sweep.member(settings) for settings in plan]
    return sweep, config


def _as_before(sweep: Sweep, passed: list[str]) -> ExperimentConfig | None:
    """Adds further flags, which all runs of a workdir's sweep get, to it.

    The config with them; None without any.
    """
    flag = flags.FLAGS
    for name, same in (("config", sweep.config), ("search", "")):
        if flag[name].value not in (None, "", same):
            raise UserError(
                f"--{name}={flag[name].value}: say what is swept, too; without it "
                "--workdir alone goes on with the sweep that is there"
            )
    if flag["jobs"].present:
        sweep.jobs = flag.jobs
    if flag["prune"].present:
        sweep.prune = flag.prune
    if not os.path.exists(os.path.join(sweep.base, "config.json")):
        raise UserError(
            f"{sweep.base}: is gone; start the sweep again with --config and --sweep"
        )
    if not passed:
        return None
    kept = [word for word in sweep.arguments if word not in passed]
    sweep.arguments = [*kept, *passed]
    with contextlib.chdir(sweep.cwd):
        config = config_flag.configured(sweep.base, passed)
    sweep.steps = config.steps
    sweep.metric, sweep.mode = config.checkpoint.metric, config.checkpoint.mode
    sweep.members = [sweep.member(x.settings) for x in sweep.members]
    return config


def _check_values(sweep: Sweep, plan: values.Plan) -> None:
    """Sets every value once: one of the wrong type is said before the first run."""
    if isinstance(plan, values.Search):
        pairs = [
            (key, text)
            for key, axis in plan.space.items()
            for text in (
                [axis.text(axis.low)] if isinstance(axis, values.Range) else axis
            )
        ]
    else:
        pairs = [pair for settings in plan for pair in settings.items()]
    for key, text in dict.fromkeys(pairs):
        word = f"--config.{key}={text}"
        config_flag.configured(sweep.config, [*sweep.arguments, word])


def _continued(sweep: Sweep, before: Sweep | None) -> None:
    """Takes over what an earlier sweep of the workdir knows, and says what differs."""
    if before is None:
        return
    wanted = {member.folder for member in sweep.members}
    known = [m.settings for m in before.members] + before.others
    if sweep.search is None:
        sweep.others = [x for x in known if sweep.member(x).folder not in wanted]
    if sweep.others:
        names = ", ".join(values.name_of(x) for x in sweep.others)
        print(f"no longer asked for, and kept: {names}")


def _keep(sweep: Sweep, config: ExperimentConfig) -> None:
    """Writes the config of all runs into the workdir, and says what was another."""
    old = files.read_text(os.path.join(sweep.base, "config.json"))
    if old is not None:
        before, now = (_flat(json.loads(x)) for x in (old, schema.to_json(config)))
        keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        for key in keys:
            print(f"config: {key} was {before.get(key)}, is now {now.get(key)}")
        if keys:
            print("runs that have finished are not trained again")
    new, out = f"{sweep.base}.new", f"{sweep.base}.old"
    for path in (new, out):
        shutil.rmtree(path, ignore_errors=True)
    os.makedirs(new)
    plugins.save(config.plugins, new)  # they may lie in the old folder
    with files.replacing(os.path.join(new, "config.json")) as f:
        f.write(schema.to_json(config))
    if old is not None:
        os.rename(sweep.base, out)
    os.rename(new, sweep.base)
    shutil.rmtree(out, ignore_errors=True)


def _flat(tree: Any, lead: str = "") -> dict[str, str]:
    """{dotted key: value} of a tree of JSON."""
    if not isinstance(tree, dict):
        return {lead: json.dumps(tree)}
    below = [_flat(x, f"{lead}.{k}" if lead else k) for k, x in tree.items()]
    return {k: x for each in below for k, x in each.items()}


# The program


def _executor(text: str) -> tuple[str, str]:
    kind, _, where = text.partition(":")
    if kind not in EXECUTORS:
        raise UserError(
            f"--on={text}: expected local, packed, slurm:PARTITION,GPUS,HOURS or print"
        )
    if kind == "packed":
        packs.at_most(where)
    elif where or kind == "slurm":
        slurm.place(where, flags.FLAGS.sbatch)
    return kind, where


def _check_kind(sweep: Sweep, kind: str, where: str) -> None:
    """UserError if what is to do the runs cannot do them so."""
    flag = flags.FLAGS
    if kind == "packed" and (flag.jobs > 1 or flag.prune):
        given = "--prune" if flag.prune else f"--jobs={flag.jobs}"
        raise UserError(f"--on=packed: all runs are one process; leave out {given}")
    if jobs := slurm.queued(sweep):
        raise UserError(
            f"{sweep.workdir}: jobs {', '.join(jobs)} of this sweep are still queued "
            f"or running; wait, or scancel {' '.join(jobs)}"
        )
    searches = kind in ("local", "slurm") or (kind == "print" and where)
    if sweep.search is not None and not searches:
        raise UserError(
            f"--on={kind}: a search chooses its values as it goes; take "
            "--search=random:N, or local, slurm:... or print:PARTITION,GPUS,HOURS"
        )


def _do(sweep: Sweep, kind: str, where: str, stop: Stop) -> str:
    """Has the runs done that are to do; what to print."""
    retry = flags.FLAGS.retry
    if sweep.search is not None and kind not in LATER:
        local.work(sweep, search.Queue(sweep, retry), stop)
        return ""
    if sweep.search is not None:
        sweep.members = search.Study(sweep).members()
        runs.write(sweep)
    todo = [m for m in sweep.members if search.is_todo(m, retry)]
    return EXECUTORS[kind](sweep, todo, where, stop) if todo or sweep.search else ""


def main(argv: list[str]) -> int:
    """Runs, submits or reports on a sweep; the exit code."""
    if stores.is_store(flags.FLAGS.workdir or ""):
        raise UserError(f"--workdir={flags.FLAGS.workdir}: sweeps need a local folder")
    workdir, words = launch.folder_flag("workdir"), argv[1:]
    before = runs.read(workdir)
    if words[:1] == ["report"]:
        print(report.run(workdir, before))
        return 0
    if words and not words[0].startswith("-"):
        raise UserError(f"unexpected argument {words[0]!r}: only report is one")
    kind, where = _executor(flags.FLAGS.on)
    stop = Stop()
    flag = flags.FLAGS
    if before is not None and not (flag.sweep or flag.sweep_file):
        sweep, config = before, _as_before(before, words)
    else:
        sweep, config = asked(workdir, words)
        _continued(sweep, before)
    _check_kind(sweep, kind, where)
    os.makedirs(workdir, exist_ok=True)
    with runs.locked(workdir) as ours:
        if not ours:
            raise UserError(
                f"workdir={workdir!r}: another sweep runs in it; wait for it, stop it, "
                "or name another workdir"
            )
        if config is not None:
            _keep(sweep, config)
        runs.write(sweep)
        text = _do(sweep, kind, where, stop)
        unwritten = _write(sweep)
    if text:
        print(text)
    return _end(sweep, kind, stop(), unwritten)


def _write(sweep: Sweep) -> str:
    """Writes sweep.json; why it could not be."""
    try:
        runs.write(sweep)
    except OSError as error:
        return f"error: {sweep.workdir}/{runs.FILE}: {error.strerror}"
    return ""


def _end(sweep: Sweep, kind: str, stopped: str, unwritten: str) -> int:
    """Prints the table and what is not as it should be; the exit code."""
    rows = runs.rows_of(sweep)
    count = {row["state"]: 0 for row in rows}
    for row in rows:
        count[row["state"]] += 1
    if unwritten:
        print(unwritten, file=sys.stderr)
    if kind != "print":
        print(report.table(sweep, rows))
    if stopped or (count.get("unfinished") and kind not in LATER):
        why = stopped or "a signal"
        print(f"interrupted by {why}: start again to go on", file=sys.stderr)
        return signals.INTERRUPTED
    if (running := count.get("running", 0)) and kind not in LATER:
        print(
            f"done by another program: {running} of {len(rows)} runs; start again "
            "when it has ended",
            file=sys.stderr,
        )
        return signals.INTERRUPTED
    if failed := count.get("failed", 0):
        print(
            f"error: {failed} of {len(rows)} runs failed; --retry repeats them",
            file=sys.stderr,
        )
    return 1 if (failed and kind not in LATER) or unwritten else 0


def define() -> None:
    """Defines the flags; those of train.py are passed on to it."""
    about = "As for train.py; of a workdir, its config."
    flags.DEFINE_string("config", None, about)
    flags.DEFINE_string(
        "workdir", None, "Folder of the sweep, with one folder per run."
    )
    about = (
        "KEY=VALUE,VALUE,... or KEY=log:LOW:HIGH[:COUNT], KEY=linear:...; repeatable."
    )
    flags.DEFINE_multi_string("sweep", None, about)
    about = "A Python file with get_sweep(), or a name in configs/sweeps."
    flags.DEFINE_string("sweep_file", "", about)
    about = "random:TRIALS or tpe:TRIALS, in place of all combinations."
    flags.DEFINE_string("search", "", about)
    about = "Runs at a time (default: one; on Slurm all); they share cores and GPUs."
    flags.DEFINE_integer("jobs", 0, about, lower_bound=0)
    about = (
        "local, packed or packed:N (in one program, N at once), "
        "slurm:PARTITION,GPUS,HOURS, print (the commands) or print:PARTITION,..."
    )
    flags.DEFINE_string("on", "local", about)
    flags.DEFINE_multi_string("sbatch", [], "An option of sbatch; repeatable.")
    flags.DEFINE_bool("retry", False, "Also repeat failed runs.")
    flags.DEFINE_bool(
        "prune", False, "Stop runs that are worse than half of the others."
    )


def _joined(argv: list[str]) -> list[str]:
    """Flags of train.py as one word each: --config.KEY VALUE is --config.KEY=VALUE.

    Our flags stop at a word that is none.
    """
    found: list[str] = []
    for word in argv:
        waits = found and re.fullmatch(r"--?config\.[^=]+", found[-1])
        if waits and not re.match(r"-[^\d.]", word):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def cli(argv: Sequence[str], program: str = "sweep") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, prepare=_joined, passes_on=True)


if __name__ == "__main__":
    cli(sys.argv)
