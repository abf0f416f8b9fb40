"""Draws the curves of runs, into a file and in the terminal.

python plot.py WORKDIR [WORKDIR ...] [--output=curves.svg|.png]
    [--metric=eval/loss] [--x=step|tokens|hours]

From Python: `curves(workdirs)`, then `svg`, `png` or `terminal` of them.
"""

import dataclasses
import html
import io
import itertools
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from PIL import Image, ImageDraw, ImageFont

from triform.runtime import files, launch, metrics, paths
from triform.runtime.errors import UserError

Points = Sequence[tuple[float, float]]
# Colours that all can tell apart (Okabe and Ito 2008), and what terminals have.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
ANSI = (34, 31, 32, 35, 33, 36, 39)
GREY, GRID = "#444444", "#dddddd"
WIDTH, HEIGHT = 760, 440  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 20, 48  # margins
METRICS = ("train/loss", "eval/loss")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of a run, ascending in x."""

    run: str
    metric: str
    points: Points
    colour: int  # index into COLOURS: one for every run
    thin: bool  # drawn below the others, without dots


# fn(line of metrics.jsonl, first line) -> x, or None
AXES: dict[str, Callable[[dict, dict], float | None]] = {
    "step": lambda line, first: line["step"],
    "tokens": lambda line, first: line.get("tokens", line.get("images")),
    "hours": lambda line, first: _hours(line.get("time"), first.get("time")),
}


def curves(
    workdirs: Sequence[str], names: Sequence[str] = (), axis: str = "step"
) -> list[Curve]:
    """The metrics of that name of every run; by default its losses.

    UserError for a workdir without metrics, or without one that is asked for.
    """
    found = []
    labels = _labels(workdirs)
    for number, workdir in enumerate(workdirs):
        lines = metrics.read_lines(paths.workdir(workdir))
        if not lines:
            raise UserError(
                f"{workdir}: holds no metrics.jsonl with lines; name the workdir of a "
                "run of train.py"
            )
        known = {k: None for line in lines for k in line if "/" in k}
        wanted = names or [name for name in METRICS if name in known]
        for name in wanted:
            points = _points(lines, name, axis)
            if not points:
                raise UserError(
                    f"{workdir}: --metric={name}: no number of that name; there are "
                    f"{', '.join(k for k in known if _points(lines, k, axis))}"
                )
            thin = len(wanted) > 1 and name.startswith("train/")
            found.append(Curve(labels[number], name, points, number, thin))
    return found


def _hours(time: float | None, start: float | None) -> float | None:
    return None if time is None or start is None else (time - start) / 3600


def _points(lines: Sequence[dict[str, Any]], name: str, axis: str) -> Points:
    found = {}
    for line in lines:
        x, y = AXES[axis](line, lines[0]), line.get(name)
        if x is not None and isinstance(y, int | float) and math.isfinite(y):
            found[x] = float(y)
    return sorted(found.items())


def _labels(workdirs: Sequence[str]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    parts = [paths.workdir(w).split(os.sep) for w in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        short = [os.sep.join(p[-count:]) for p in parts]
        if len(set(short)) == len(set(map(tuple, parts))):
            return short
    return list(workdirs)


class Scale:
    """Numbers of an axis -> [0, 1], with round numbers to mark on it.

    With `wide` it begins and ends with a mark.
    """

    def __init__(self, values: Sequence[float], marks: int, wide: bool = False):
        low, high = min(values), max(values)
        if low == high:
            low, high = low - abs(low) / 2 - 0.5, high + abs(high) / 2 + 0.5
        rough = (high - low) / marks
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
        digits = max(0, -math.floor(math.log10(step)))
        if wide:
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        self.low, self.high = low, high
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        self.marks = [
            (i * step, _short(i * step, digits)) for i in range(first, last + 1)
        ]

    def __call__(self, value: float) -> float:
        """Where the value is between the ends."""
        return (value - self.low) / (self.high - self.low)


def _short(value: float, digits: int) -> str:
    """'0.25', '400', '20k', '1.5M'."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.{digits}f}"


