"""Runs on a Slurm cluster: one array job, submitted and returned from at once.

A submission is a folder DIR/slurm/N: the scripts, the runs of each array (task i is
entry i of the list), and what the tasks print. A task that is preempted, or comes to
its time limit, saves, ends with code 75 and puts itself back into the queue. A search
comes in waves: every array waits for the one before, and a short job before it asks for
the values. No process stays on the machine that submits.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from triform.runtime import commands, files, signals
from triform.runtime.errors import UserError
from triform.sweeps import search
from triform.sweeps.runs import Member, Sweep

WARNING = 120  # seconds before the time limit, for saving
ARRAY = """\
#!/bin/bash
# One run of a sweep per task: task N is entry N of {runs}
{options}
cd {cwd} || exit 1
# Newer srun take one core, whatever the job has, unless they are told.
cores=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}
srun --ntasks=1 $cores {python} -m triform.sweeps run {runs} "$SLURM_ARRAY_TASK_ID"
code=$?
# {interrupted}: the run was interrupted and has saved. Where Slurm puts the job back
# into the queue itself, or a user has cancelled it, its state is no longer RUNNING.
if [ "$code" = {interrupted} ]; then
    # Not SLURM_JOB_ID: that of the last task names the whole array.
    task="${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
    if scontrol show job "$task" | grep -q JobState=RUNNING; then
        scontrol requeue "$task"
        sleep 60  # Slurm ends this script
    fi
fi
exit "$code"
"""
ASK = """\
#!/bin/bash
# Asks for the values of the next runs of a search.
{options}
cd {cwd} || exit 1
srun --ntasks=1 {python} -m triform.sweeps ask {workdir} {runs} {trials}
"""


@dataclass(frozen=True)
class Place:
    """Where and how long the runs of an array go."""

    partition: str
    gpus: int  # of one run
    minutes: int  # limit of one start; a run that needs more goes on in another
    options: tuple[str, ...] = ()  # further ones of sbatch: --account=NAME


def place(text: str, options: Sequence[str] = ()) -> Place:
    """The place that 'PARTITION,GPUS,HOURS' names; UserError if it does not."""
    found = re.fullmatch(r"([\w.-]+),(\d+),(\d+(?:\.\d+)?)", text)
    minutes = round(float(found[3]) * 60) if found else 0
    if minutes < 1:
        raise UserError(
            f"--on=slurm:{text}: expected slurm:PARTITION,GPUS,HOURS, as in "
            "slurm:gpu,1,4 or slurm:cpu,0,0.5"
        )
    if wrong := [x for x in options if not x.startswith("--")]:
        raise UserError(f"--sbatch={wrong[0]}: expected an option: --sbatch=--mem=16G")
    return Place(found[1], int(found[2]), minutes, tuple(options))


def _folder(sweep: Sweep) -> str:
    """A new folder for a submission."""
    above = os.path.join(sweep.workdir, "slurm")
    os.makedirs(above, exist_ok=True)
    numbers = [int(x) for x in os.listdir(above) if x.isdigit()]
    folder = os.path.join(above, str(max(numbers, default=0) + 1))
    os.mkdir(folder)
    return folder


def _lines(name: str, where: Place, log: str, **more: str) -> str:
    """The #SBATCH lines."""
    options = {"job-name": name, "partition": where.partition, "ntasks": "1"}
    options |= {"output": log, "open-mode": "append"} | more
    # Quoted: a path may hold spaces.
    found = [
        f'#SBATCH --{k}="{v}"' if v else f"#SBATCH --{k}" for k, v in options.items()
    ]
    return "\n".join([*found, *(f"#SBATCH {x}" for x in where.options)])


def _limit(minutes: int) -> str:
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def _array(sweep: Sweep, folder: str, wave: int, count: int, where: Place) -> str:
    """Writes the script of an array of `count` runs; its path."""
    at_once = f"%{sweep.jobs}" if sweep.jobs else ""
    name = f"sweep-{_name(sweep)}"
    more = {"array": f"0-{count - 1}{at_once}", "time": _limit(where.minutes)}
    # To the run, not to the script; a wait before the end that leaves time to run.
    warning = min(WARNING, where.minutes * 30)
    more |= {"requeue": "", "signal": f"USR1@{warning}"}
    if where.gpus:
        more["gres"] = f"gpu:{where.gpus}"
    log = os.path.join(_plain(folder), f"wave{wave}_%a.log")
    text = ARRAY.format(
        runs=shlex.quote(_runs(folder, wave)),
        options=_lines(name, where, log, **more),
        cwd=shlex.quote(sweep.cwd),
        python=shlex.quote(sys.executable),
        interrupted=signals.INTERRUPTED,
    )
    return _write(os.path.join(folder, f"wave{wave}.sh"), text)


