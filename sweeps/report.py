"""What came of a sweep: a table, and a page with pictures (see page.py)."""

import os

from triform.runtime import commands, files
from triform.runtime.errors import UserError
from triform.sweeps import page, runs
from triform.sweeps.runs import Sweep

LONG = 40  # characters of a value in a table of text


def shown(score: tuple[float, float, int]) -> str:
    """'0.812 +- 0.01 (3)': mean, deviation and number of runs; of one run its value."""
    mean, spread, count = score
    return f"{mean:.5g} +- {spread:.2g} ({count})" if count > 1 else f"{mean:.5g}"


def columns(sweep: Sweep, rows: list[dict]) -> list[str]:
    """The scores that a table shows: the metric, and the same and the loss of the test.

    sweep.json has all.
    """
    name = sweep.metric.partition("/")[2]
    wanted = dict.fromkeys((sweep.metric, f"test/{name}", "test/loss"))
    return [x for x in wanted if any(x in row["scores"] for row in rows)]


def _value(text: str) -> str:
    """A value in a table of text: of a long one its end."""
    return text if len(text) <= LONG else f"...{text[3 - LONG :]}"


def table(sweep: Sweep, members: list[dict]) -> str:
    """The text of the table: the best first, then what is not finished and why."""
    rows = runs.ranked(runs.summarise(members), sweep)
    names, lines = columns(sweep, rows), []
    if not members:
        lines.append("no run has begun")
    if rows:
        keys = list(dict.fromkeys(k for row in rows for k in row["settings"]))
        cells = [["", *names, *keys]]
        for number, row in enumerate(rows, 1):
            scores = [
                shown(row["scores"][x]) if x in row["scores"] else "" for x in names
            ]
            # Values as they were given: a folder's name holds digests of some.
            values = [_value(row["settings"].get(key, "")) for key in keys]
            cells.append([str(number), *scores, *values])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [
            "  ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
    for state in ("running", "unfinished", "pruned", "failed"):
        found = [row for row in members if row["state"] == state]
        if found:
            lines.append(f"{state}: {len(found)}")
        for row in found:
            note = row["note"] or (f"step {row['step']}" if row["step"] else "")
            lines.append(f"  {row['name']}{f': {note}' if note else ''}")
    return "\n".join(lines)


def run(workdir: str, sweep: Sweep | None) -> str:
    """Writes report.html and report.png; the table, and where they are."""
    if sweep is None:
        raise UserError(f"{workdir}: holds no {runs.FILE}; name the workdir of a sweep")
    members = runs.rows_of(sweep)
    text = table(sweep, members)
    picture = page.picture(sweep, members)
    if picture is None:
        return (
            f"{text}\nno pictures: they need matplotlib, pip install 'triform[sweeps]'"
        )
    rows = runs.ranked(runs.summarise(members), sweep)
    for row in rows:
        row["shown"] = {name: shown(score) for name, score in row["scores"].items()}
    content = page.html(sweep, members, columns(sweep, rows), rows, picture)
    paths = {"report.png": picture, "report.html": content.encode()}
    for name, content in paths.items():
        with files.replacing(os.path.join(workdir, name), binary=True) as f:
            f.write(content)
    written = [commands.path(os.path.join(workdir, name)) for name in paths]
    return "\n".join([text, *written])