class Svg:
    """Lines and text as SVG."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def line(self, points: Points, colour: str, width: float, faint: bool) -> None:
        """A polyline."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{text}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}" stroke-opacity="{0.45 if faint else 1}" '
            'stroke-linejoin="round"/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """Text at its middle height; anchor: start, middle or end."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}" fill="{GREY}">'
            f"{html.escape(text)}</text>"
        )

    def content(self) -> bytes:
        """The file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
                f'{HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
                'font-family="sans-serif" font-size="13">',
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
                *self.parts,
                "</svg>\n",
            ]
        ).encode()


class Png:
    """The same as pixels, drawn at three times the size and reduced."""

    FINER = 3

    def __init__(self) -> None:
        self.image = Image.new(
            "RGB", (WIDTH * self.FINER, HEIGHT * self.FINER), "white"
        )
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(13 * self.FINER)

    def line(self, points: Points, colour: str, width: float, faint: bool) -> None:
        """A polyline."""
        if faint:
            parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
            colour = "#" + "".join(f"{int(255 - 0.45 * (255 - p)):02x}" for p in parts)
        scaled = [(x * self.FINER, y * self.FINER) for x, y in points]
        self.pen.line(scaled, colour, round(width * self.FINER), joint="curve")

    def dot(self, x: float, y: float, colour: str) -> None:
        """A filled circle."""
        self.pen.circle((x * self.FINER, y * self.FINER), 3 * self.FINER, colour)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """Text at its middle height; anchor: start, middle or end."""
        letter = {"start": "l", "middle": "m", "end": "r"}[anchor]
        at = x * self.FINER, y * self.FINER
        self.pen.text(at, text, GREY, self.font, anchor=f"{letter}m")

    def content(self) -> bytes:
        """The file."""
        out = io.BytesIO()
        size = WIDTH * 2, HEIGHT * 2
        self.image.resize(size, Image.Resampling.LANCZOS).save(out, "PNG")
        return out.getvalue()


def draw(found: Sequence[Curve], axis: str, canvas: Svg | Png) -> bytes:
    """The content of a picture of the curves."""
    xs, ys = _scales(found, 10, 8)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + xs(x) * (right - LEFT), bottom - ys(y) * (bottom - TOP)

    for y, text in ys.marks:
        height = at(xs.low, y)[1]
        canvas.line([(LEFT, height), (right, height)], GRID, 1, False)
        canvas.text(LEFT - 8, height, text, "end")
    for x, text in xs.marks:
        left = at(x, ys.low)[0]
        canvas.line([(left, bottom), (left, bottom + 5)], GREY, 1, False)
        canvas.text(left, bottom + 16, text, "middle")
    canvas.line([(LEFT, TOP), (LEFT, bottom), (right, bottom)], GREY, 1, False)
    canvas.text((LEFT + right) / 2, HEIGHT - 12, axis, "middle")
    for curve in sorted(found, key=lambda curve: not curve.thin):
        colour = COLOURS[curve.colour % len(COLOURS)]
        points = [at(*point) for point in curve.points]
        canvas.line(points, colour, 1.5 if curve.thin else 2, curve.thin)
        if not curve.thin and len(points) <= 40:
            for x, y in points:
                canvas.dot(x, y, colour)
    # Losses fall: the upper right corner is free.
    for row, curve in enumerate(found):
        y = TOP + 12 + 18 * row
        colour = COLOURS[curve.colour % len(COLOURS)]
        canvas.line([(right - 34, y), (right - 8, y)], colour, 2, curve.thin)
        canvas.text(right - 42, y, f"{curve.run}  {curve.metric}", "end")
    return canvas.content()


def _scales(found: Sequence[Curve], across: int, up: int) -> tuple[Scale, Scale]:
    xs, ys = zip(*(point for curve in found for point in curve.points), strict=True)
    return Scale(xs, across), Scale(ys, up, wide=True)


def svg(found: Sequence[Curve], axis: str = "step") -> bytes:
    """The curves as an SVG file."""
    return draw(found, axis, Svg())


def png(found: Sequence[Curve], axis: str = "step") -> bytes:
    """The curves as a PNG file."""
    return draw(found, axis, Png())


FORMATS = {".svg": svg, ".png": png}


def terminal(
    found: Sequence[Curve],
    axis: str = "step",
    columns: int = 80,
    rows: int = 16,
    braille: bool = True,
    coloured: bool = False,
) -> str:
    """The curves as text: dots of Braille, or letters where these cannot be shown.

    A letter stands beside the last point of every curve.
    """
    xs, ys = _scales(found, 8, 8)
    edge = max(len(text) for _, text in ys.marks) if ys.marks else 0
    wide = max(16, columns - edge - 4)
    cells: dict[tuple[int, int], tuple[int, int]] = {}  # (row, column): dots, curve
    letters: dict[int, list[int]] = {}
    for number, curve in enumerate(found):
        dots = [
            (round(xs(x) * (2 * wide - 1)), round((1 - ys(y)) * (4 * rows - 1)))
            for x, y in curve.points
        ]
        for x, y in _joined(dots):
            at = y // 4, x // 2
            cells[at] = (cells.get(at, (0, 0))[0] | BRAILLE[y % 4][x % 2], number)
        letters.setdefault(dots[-1][1] // 4, []).append(number)

    def paint(text: str, number: int) -> str:
        code = ANSI[found[number].colour % len(ANSI)]
        return f"\x1b[{code}m{text}\x1b[0m" if coloured else text

    marks = {round((1 - ys(y)) * (rows - 1)): text for y, text in ys.marks}
    lines = []
    for row in range(rows):
        text = ""
        for column in range(wide):
            dots, number = cells.get((row, column), (0, 0))
            shown = chr(0x2800 + dots) if braille else _letter(number)
            text += paint(shown, number) if dots else " "
        ends = "".join(paint(_letter(n), n) for n in letters.get(row, []))
        lines.append(f"{marks.get(row, ''):>{edge}} |{text} {ends}".rstrip())
    under = [" "] * (wide + 12)
    for x, text in xs.marks:
        start = round(xs(x) * (wide - 1))
        under[start : start + len(text)] = text
    lines += [" " * edge + " +" + "-" * wide]
    lines += [" " * (edge + 2) + "".join(under).rstrip() + f"  {axis}"]
    lines += [
        f"  {paint(_letter(n), n)}  {curve.run}  {curve.metric}: "
        f"{curve.points[0][1]:.4g} -> {curve.points[-1][1]:.4g}"
        for n, curve in enumerate(found)
    ]
    return "\n".join(lines)


# Bits of the dots of a character by row and column (Unicode, block 2800).
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26)


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots and those on the straight lines between them."""
    found = list(dots[:1])
    for (x, y), (to, down) in itertools.pairwise(dots):
        count = max(abs(to - x), abs(down - y), 1)
        found += [
            (round(x + (to - x) * i / count), round(y + (down - y) * i / count))
            for i in range(1, count + 1)
        ]
    return found


