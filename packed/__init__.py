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

OUTPUT = "output.txt"  # of a workdir: what its run printed
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
    member prints is appended to the file `output` in its workdir, too.
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
        count = at_most or len(group.members)
        for start in range(0, len(group.members), count):
            chosen = group.members[start : start + count]
            if stop():
                return outcomes
            pack = Pack([members[i] for i in chosen], group.inputs, stop)
            for _, workdir in pack.members:
                os.makedirs(workdir, exist_ok=True)
            with printed({t.name: os.path.join(w, output) for t, w in pack.named()}):
                pack.run()
            for i, turns in zip(chosen, pack.turns, strict=True):
                outcomes[i] = _outcome(turns.result, turns.error)
                if isinstance(outcomes[i], str):
                    print(f"error: {turns.name}: {outcomes[i]}", file=sys.stderr)
    return outcomes


def _outcome(result: Any, error: BaseException | None) -> Outcome:
    if error is None or isinstance(error, Abandoned):
        return result or {}
    line = launch.one_line(error) if isinstance(error, Exception) else ""
    if not line:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line
