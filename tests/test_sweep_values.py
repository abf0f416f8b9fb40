"""Which runs a sweep has, and what their folders are called."""

import json
import math
import os

import numpy as np
import pytest

from triform.runtime.errors import UserError
from triform.sweeps import runs
from triform.sweeps.values import (
    Range,
    Search,
    chain,
    checked,
    combined,
    grid,
    linear,
    log,
    name_of,
    product,
    sample,
    search,
    zipped,
)

FLOATS = {"lr": float, "b2": float, "seed": int}


def plan(*texts, method="", first=None, numbers=FLOATS):
    return combined(texts, method, first, numbers)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0,1,2", ("0", "1", "2")),
        ("RUN,", ("RUN", "")),
        ("(16,),(16, 32)", ("(16,)", "(16, 32)")),
        ("((1,2),(3,)),((4,),)", ("((1,2),(3,))", "((4,),)")),
        ("[1,2],[3]", ("[1,2]", "[3]")),
        ("('a,b', 2),('c', 3)", ("('a,b', 2)", "('c', 3)")),
        ("'a,b',c", ("a,b", "c")),
        ('"a,b","c"', ("a,b", "c")),
        ("it's,that's", ("it's", "that's")),
        (" 1, 'a,b' ,(2, 3) ,' c'", ("1", "a,b", "(2, 3)", " c")),
        ("a=b,c=d", ("a=b", "c=d")),
        ("3", ("3",)),
        ("log:1e-4:1e-2:3", ("0.0001", "0.001", "0.01")),
        ("linear:0:0.3:4", ("0", "0.1", "0.2", "0.3")),
    ],
)
def test_values_are_what_stands_between_commas_and_ranges(text, found):
    assert plan(f"lr={text}") == [{"lr": x} for x in found]


def test_ranges_of_whole_numbers_hold_whole_numbers():
    assert plan("n=linear:1:4:4", numbers={"n": int}) == [
        {"n": x} for x in ("1", "2", "3", "4")
    ]
    space = plan("n=log:8:512", method="tpe:4", numbers={"n": int}).space
    assert space == {"n": Range(8.0, 512.0, log=True, integer=True)}


@pytest.mark.parametrize(
    ("texts", "method", "message"),
    [
        (["seed"], "", "expected KEY=VALUE,VALUE"),
        (["seed="], "", "expected KEY=VALUE,VALUE"),
        (["lr=log:1e-4"], "", "KEY=log:LOW:HIGH"),
        (["lr=log:1e-4:1e-2:x"], "", "KEY=log:LOW:HIGH"),
        (["seed=0,1,0"], "", "stands there twice"),
        (["seed=0,1", "seed=2,3"], "", "named twice"),
        (["lr=(1,2"], "", "is missing"),
        (["lr='a,b"], "", "is missing"),
        (["lr=log:1e-2:1e-4:3"], "", "must be the smaller"),
        (["lr=log:0:1"], "random:3", "use linear"),
        (["lr=log:1:2:1"], "", "at least 2"),
        (["lr=log:1e-4:1e-2"], "", "--search=random"),
        (["name=log:1:2"], "random:3", "no number"),
        (["lr=1,2"], "grid:3", "expected random:N or tpe:N"),
        (["seed=0,1"], "tpe:3", "nothing to search"),
        (["seed=linear:0:9", "lr=1,2"], "tpe:3", "list the seeds"),
    ],
)
def test_what_cannot_be_swept_is_said_before_the_first_run(texts, method, message):
    with pytest.raises(UserError, match=message):
        plan(*texts, method=method)


def test_plans_combine():
    sizes = zipped({"d": (64, 128), "f": (256, 512)})
    assert sizes == [{"d": "64", "f": "256"}, {"d": "128", "f": "512"}]
    both = product(sizes, grid({"seed": range(2)}))
    assert len(both) == 4 and both[1] == {"d": "64", "f": "256", "seed": "1"}
    assert chain(sizes, sizes[:1], [{"f": "256", "d": "64"}]) == sizes
    assert grid({"lr": log(1e-4, 1e-2, 3), "w": [(1, 2), "a,b", None, True]})[-1] == {
        "lr": "0.01",
        "w": "True",
    }
    with_flags = plan("seed=0,1", first=sizes)
    assert with_flags == both
    for wrong in (
        lambda: zipped({"d": (1, 2), "f": (1,)}),
        lambda: product(sizes, grid({"d": (1, 2)})),
        lambda: grid({"lr": log(1e-4, 1e-2)}),
        lambda: grid({"lr": 3}),
        lambda: grid({"lr": ()}),
        lambda: plan("d=1,2", first=sizes),
    ):
        with pytest.raises(UserError):
            wrong()


def test_what_a_file_returns_becomes_text():
    """Numbers of NumPy, and rows that were written by hand."""
    rates = np.array([0.5, 0.25])
    assert grid({"lr": rates, "n": np.arange(1)})[0] == {"lr": "0.5", "n": "0"}
    row = {"seed": 1, "lr": np.float64(0.1), "w": (1, 2), "x": np.array([3, 4])}
    found = {"seed": "1", "lr": "0.1", "w": "(1, 2)", "x": "[3, 4]"}
    assert checked([row, row]) == [found]
    assert checked(search({"lr": rates}, 3)).space == {"lr": ("0.5", "0.25")}
    for wrong in (None, [], {"seed": 1}, [{}], ["seed=1"], 3):
        with pytest.raises(UserError, match="expected a list of {key: value}"):
            checked(wrong)


