"""What the scripts of a Slurm submission start; users start sweep.py.

python -m triform.sweeps run DIR/slurm/N/waveK.json INDEX
python -m triform.sweeps ask DIR DIR/slurm/N/waveK.json TRIALS
"""

import json
import os
import sys

from triform.runtime import files, signals
from triform.runtime.errors import TriformError, UserError
from triform.sweeps import local, runs, search, slurm


def opened(workdir: str) -> runs.Sweep:
    """The sweep of a workdir; UserError if there is none."""
    sweep = runs.read(workdir)
    if sweep is None:
        raise UserError(f"{workdir}: holds no {runs.FILE}; start the sweep again")
    return sweep


def run(path: str, index: str) -> int:
    """Does one run of an array; the exit code."""
    stop = local.Stop()
    workdir = os.path.dirname(os.path.dirname(os.path.dirname(path)))
    sweep, text = opened(workdir), files.read_text(path)
    if text is None:
        raise UserError(f"{path}: the job that asks for these runs wrote none")
    listed = json.loads(text)
    if int(index) >= len(listed):
        print("nothing to do: a wave has fewer runs where two are the same")
        return 0
    member = sweep.member(listed[int(index)])
    sweep.jobs = 1
    local.work(sweep, local.Alone(member), stop)
    status = runs.status_of(member)
    print(f"{member.name}: {status.state} at step {status.step}", flush=True)
    if status.state == "unfinished":
        return signals.INTERRUPTED
    return 1 if status.state == "failed" else 0


def ask(workdir: str, path: str, trials: str) -> int:
    """Asks for the runs of so many trials, and writes their list; the exit code."""
    if os.path.exists(path):
        print(f"{path}: is there")  # this job was put back into the queue
        return 0
    sweep = opened(workdir)
    study = search.Study(sweep)
    study.tell()
    known = {member.folder for member in study.members()}
    count = min(int(trials), study.left())
    new = [m for _ in range(count) for m in study.ask() if m.folder not in known]
    sweep.members = study.members()
    slurm.write_runs(path, list({m.folder: m for m in new}.values()))
    runs.write(sweep)
    print(f"{len(new)} runs: {path}")
    return 0


def main(argv: list[str]) -> int:
    """Does what the words say; the exit code."""
    actions = {("run", 2): run, ("ask", 3): ask}
    action = actions.get((argv[1] if len(argv) > 1 else "", len(argv) - 2))
    if action is None:
        print(__doc__)
        return 1
    try:
        return action(*argv[2:])
    except TriformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
