"""Where the time of a step goes, by module: a profile read with the program's names.

The trace holds names of compiled operations; the compiled program's text says which
module each comes from. A fused operation counts for the module of its last part.
"""

import dataclasses
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.profiler import ProfileData

from triform.runtime.scopes import kind_of, path_of

TOP = 10  # operations that are listed
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds of all devices and threads together, by compiled operation."""

    seconds: Mapping[str, float]  # operation -> seconds
    count: Mapping[str, int]  # operation -> how often it ran


def start(folder: str) -> None:
    """Begins to trace. Python's own calls are left out: they would cost most."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


def stop(folder: str) -> Profile:
    """Ends it and writes the trace below `folder`; returns what it says."""
    jax.profiler.stop_trace()
    return read(folder)


def read(folder: str) -> Profile:
    """The newest trace below a folder."""
    files = pathlib.Path(folder).rglob("*.xplane.pb")
    newest = max(files, key=lambda path: path.stat().st_mtime)
    seconds: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for events in _lines(ProfileData.from_file(str(newest))):
        for name, own in _own_times(events):
            seconds[name] += own / 1e9
            count[name] += 1
    return Profile(seconds, count)


def _lines(data: ProfileData) -> Iterator[list[tuple[float, float, str]]]:
    """(start, nanoseconds, operation) of every thread or stream that ran some."""
    for plane in data.planes:
        lines = [*plane.lines]
        # A line of whole operations, where a device has one, beside those of kernels.
        whole = [line for line in lines if line.name == "XLA Ops"]
        for line in whole or lines:
            found = []
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is None and whole:
                    name = event.name.partition(" = ")[0].lstrip("%")
                if name is not None:
                    found.append((event.start_ns, event.duration_ns, str(name)))
            yield sorted(found, key=lambda e: (e[0], -e[1]))


def _own_times(
    events: Sequence[tuple[float, float, str]],
) -> Iterator[tuple[str, float]]:
    """(operation, nanoseconds) without those of the operations inside it."""
    open_: list[list[Any]] = []  # [end, name, own time]
    for begin, lasts, name in events:
        while open_ and open_[-1][0] <= begin:
            _, done, own = open_.pop()
            yield done, own
        if open_:
            open_[-1][2] -= lasts
        open_.append([begin + lasts, name, lasts])
    for _, done, own in open_:
        yield done, max(own, 0.0)


def origins(text: str) -> dict[str, str]:
    """{compiled operation: name of what it comes from} of a compiled program's text."""
    found: dict[str, str] = {}
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    calls: dict[str, str] = {}
    where = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            where = head[1]
        elif operation := _LINE.match(line):
            if name := _NAME.search(line):
                found[operation[1]] = name[1]
                inside[where][name[1]] += 1
            elif call := _CALLS.search(line):
                calls[operation[1]] = call[1]
    for operation, called in calls.items():
        if inside[called]:
            found[operation] = inside[called].most_common(1)[0][0]
    return found


def table(
    profile: Profile, texts: Sequence[str], steps: int, wall: float, waited: float
) -> str:
    """The kinds of modules by their time, and the most expensive operations.

    `wall` and `waited` (for data) are seconds of all the steps.
    """
    names: dict[str, str] = {}
    for text in texts:
        names |= origins(text)
    kinds: Counter[str] = Counter()
    single: Counter[str] = Counter()
    for operation, seconds in profile.seconds.items():
        origin = names.get(operation, "")
        path = path_of(origin)
        kinds[kind_of(path.rpartition("/")[0])] += seconds
        back = " (backward)" if "transpose(" in origin else ""
        single[f"{path or operation}{back}"] += seconds
    total = sum(kinds.values()) or 1.0
    rows = [
        f"  {kind:<17} {1e3 * found / steps:>10.3f} ms {found / total:>6.1%}"
        for kind, found in kinds.most_common()
    ]
    most = [
        f"  {1e3 * seconds / steps:>10.3f} ms {seconds / total:>6.1%}  {name}"
        for name, seconds in single.most_common(TOP)
    ]
    return "\n".join(
        [
            f"a step took {1e3 * wall / steps:.3f} ms, of which "
            f"{1e3 * waited / steps:.3f} ms waiting for data; time of operations a "
            f"step, all devices and threads together, {1e3 * total / steps:.3f} ms:",
            *rows,
            f"the {len(most)} most expensive operations:",
            *most,
        ]
    )
