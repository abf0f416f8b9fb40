"""Curves of runs: what is drawn is what was measured, in every format."""

import io
import json
import re
import xml.etree.ElementTree as tree

import numpy as np
import pytest
from PIL import Image

from triform import plot
from triform.runtime.errors import UserError


@pytest.fixture
def workdir(tmp_path):
    """(name, losses, evaluated) -> a workdir with these lines, every 10 steps."""

    def make(name, losses, evaluated=()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [
            {"step": 10 * i, key: x, "time": 3600.0 * i, "tokens": 64 * i}
            for key, values in (("train/loss", losses), ("eval/loss", evaluated))
            for i, x in enumerate(values, 1)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"step": 99')  # torn by a kill
        return str(folder)

    return make


def test_points_are_the_lines_of_the_metric_over_steps_tokens_or_hours(workdir):
    run = workdir("a", [3.0, 2.0, "nan", 1.0], [2.5])
    for axis, xs in (("step", (10, 20, 40)), ("tokens", (64, 128, 256))):
        train, evaluated = plot.curves([run], axis=axis)
        assert train.points == list(zip(xs, (3.0, 2.0, 1.0), strict=True))
        assert (train.metric, evaluated.metric) == ("train/loss", "eval/loss")
        assert train.colour == evaluated.colour
    hours = plot.curves([run], ["train/loss"], "hours")[0]
    assert [x for x, _ in hours.points] == [0.0, 1.0, 3.0]


def test_runs_are_named_by_what_tells_them_apart(workdir):
    runs = [workdir(name, [1.0, 2.0]) for name in ("x/a", "y/a")]
    assert [c.run for c in plot.curves(runs)] == ["x/a", "y/a"]
    assert [c.run for c in plot.curves([runs[0], runs[0]])] == ["a", "a"]
    assert {c.colour for c in plot.curves(runs)} == {0, 1}


def test_what_is_missing_is_named_with_what_is_there(workdir, tmp_path):
    with pytest.raises(UserError, match="no number of that name; there are train/loss"):
        plot.curves([workdir("a", [1.0])], ["eval/bleu"])
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        plot.curves([str(tmp_path)])
    with pytest.raises(UserError, match=r"must end with \.svg or \.png"):
        plot.run([workdir("b", [1.0])], output="curve.gif")


def test_a_picture_shows_every_point_at_its_place(workdir):
    """Of SVG: heights of the points are a linear function of the losses."""
    losses = [4.0, 3.0, 1.0, 0.5]
    found = plot.curves([workdir("a<b>", [1.0], losses)], ["eval/loss"])
    root = tree.fromstring(plot.svg(found))
    name = "{http://www.w3.org/2000/svg}"
    dots = [
        (float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{name}circle")
    ]
    assert len(dots) == len(losses)
    slope, start = np.polyfit(losses, [y for _, y in dots], 1)
    assert slope < 0
    np.testing.assert_allclose(
        slope * np.array(losses) + start, [y for _, y in dots], atol=0.1
    )
    assert "a<b>  eval/loss" in [text.text for text in root.iter(f"{name}text")]
    marks = [
        t.text for t in root.iter(f"{name}text") if re.fullmatch(r"[\d.]+", t.text)
    ]
    assert {"10", "20", "30", "40"} <= set(marks)


def test_png_has_the_colour_of_every_run(workdir):
    runs = [workdir(name, [1.0, x, 2.0]) for name, x in (("a", 3.0), ("b", 1.5))]
    image = Image.open(io.BytesIO(plot.png(plot.curves(runs))))
    seen = np.asarray(image.convert("RGB"))
    for colour in plot.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (seen == rgb).all(-1).any()


@pytest.mark.parametrize("braille", [True, False])
def test_in_a_terminal_a_falling_curve_falls(workdir, braille):
    found = plot.curves([workdir("a", [4.0, 3.0, 2.0, 1.0])])
    text = plot.terminal(found, columns=40, rows=8, braille=braille)
    rows = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    marks = "[\u2801-\u28ff]" if braille else "a"
    first = [re.search(marks, row).start() for row in rows if re.search(marks, row)]
    assert len(rows) == len(first) == 8
    assert first == sorted(first)
    assert first[0] < 3
    assert first[-1] > 25
    assert rows[-1].endswith("a")  # the letter of the legend
    assert "a  a  train/loss: 4 -> 1" in text
    assert max(map(len, text.splitlines())) <= 50
    assert "\x1b" not in text
    assert "\x1b[34m" in plot.terminal(found, coloured=True)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0], [-1e-9, 1e9]])
def test_any_numbers_can_be_drawn(workdir, values):
    found = plot.curves([workdir("a", values)])
    assert plot.terminal(found)
    assert plot.svg(found)


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0, 30_000], ["0", "5000", "10k", "15k", "20k", "25k", "30k"]),
        ([1.001, 1.004], ["1.001", "1.002", "1.003", "1.004"]),
    ],
)
def test_marks_are_round_numbers(values, marks):
    assert [text for _, text in plot.Scale(values, 6).marks] == marks