def run(
    workdirs: Sequence[str],
    names: Sequence[str] = (),
    axis: str = "step",
    output: str = "",
) -> str:
    """The chart for a terminal; the picture is written to `output` if that is given."""
    kind = os.path.splitext(output)[1].lower()
    if output and kind not in FORMATS:
        raise UserError(f"--output={output}: its name must end with .svg or .png")
    found = curves(workdirs, names, axis)
    if output:
        path = paths.absolute(output)
        with files.replacing(path, binary=True) as f:
            f.write(FORMATS[kind](found, axis))
    try:
        "\u28ff".encode(getattr(sys.stdout, "encoding", None) or "ascii")
        braille = True
    except UnicodeEncodeError:
        braille = False
    live = sys.stdout is not None and sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns
    return terminal(found, axis, columns, braille=braille, coloured=live)


def main(argv: list[str]) -> None:
    """Prints the chart."""
    flag = flags.FLAGS
    if len(argv) < 2:
        raise UserError("plot: no workdir is named; name one or more")
    print(run(argv[1:], flag.metric, flag.x, flag.output))


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string("output", "", "Output file: .svg or .png.")
    flags.DEFINE_multi_string(
        "metric", [], "Metric to draw, as eval/accuracy; repeatable; default: losses."
    )
    flags.DEFINE_enum("x", "step", list(AXES), "Quantity on the x axis.")


def cli(argv: Sequence[str], program: str = "plot") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, answers=True, arguments=True)


if __name__ == "__main__":
    cli(sys.argv)
