"""Which runs a sweep has: values by config key, combined.

On the command line, one flag a key:

    --sweep=seed=0,1,2                               values
    --sweep=data.buckets=(16,),(16,32)               commas in brackets do not separate
    --sweep=init_from="'a,b',c"                      nor do they in quotes
    --sweep=optim.learning_rate=log:1e-4:1e-2:5      5 values, evenly spread
    --sweep=optim.learning_rate=log:1e-4:1e-2        a range, for --search
    --sweep=model.trunk.dropout=linear:0:0.3         likewise, on a linear scale

All combinations are run. A file of configs/sweeps/ combines in other ways, too: its
`get_sweep()` returns what the functions of this file return, as in

    from triform.sweeps.values import chain, grid, log, product, zipped

    def get_sweep():
        trunk = "model.trunk"
        sizes = zipped({f"{trunk}.d_model": (64, 128), f"{trunk}.d_ff": (256, 512)})
        return product(sizes, grid({"optim.learning_rate": log(1e-4, 1e-2, 3)}))
"""

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from triform.runtime.errors import UserError

SEED = "seed"  # the key over which means and deviations are taken
Settings = dict[str, str]  # config key -> value as --config.KEY=VALUE takes it
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(log|linear):({_NUMBER}):({_NUMBER})(?::(\d+))?")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, among which a search chooses."""

    low: float
    high: float
    log: bool = False  # even on a logarithmic scale
    integer: bool = False
    count: int = 0  # of values that a grid takes from it

    def text(self, value: float) -> str:
        """The value as a flag has it."""
        return str(round(value)) if self.integer else f"{value:.6g}"

    def at(self, share: float) -> float:
        """The number that lies this share of the way from low to high."""
        if not self.log:
            return self.low + share * (self.high - self.low)
        low, high = math.log(self.low), math.log(self.high)
        # The ends are exactly themselves.
        exact = {0.0: self.low, 1.0: self.high}
        return exact.get(share, math.exp(low + share * (high - low)))

    def points(self) -> tuple[str, ...]:
        """`count` values, evenly spread; fewer if rounding makes some the same."""
        shares = [i / (self.count - 1) for i in range(self.count)]
        return tuple(dict.fromkeys(self.text(self.at(x)) for x in shares))


Axis = tuple[str, ...] | Range


@dataclass(frozen=True)
class Search:
    """A sweep whose next values depend on what the last ones gave (see search.py)."""

    space: dict[str, Axis]
    trials: int
    seeds: tuple[str, ...] = ()  # every trial is run with each; its score is the mean


Plan = list[Settings] | Search


# For files of configs/sweeps/


def log(low: float, high: float, count: int = 0) -> Axis:
    """`count` values evenly spread on a logarithmic scale; without it the range."""
    return _values(_range(low, high, count, True))


def linear(low: float, high: float, count: int = 0) -> Axis:
    """`count` values evenly spread; without it the range."""
    return _values(_range(low, high, count, False))


def grid(values: Mapping[str, Iterable[Any]]) -> list[Settings]:
    """Every combination of the values of all keys."""
    axes = {key: _listed(key, axis) for key, axis in values.items()}
    rows = itertools.product(*axes.values())
    return [dict(zip(axes, row, strict=True)) for row in rows]


def zipped(values: Mapping[str, Iterable[Any]]) -> list[Settings]:
    """The first values of all keys together, then the second ones, and so on."""
    axes = {key: _listed(key, axis) for key, axis in values.items()}
    if len({len(axis) for axis in axes.values()}) > 1:
        counts = ", ".join(f"{key} has {len(axis)}" for key, axis in axes.items())
        raise UserError(f"zipped: {counts} values; give all keys the same number")
    rows = zip(*axes.values(), strict=True)
    return [dict(zip(axes, row, strict=True)) for row in rows]


def chain(*plans: list[Settings]) -> list[Settings]:
    """The runs of all plans, one plan after the other; each run once."""
    found = {tuple(sorted(x.items())): x for plan in plans for x in plan}
    return list(found.values())


