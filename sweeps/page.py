"""A sweep as a picture, and as one page of HTML that needs no other file."""

import base64
import html as escapes
import io
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from triform.sweeps import runs
from triform.sweeps.runs import Sweep
from triform.sweeps.values import SEED, name_of

# Colours that all can tell apart (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
NAMED = len(COLOURS)  # curves with a colour and a name of their own: the best ones
GREY = "#b0b0b0"
STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } img { width: 100% }
td, th { padding: 0.2em 0.9em; border-bottom: 1px solid #ddd; text-align: left }
td, code { overflow-wrap: anywhere }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
"""


def _short(text: str) -> str:
    """A value for a picture: numbers with three digits, the end of what is long."""
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text if 0 < len(text) <= 16 else f"...{text[-13:]}" if text else "''"


def _label(settings: dict[str, str]) -> str:
    """'learning_rate=0.001 seed=0': settings for a legend, keys by their last part."""
    found = [f"{k.rpartition('.')[2]}={_short(v)}" for k, v in settings.items()]
    return "  ".join(found)


def _groups(members: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ by the seed only, by the name of what they share."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in members:
        kept = {k: v for k, v in row["settings"].items() if k != SEED}
        found.setdefault(name_of(kept) or "all", []).append(row)
    return found


def _score(group: Sequence[dict[str, Any]], sweep: Sweep) -> float:
    """The mean of the runs' best values so far; NaN without any."""
    found = [row["best"][sweep.metric] for row in group if row["best"]]
    return statistics.fmean(found) if found else math.nan


def _ordered(members: Sequence[dict[str, Any]], sweep: Sweep) -> list[tuple[str, list]]:
    """Groups, the best first; running ones count with what they have reached."""
    sign = -1 if sweep.mode == "max" else 1

    def key(item: tuple[str, list]) -> tuple[bool, float]:
        score = _score(item[1], sweep)
        return math.isnan(score), sign * score

    return sorted(_groups(members).items(), key=key)


def picture(sweep: Sweep, members: Sequence[dict[str, Any]]) -> bytes | None:
    """A PNG: learning curves on the left, values and scores on the right.

    None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # So many inches that letters of 9 points are as large as those of the page.
    figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = _ordered(members, sweep)
    colours = {name: colour for (name, _), colour in zip(groups, COLOURS, strict=False)}
    _draw_curves(left, sweep, groups, colours)
    keys = list(dict.fromkeys(k for row in members for k in row["settings"]))
    keys = [k for k in keys if k != SEED] or keys
    if len(keys) == 1:
        _draw_values(right, sweep, keys[0], groups, colours)
    else:
        _draw_parallel(right, sweep, keys, groups, colours)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_curves(axes: Any, sweep: Sweep, groups: Sequence, colours: dict) -> None:
    """A curve a run, the best on top; runs that differ by the seed have one colour."""
    for place, (name, group) in reversed(list(enumerate(groups))):
        kept = {k: v for k, v in group[0]["settings"].items() if k != SEED}
        label = _label(kept) if place < NAMED else None
        for row in group:
            folder = sweep.member(row["settings"]).folder
            curve = runs.curve_of(folder, sweep.metric)
            curve = [point for point in curve if math.isfinite(point[1])]
            if not curve:
                continue
            line = "--" if row["state"] in ("failed", runs.PRUNED) else "-"
            axes.plot(
                *zip(*curve, strict=True),
                line,
                color=colours.get(name, GREY),
                label=label,
                marker="o" if len(curve) < 20 else None,
                markersize=3.5,
                linewidth=1.6 if place < NAMED else 0.8,
            )
            label = None
    axes.set_xlabel("step")
    axes.set_ylabel(sweep.metric)
    axes.grid(color="#e5e5e5")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False)
    axes.set_title("learning curves (dashed: pruned or failed)", fontsize=10)


def _scale(texts: Sequence[str]) -> tuple[dict[str, float], bool]:
    """(text -> position from 0 to 1, whether texts are numbers on a log scale).

    Numbers that span a factor of 10 and more are shown on a logarithmic scale; what is
    no number is spread evenly.
    """
    known = list(dict.fromkeys(texts))
    try:
        numbers = {text: float(text) for text in known}
    except ValueError:
        numbers = {}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        return {
            t: i / max(len(known) - 1, 1) for i, t in enumerate(sorted(known))
        }, False
    low, high = min(numbers.values()), max(numbers.values())
    logarithmic = low > 0 and high / low >= 10
    if logarithmic:
        numbers = {t: math.log(x) for t, x in numbers.items()}
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0
    return {t: (x - low) / span for t, x in numbers.items()}, logarithmic


def _draw_values(
    axes: Any, sweep: Sweep, key: str, groups: Sequence, colours: dict
) -> None:
    """The best value of every run over the one key that is swept."""
    scale, logarithmic = _scale([g[0]["settings"].get(key, "") for _, g in groups])
    for name, group in groups:
        at = scale[group[0]["settings"].get(key, "")]
        found = [row["best"][sweep.metric] for row in group if row["best"]]
        axes.plot([at] * len(found), found, "o", color=colours.get(name, GREY))
    texts, places = zip(*_marks(scale, 0.14), strict=True)
    axes.set_xticks(places, texts)
    axes.set_xlabel(f"{key} (log)" if logarithmic else key)
    axes.set_ylabel(f"best {sweep.metric}")
    axes.grid(color="#e5e5e5")
    axes.set_title("best value by setting", fontsize=10)


def _marks(scale: dict[str, float], least: float) -> list[tuple[str, float]]:
    """(text, position) of a scale, none so close that the texts would overlap."""
    kept: list[tuple[str, float]] = []
    for text, at in sorted(scale.items(), key=lambda item: item[1]):
        if not kept or at - kept[-1][1] >= least:
            kept.append((_short(text), at))
    return kept


def _draw_parallel(
    axes: Any, sweep: Sweep, keys: Sequence[str], groups: Sequence, colours: dict
) -> None:
    """A line a setting through its values, which ends at its score (best on top)."""
    scored = [(name, g) for name, g in groups if not math.isnan(_score(g, sweep))]
    scores = [_score(g, sweep) for _, g in scored]
    finite = [x for x in scores if math.isfinite(x)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    scales = {k: _scale([g[0]["settings"].get(k, "") for _, g in groups]) for k in keys}
    for (name, group), score in reversed(list(zip(scored, scores, strict=True))):
        heights = [scales[k][0][group[0]["settings"].get(k, "")] for k in keys]
        share = (score - low) / ((high - low) or 1.0) if math.isfinite(score) else 0.0
        worst_below = share if sweep.mode == "max" else 1 - share
        named = name in colours
        axes.plot(
            range(len(keys) + 1),
            [*heights, worst_below if math.isfinite(score) else 0.0],
            color=colours.get(name, GREY),
            linewidth=1.8 if named else 0.8,
        )
    for place, key in enumerate(keys):
        axes.axvline(place, color="#888888", linewidth=0.8)
        for text, height in _marks(scales[key][0], 0.08):
            _write(axes, text, place, height)
    axes.axvline(len(keys), color="#888888", linewidth=0.8)
    ends = (high, low) if sweep.mode == "min" else (low, high)
    for height, value in zip((0, 1), ends, strict=True):
        _write(axes, f"{value:.4g}", len(keys), height)
    logs = [f"{k}\n(log)" if scales[k][1] else k for k in keys]
    axes.set_xticks(range(len(keys) + 1), [*logs, sweep.metric], fontsize=8)
    axes.set_xlim(-0.1, len(keys) + 0.35)
    axes.set_yticks([])
    axes.set_frame_on(False)
    axes.set_title("settings and scores (best on top)", fontsize=10)


def _write(axes: Any, text: str, place: float, height: float) -> None:
    """A value beside its axis, above the lines."""
    axes.annotate(
        text,
        (place, height),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        bbox={"boxstyle": "square,pad=0.1", "fc": "#ffffffcc", "ec": "none"},
    )


# The page


def _cells(texts: Sequence[str], kind: str = "td", numbers: int = 0) -> str:
    found = []
    for index, text in enumerate(texts):
        what = ' class="number"' if kind == "td" and 0 < index <= numbers else ""
        found.append(f"<{kind}{what}>{escapes.escape(text)}</{kind}>")
    return f"<tr>{''.join(found)}</tr>"


def html(
    sweep: Sweep, members: list[dict], names: Sequence[str], rows: list, image: bytes
) -> str:
    """The page: the table of `rows` with the scores `names`, the picture, the rest."""
    keys = list(dict.fromkeys(k for row in rows for k in row["settings"]))
    lines = [_cells(["", *names, *keys], "th")]
    for number, row in enumerate(rows, 1):
        scores = [row["shown"].get(name, "") for name in names]
        values = [row["settings"].get(key, "") for key in keys]
        lines.append(_cells([str(number), *scores, *values], numbers=len(names)))
    states = [row["state"] for row in members]
    count = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    better = "higher" if sweep.mode == "max" else "lower"
    title = f"Sweep of {sweep.config}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escapes.escape(title)}'
        f"</title><style>{STYLE}</style></head><body>",
        f"<h1>{escapes.escape(title)}</h1>",
        f"<p>{len(members)} runs: {count}. By {escapes.escape(sweep.metric)}, {better} "
        f"is better. {time.strftime('%Y-%m-%d %H:%M %Z')}</p>",
        f"<p><code>{escapes.escape(' '.join(sweep.arguments))}</code></p>",
        "<table>" + "\n".join(lines) + "</table>" if rows else "",
        '<img alt="learning curves, and scores by setting" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">',
    ]
    others = [row for row in members if row["state"] != "finished"]
    if others:
        lines = [_cells(["run", "state", "step", "why"], "th")]
        for row in others:
            texts = [row["name"], row["state"], str(row["step"]), row["note"]]
            lines.append(_cells(texts))
        parts.append("<h2>Not finished</h2><table>" + "\n".join(lines) + "</table>")
    return "\n".join([*parts, "</body></html>", ""])