def _ask(sweep: Sweep, folder: str, wave: int, trials: int, where: Place) -> str:
    """Writes the script that asks for the runs of a wave; its path."""
    log = os.path.join(_plain(folder), f"ask{wave}.log")
    text = ASK.format(
        options=_lines(f"ask-{_name(sweep)}", where, log, time="10"),
        cwd=shlex.quote(sweep.cwd),
        python=shlex.quote(sys.executable),
        workdir=shlex.quote(sweep.workdir),
        runs=shlex.quote(_runs(folder, wave)),
        trials=trials,
    )
    return _write(os.path.join(folder, f"ask{wave}.sh"), text)


def _name(sweep: Sweep) -> str:
    """Of a job."""
    return re.sub(r"[^\w.-]", "_", os.path.basename(sweep.workdir))


def _plain(folder: str) -> str:
    """A folder in the name of an output file, where % has a meaning."""
    return folder.replace("%", "%%")


def _runs(folder: str, wave: int) -> str:
    return os.path.join(folder, f"wave{wave}.json")


def _write(path: str, text: str) -> str:
    with files.replacing(path) as f:
        f.write(text)
    return path


def write_runs(path: str, members: Sequence[Member]) -> None:
    """Writes the list of an array's runs."""
    files.write_json(path, [member.settings for member in members])


def scripts(
    sweep: Sweep, todo: list[Member], where: Place
) -> list[tuple[str, str | None]]:
    """Writes all scripts of a submission: [(path, the dependency it has on the one
    before: afterany, afterok, or None for the first)].
    """
    folder = _folder(sweep)
    if sweep.search is None:
        write_runs(_runs(folder, 0), todo)
        return [(_array(sweep, folder, 0, len(todo), where), None)]
    study = search.Study(sweep)
    study.tell()
    size, each = sweep.jobs or search.WAVE, max(1, len(sweep.search.seeds))
    found, wave = [], 0
    # What is left of earlier trials, then new ones, wave by wave.
    if todo:
        write_runs(_runs(folder, wave), todo)
        found.append((_array(sweep, folder, wave, len(todo), where), None))
        wave += 1
    left = study.left()
    while left > 0:
        trials = min(size, left)
        ask = _ask(sweep, folder, wave, trials, where)
        found.append((ask, "afterany" if found else None))
        script = _array(sweep, folder, wave, trials * each, where)
        found.append((script, "afterok"))
        wave, left = wave + 1, left - trials
    return found


def submit(sweep: Sweep, todo: list[Member], where: Place) -> list[str]:
    """Submits what is to do; the numbers of the jobs. UserError if Slurm refuses."""
    for program in ("sbatch", "squeue"):
        if not shutil.which(program):
            raise UserError(f"--on=slurm: no {program} here; run it where Slurm is")
    jobs: list[str] = []
    for path, after in scripts(sweep, todo, where):
        words = sbatch(path, after, jobs[-1] if jobs else "")
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            if jobs:
                subprocess.run(["scancel", *jobs], check=False)
            said = " ".join(done.stderr.split())
            raise UserError(f"--on=slurm: sbatch {commands.path(path)}: {said}")
        jobs.append(done.stdout.strip().partition(";")[0])
        files.write_json(os.path.join(os.path.dirname(path), "jobs.json"), jobs)
    return jobs


def sbatch(path: str, after: str | None, job: str) -> list[str]:
    """The command that submits a script, with its dependency on the job before."""
    words = ["sbatch", "--parsable"]
    if after:
        words += [f"--dependency={after}:{job}", "--kill-on-invalid-dep=yes"]
    return [*words, path]


def queued(sweep: Sweep) -> list[str]:
    """Jobs of earlier submissions that Slurm still has to do or does."""
    above, known = os.path.join(sweep.workdir, "slurm"), []
    for name in sorted(os.listdir(above)) if os.path.isdir(above) else ():
        text = files.read_text(os.path.join(above, name, "jobs.json"))
        known += re.findall(r"\d+", text or "")
    if not known or not shutil.which("squeue"):
        return []
    # All of the user's: squeue fails for a number that Slurm has forgotten.
    words = ["squeue", "--noheader", "--me", "--format=%F"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return [x for x in known if x in done.stdout.split()]