def product(*plans: list[Settings]) -> list[Settings]:
    """Every run of the first plan with every one of the others."""
    found = []
    for row in itertools.product(*plans):
        names = [key for settings in row for key in settings]
        if twice := next((k for k in names if names.count(k) > 1), ""):
            raise UserError(f"{twice}: two parts of the sweep set it; set it in one")
        found.append({k: v for settings in row for k, v in settings.items()})
    return found


def sample(
    space: Mapping[str, Any], trials: int, seed: int | str = 0
) -> list[Settings]:
    """`trials` runs with values drawn from ranges and lists.

    Run i is a function of (seed, i) only: more trials keep the first ones.
    """
    axes = {key: _axis(key, axis) for key, axis in space.items()}

    def draw(index: int, key: str, axis: Axis) -> str:
        share = random.Random(f"{seed}:{index}:{key}").random()
        if isinstance(axis, Range):
            return axis.text(axis.at(share))
        return axis[int(share * len(axis))]

    rows = [{k: draw(i, k, axis) for k, axis in axes.items()} for i in range(trials)]
    return chain(rows)


def search(space: Mapping[str, Any], trials: int, seeds: Iterable[Any] = ()) -> Search:
    """`trials` runs whose values Optuna's TPE chooses, each with all the seeds."""
    axes = {key: _axis(key, axis) for key, axis in space.items()}
    return Search(axes, trials, tuple(map(text_of, seeds)))


def text_of(value: Any) -> str:
    """A value as --config.KEY=VALUE takes it: text as it is, others as Python says."""
    if hasattr(value, "tolist"):  # of NumPy: np.float64(0.1) is no value of a flag
        value = value.tolist()
    return value if isinstance(value, str) else repr(value)


def checked(plan: Any) -> Plan:
    """What a get_sweep() returned, with all values as text.

    UserError if it is neither a list of {key: value} nor a search.
    """
    if isinstance(plan, Search):
        return plan
    rows = [*plan] if isinstance(plan, list | tuple) else []
    if not rows or not all(isinstance(x, Mapping) and x for x in rows):
        shown = repr(plan) if len(repr(plan)) < 60 else f"{type(plan).__name__}"
        raise UserError(
            f"get_sweep() returned {shown}: expected a list of {{key: value}}, as "
            "grid(...) and the other functions of triform.sweeps.values return"
        )
    return chain([{key: text_of(x) for key, x in row.items()} for row in rows])


# For the command line


def combined(
    texts: Sequence[str], method: str, first: Plan | None, numbers: Mapping[str, type]
) -> Plan:
    """The plan of --sweep flags, --search and the plan of a file, if there is one.

    `numbers` has the type of each swept key whose value is a number: ranges of whole
    ones hold whole ones. UserError for what cannot be combined.
    """
    axes: dict[str, Axis] = {}
    for key, axis in map(parse, texts):
        if key in axes:
            raise UserError(f"--sweep={key}=...: named twice; put its values into one")
        if isinstance(axis, Range):
            if key not in numbers:
                raise UserError(
                    f"--sweep={key}=...: a range, but its value is no number; list the "
                    "values"
                )
            axis = replace(axis, integer=numbers[key] is int)
        axes[key] = axis
    axes = {k: _values(a) for k, a in axes.items()}
    if isinstance(first, Search):
        if axes or method:
            raise UserError(
                "the file says what is searched; leave out --sweep, --search"
            )
        return _typed(first, numbers)
    first = [{}] if first is None else first
    if not method:
        return product(first, grid(axes))
    kind, _, count = method.partition(":")
    if kind not in ("random", "tpe") or not count.isdigit() or int(count) < 1:
        raise UserError(
            f"--search={method}: expected random:N or tpe:N, N the number of trials"
        )
    seeds = axes.pop(SEED, ())
    if isinstance(seeds, Range):
        raise UserError("--sweep=seed=...: list the seeds that every trial is run with")
    if not axes:
        raise UserError(
            f"--search={method}: nothing to search; --sweep=KEY=log:LOW:HIGH"
        )
    if kind == "random":
        seeded = grid({SEED: seeds}) if seeds else [{}]
        return product(first, sample(axes, int(count)), seeded)
    if first != [{}]:
        raise UserError("--search=tpe goes with --sweep only, not with a file's runs")
    return Search(axes, int(count), seeds)


