"""Searching: the next values follow from what the last ones gave (Optuna's TPE).

What was asked for is kept in DIR/search.journal, which Optuna's own tools can open.
What became of it is read from the runs' folders each time: a search that was killed has
no trial that stays "running" for ever.
"""

import contextlib
import os
from typing import Any

from triform.runtime.errors import UserError
from triform.sweeps import runs
from triform.sweeps.runs import Member, Sweep
from triform.sweeps.values import SEED, Range, Settings

JOURNAL = "search.journal"
WAVE = 8  # trials that start before any of them is scored, unless --jobs says
STARTUP = 10  # trials at random before the sampler learns from them


def optuna() -> Any:
    """The library; UserError if it is not installed."""
    try:
        import optuna as library
    except ImportError as error:
        raise UserError(
            "--search=tpe needs Optuna: pip install 'triform[sweeps]', or take "
            "--search=random:N"
        ) from error
    library.logging.set_verbosity(library.logging.WARNING)
    return library


class Study:
    """The trials of a sweep's search. Each is a run, or one for every seed."""

    def __init__(self, sweep: Sweep) -> None:
        self._optuna, self._sweep, self._search = optuna(), sweep, sweep.search
        storages, path = self._optuna.storages, os.path.join(sweep.workdir, JOURNAL)
        _without_torn_line(path)
        backend = storages.journal.JournalFileBackend(path)
        asked = os.path.exists(path)
        try:
            self._study = self._optuna.create_study(
                storage=storages.JournalStorage(backend),
                study_name="sweep",
                direction="maximize" if sweep.mode == "max" else "minimize",
                load_if_exists=True,
            )
        except ValueError as error:  # of its JSON
            raise UserError(
                f"{path}: is damaged ({error}); restore it or name another workdir"
            ) from error
        self._check_space()
        # Another seed on every start: the same one would repeat the first proposals.
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=len(self._study.trials) if asked else 0,
            n_startup_trials=min(STARTUP, max(1, self._search.trials // 3)),
            constant_liar=True,  # running trials count as bad: others look elsewhere
        )
        self._distributions = {
            key: self._distribution(axis) for key, axis in self._search.space.items()
        }

    def _check_space(self) -> None:
        """UserError if earlier trials were of another search."""
        sweep = self._sweep
        axes = {key: repr(axis) for key, axis in self._search.space.items()}
        mine = {"space": axes, "metric": sweep.metric, "mode": sweep.mode}
        known = self._study.user_attrs
        for name, value in mine.items():
            if name not in known:
                self._study.set_user_attr(name, value)
            elif known[name] != value:
                raise UserError(
                    f"{sweep.workdir}: its search had {name} {known[name]}, not "
                    f"{value}; change it back or name another workdir"
                )

    def left(self) -> int:
        """How many trials have not been asked for."""
        return self._search.trials - len(self._asked())

    def members(self) -> list[Member]:
        """The runs of all trials asked for, in order, each once."""
        found = [m for trial in self._asked() for m in self._members(trial.params)]
        return list({member.folder: member for member in found}.values())

    def ask(self) -> list[Member]:
        """The runs of one more trial."""
        return self._members(self._study.ask(self._distributions).params)

    def tell(self) -> None:
        """Reads what became of the trials that are open; the folders say so."""
        states = self._optuna.trial.TrialState
        for trial in self._asked():
            if trial.state.is_finished() and trial.state != states.FAIL:
                continue
            members = self._members(trial.params)
            found = [runs.status_of(member).state for member in members]
            value = self._value(members)
            if trial.state == states.FAIL:
                if set(found) == {"finished"} and value is not None:
                    self._replace(trial, value)  # its runs were repeated
            elif set(found) & {"unfinished", "running"}:
                continue
            elif "failed" in found or value is None:
                self._study.tell(trial.number, state=states.FAIL)
            elif runs.PRUNED in found:
                self._study.tell(trial.number, state=states.PRUNED)
            else:
                self._study.tell(trial.number, value)

    def _asked(self) -> list[Any]:
        """The trials without those that replace a failed one, and those whose values
        are not all there, because the search was killed while it asked.
        """
        found = [t for t in self._study.trials if "replaces" not in t.user_attrs]
        return [t for t in found if t.params.keys() == self._search.space.keys()]

    def _replace(self, failed: Any, value: float) -> None:
        """Adds the score of a trial that was told as failed: Optuna changes none."""
        said = {"replaces": failed.number}
        if any(t.user_attrs == said for t in self._study.trials):
            return
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=failed.params,
                distributions=self._distributions,
                value=value,
                user_attrs=said,
            )
        )

    def _distribution(self, axis: tuple[str, ...] | Range) -> Any:
        kinds = self._optuna.distributions
        if not isinstance(axis, Range):
            return kinds.CategoricalDistribution(axis)
        if axis.integer:
            return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)

    def _members(self, params: dict[str, Any]) -> list[Member]:
        settings: Settings = {}
        for key, axis in self._search.space.items():
            value = params[key]
            settings[key] = axis.text(value) if isinstance(axis, Range) else value
        seeds = self._search.seeds
        each = [settings | {SEED: x} for x in seeds] if seeds else [settings]
        return [self._sweep.member(x) for x in each]

    def _value(self, members: list[Member]) -> float | None:
        """The mean of the runs' best evaluations; None if one has none."""
        sweep, found = self._sweep, []
        for member in members:
            curve = runs.curve_of(member.folder, sweep.metric)
            found.append(runs.best_of(curve, sweep))
        if None in found:
            return None
        mean = sum(found) / len(found)
        return mean if mean == mean else None  # Optuna takes no NaN


def _without_torn_line(path: str) -> None:
    """Removes a last line that a full disk or a kill has cut off: it was not said.

    Optuna would append to it, and read neither.
    """
    text = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        text = f.read()
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


class Queue:
    """The runs of a search one after the other, asked for as others end."""

    def __init__(self, sweep: Sweep, retry: bool) -> None:
        self._sweep, self._study = sweep, Study(sweep)
        self._study.tell()
        known = self._study.members()
        sweep.members = known
        self._todo = [m for m in known if is_todo(m, retry)]

    def next(self) -> Member | None:
        """A run that is left of an earlier trial, or of a new one."""
        while not self._todo and self._study.left() > 0:
            known = {m.folder for m in self._sweep.members}
            asked = [m for m in self._study.ask() if m.folder not in known]
            self._sweep.members += asked
            self._todo = [m for m in asked if is_todo(m, False)]
            if not asked:
                self._study.tell()  # the same values as an earlier trial
            self._write()  # so that a report shows them
        return self._todo.pop(0) if self._todo else None

    def ended(self, member: Member) -> None:
        """Tells the search, and brings sweep.json up to date."""
        self._study.tell()
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # it is written again at the end
            runs.write(self._sweep)


def is_todo(member: Member, retry: bool) -> bool:
    """Is a run still to be done, or with `retry` to be repeated?"""
    state = runs.status_of(member).state
    return state == "unfinished" or (retry and state == "failed")
