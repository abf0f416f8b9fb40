"""Trains several runs at once: what differs between them is an input of one program.

    run([(config, workdir), ...]) -> scores of every run, or the line of its error

Every member is an ordinary train.run, in a thread that waits wherever it would use the
device (runtime/turns.py). Once all of them wait, what most wait for is computed for all
of those at once, by vmap over their states, numbers and batches, and each goes on with
its share. So a member keeps what a run keeps, and `train.py --workdir=` goes on with it
alone.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax

from triform import train
from triform.configs.schema import ExperimentConfig
from triform.packed.grouping import Group, groups
from triform.packed.lines import printed
from triform.packed.pack import Pack
from triform.runtime import launch, paths, signals
from triform.runtime.errors import UserError
from triform.runtime.turns import Abandoned

__all__ = ["OUTPUT", "Group", "Outcome", "groups", "run"]

OUTPUT = "output.log"  # of a workdir: what its run printed
Outcome = dict[str, Any] | str  # scores, {} if interrupted, or the line of an error


def run(
    members: Sequence[tuple[ExperimentConfig, str]],
    *,
    stop: train.Stop = lambda: "",
    at_most: int = 0,
    output: str = OUTPUT,
) -> list[Outcome]:
    """Trains (config, workdir) pairs, as many of them at once as one program can.

    What came of each, in their order. One that fails ends alone. `stop`: as of
    train.run. `at_most` members at once, for their memory; 0: all of a group. What a
    member prints is appended to the file `output` in its workdir; steps, scores and
    errors are shown, too.
    """
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: packs run on one host")
    if at_most < 0:
        raise UserError(f"at_most={at_most}: must not be negative; 0 is no limit")
    if isinstance(stop, signals.Interrupt):
        stop.listening = True
    members = [(config, paths.absolute(workdir)) for config, workdir in members]
    if len({workdir for _, workdir in members}) < len(members):
        raise UserError("two runs have the same workdir; name one for each")
    outcomes: list[Outcome] = [{} for _ in members]
    for group in groups(members):
        print(_told(group, len(members)), flush=True)
        count = at_most or len(group.members)
        for start in range(0, len(group.members), count):
            chosen = group.members[start : start + count]
            if stop():
                return outcomes
            found = _train([members[i] for i in chosen], group.inputs, stop, output)
            outcomes = [
                found[chosen.index(i)] if i in chosen else x
                for i, x in enumerate(outcomes)
            ]
    return outcomes


def _told(group: Group, count: int) -> str:
    """'runs 1 to 4 of 6 ...', and why they are a program of their own."""
    inputs = ", ".join(group.inputs) or "nothing"
    apart = f"; apart: {group.apart}" if group.apart else ""
    ours = f"{len(group.members)} of {count} runs are one program"
    return f"{ours}, whose inputs are {inputs}{apart}"


def _train(
    members: Sequence[tuple[ExperimentConfig, str]],
    inputs: Sequence[str],
    stop: train.Stop,
    output: str,
) -> list[Outcome]:
    """What came of the members of one pack."""
    pack = Pack(members, inputs, stop)
    names = {turns.name: workdir for turns, workdir in pack.named()}
    for workdir in names.values():
        os.makedirs(workdir, exist_ok=True)
    paths_of = {name: os.path.join(x, output) for name, x in names.items()}
    with printed(paths_of):
        pack.run()
    outcomes = [_outcome(turns.result, turns.error) for turns in pack.turns]
    for (name, workdir), outcome in zip(names.items(), outcomes, strict=True):
        if isinstance(outcome, str):
            tell_error(workdir, outcome, name, output)
    return outcomes


def tell_error(workdir: str, line: str, name: str = "", output: str = OUTPUT) -> None:
    """Says why a member has failed, and writes it to its output."""
    print(f"error: {name or os.path.basename(workdir)}: {line}", file=sys.stderr)
    os.makedirs(workdir, exist_ok=True)
    with open(os.path.join(workdir, output), "a", encoding="utf-8") as f:
        f.write(f"error: {line}\n")


def _outcome(result: Any, error: BaseException | None) -> Outcome:
    if error is None or isinstance(error, Abandoned):
        return result or {}
    line = launch.one_line(error) if isinstance(error, Exception) else ""
    if not line:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line