def parse(text: str) -> tuple[str, Axis]:
    """(key, values) of 'key=a,b,c' or of a range; UserError if it is neither."""
    key, equals, rest = text.partition("=")
    found = _split(rest, text)
    if not (key and equals):
        raise UserError(f"--sweep={text!r}: expected KEY=VALUE,VALUE,...")
    if len(found) == 1 and (known := _RANGE.fullmatch(found[0])):
        kind, low, high, count = known.groups()
        if count and int(count) < 2:
            raise UserError(f"--sweep={text!r}: {count} values; ask for at least 2")
        return key, _range(float(low), float(high), int(count or 0), kind == "log")
    if found == [""] or re.match(r"(log|linear):", rest):
        raise UserError(
            f"--sweep={text!r}: expected KEY=VALUE,VALUE,... or KEY=log:LOW:HIGH[:N]"
        )
    if len(set(found)) < len(found):
        raise UserError(f"--sweep={text!r}: a value stands there twice; remove one")
    return key, tuple(found)


def _split(text: str, flag: str) -> list[str]:
    """Values between commas that stand in no brackets and no quotes.

    Quotes around a value are not part of it, nor are spaces.
    """
    found, value, open_, quote = [], "", [], ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and (open_ or not value.strip()):
            quote = sign
        elif sign in _CLOSING:
            open_.append(_CLOSING[sign])
        elif open_ and sign == open_[-1]:
            open_.pop()
        elif sign == "," and not open_:
            found.append(value)
            value = ""
            continue
        value += sign
    if quote or open_:
        missing = quote or open_[-1]
        raise UserError(f"--sweep={flag!r}: {missing} is missing; close it")
    return [_unquoted(x) for x in (*found, value)]


def _unquoted(value: str) -> str:
    value = value.strip()
    quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
    return value[1:-1] if quoted else value


def _range(low: float, high: float, count: int, logarithmic: bool) -> Range:
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"range {low:g} to {high:g}: the first must be the smaller one")
    if logarithmic and low <= 0:
        raise UserError(f"range log:{low:g}:{high:g}: both must be above 0; use linear")
    whole = isinstance(low, int) and isinstance(high, int)
    return Range(low, high, logarithmic, whole, count)


def _values(axis: Axis) -> Axis:
    """The values of a range that says how many; others as they are."""
    return axis.points() if isinstance(axis, Range) and axis.count else axis


def _axis(key: str, values: Any) -> Axis:
    return values if isinstance(values, Range) else _listed(key, values)


def _listed(key: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, Range):
        raise UserError(
            f"{key}: a range in a grid; say how many values (log:1e-4:1e-2:5) or "
            "--search=random:N"
        )
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{key}={values!r}: expected a list of values")
    found = tuple(map(text_of, values))
    if len(set(found)) < len(found) or not found:
        raise UserError(f"{key}={found}: expected values that differ, at least one")
    return found


def _typed(found: Search, numbers: Mapping[str, type]) -> Search:
    for key, axis in found.space.items():
        if isinstance(axis, Range) and key not in numbers:
            raise UserError(f"{key}: a range, but its value is no number; list values")
    space = {
        key: replace(axis, integer=numbers[key] is int)
        if isinstance(axis, Range)
        else axis
        for key, axis in found.space.items()
    }
    return replace(found, space=space)


# Names of runs

# Values that name a folder as they are, whatever the file system makes of capitals.
_PLAIN = re.compile(r"[a-z0-9_.+-]{1,40}|True|False")


def name_of(settings: Settings) -> str:
    """A folder's name, another one for other settings: 'init_from=run~1f3a9c2e,seed=0'.

    In whichever order the settings come: flags in another order name the same runs. A
    value that cannot stand in a name as it is, is shortened and gets its digest.
    """
    pairs = sorted(settings.items())
    text = ",".join(f"{_word(k)}={_word(v)}" for k, v in pairs)
    return text if len(text) <= 200 else f"{text[:180]}~{_digest(repr(pairs))}"


def _word(value: str) -> str:
    if _PLAIN.fullmatch(value):
        return value
    last = value.rstrip("/").rpartition("/")[2] or "none"
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', last)[:24]}~{_digest(value)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:10]