def test_more_trials_and_more_keys_keep_the_draws_of_random_search():
    space = {"lr": log(1e-4, 1e-2), "b2": linear(0.9, 0.99)}
    few, many = sample(space, 8), sample(space, 32)
    assert many[:8] == few
    assert [x["lr"] for x in sample({"lr": space["lr"]}, 8)] == [x["lr"] for x in few]
    assert sample(space, 8, seed=1) != few
    rates = [float(x["lr"]) for x in sample(space, 400)]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    below = sum(rate < 1e-3 for rate in rates) / len(rates)
    assert below == pytest.approx(0.5, abs=0.1)  # even on a logarithmic scale


def test_seeds_repeat_every_trial():
    found = plan("lr=log:1e-4:1e-2", "seed=0,1,2", method="random:4")
    assert len(found) == 12
    assert len({x["lr"] for x in found}) == 4
    found = plan("lr=log:1e-4:1e-2", "seed=0,1,2", method="tpe:4")
    assert found == Search({"lr": Range(1e-4, 1e-2, log=True)}, 4, ("0", "1", "2"))
    assert search({"lr": log(1e-4, 1e-2)}, 4, seeds=range(3)) == found


def test_a_mean_over_seeds_has_its_number_and_the_best_row_is_first(tmp_path):
    sweep = runs.Sweep(str(tmp_path), "", [], "", 1, "eval/loss", "min")

    def row(rate, seed, loss, state="finished"):
        settings = {"lr": rate, "seed": seed}
        scores = {"best": {"eval/loss": loss}, "test": {"test/loss": loss + 1}}
        return {"settings": settings, "state": state, **scores}

    rows = [row("1", "0", 2.0), row("2", "0", 1.0), row("1", "1", 4.0)]
    rows += [row("2", "1", 0.0, "failed"), row("3", "0", math.inf)]
    best, other, last = runs.ranked(runs.summarise(rows), sweep)
    assert best["name"] == "lr=2" and best["scores"]["eval/loss"] == (1.0, 0.0, 1)
    mean, spread, count = other["scores"]["test/loss"]
    assert (mean, count) == (4.0, 2) and spread == pytest.approx(2**0.5)
    assert last["scores"]["eval/loss"][0] == math.inf
    sweep.mode = "max"
    names = [x["name"] for x in runs.ranked(runs.summarise(rows), sweep)]
    assert names == ["lr=3", "lr=1", "lr=2"]


def test_sweep_json_gives_the_sweep_back(tmp_path):
    space = {"lr": Range(1e-4, 1e-2, log=True), "w": ("a", "(1, 2)")}
    sweep = runs.Sweep(str(tmp_path), "gpt2", ["--config.steps=3"], "/", 3, "m", "max")
    sweep.search, sweep.jobs, sweep.prune = Search(space, 9, ("0", "1")), 2, True
    sweep.members = [sweep.member({"lr": "0.1", "steps": "7"})]
    sweep.others = [{"lr": "0.2"}]
    runs.write(sweep)
    assert runs.read(str(tmp_path)) == sweep
    assert sweep.members[0].steps == 7
    assert runs.read(str(tmp_path / "none")) is None
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": []}))
    with pytest.raises(UserError, match="remove the file"):
        runs.read(str(tmp_path))


NASTY = [
    *("", "none", "/", "a/run", "b/run", "a/run/", "run", "a/b/run", ".", "..", "../a"),
    *(" ", "a b", "a_b", "a  b", "a=b", "(1,2)", "(1, 2)", "[1,2]", "1,2", "1e-3"),
    *("0.001", "A", "a", "RUN", "~", "~/a", "\u00e9", "e\u0301", "\u65e5\u672c", "\n"),
    *("x" * 300, "x" * 301, "y" * 20 + "/" + "x" * 300, "\udc80", "a\\b", "a:b", "*"),
]


def test_names_of_runs_are_other_ones_for_other_settings_and_fit_into_a_folder(
    tmp_path,
):
    settings = [
        {"init_from": a, "data.tokenizer.path": b} for a in NASTY for b in NASTY
    ]
    settings += [{"optim.b2": a} for a in NASTY] + [{"decay.b2": a} for a in NASTY]
    settings += [{"a": x, "seed": "0"} for x in NASTY]
    settings += [dict.fromkeys(map(str, range(n)), "x" * 40) for n in range(2, 9)]
    names = [name_of(x) for x in settings]
    assert len({x.casefold() for x in names}) == len(settings)
    for name in names:
        assert "/" not in name and len(os.fsencode(name)) <= 255
    for name in names[-9:]:
        (tmp_path / name).mkdir()
    # Flags in another order name the same runs.
    orders = {"seed": "0", "optim.b2": "0.95"}, {"optim.b2": "0.95", "seed": "0"}
    assert {name_of(x) for x in orders} == {"optim.b2=0.95,seed=0"}
