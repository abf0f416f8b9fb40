"""A recommender on a log of one's own: trained, scored by both protocols, asked."""

import json

import jax
import numpy as np
import pytest
from test_recommendation import metrics_of

from triform import evaluate, generate, train, workdir
from triform.answers import inputs
from triform.answers.inputs import Asked
from triform.configs import sasrec
from triform.configs.schema import update
from triform.data.datasets import EVALUATION
from triform.input_pipeline import Split
from triform.runtime.errors import UserError

ITEMS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, scores): every item is followed by the next one of a ring."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    lines = []
    for user in range(80):
        first = rng.integers(ITEMS)
        chosen = (first + np.arange(rng.integers(4, 9))) % ITEMS
        lines += [f"u{user} item{i}" for i in chosen]
    (folder / "log.txt").write_text("\n".join(lines))
    config = sasrec.get_config("smoke")
    splits = {f"{x}_split": x for x in ("train", "validation", "test")}
    splits["eval_split"] = splits.pop("validation_split")
    data = {"source": str(folder / "log.txt"), "max_len": 6, "batch_size": 16}
    data |= {"candidates": 5, "candidate_users": 50, "cache_dir": str(folder / "c")}
    update(config, {"data": data | splits, "optim.learning_rate": 0.02})
    update(config, {"steps": 150, "evaluation.every": 75, "checkpoint.every": 75})
    trunk = {"dropout": 0.0, "attention_dropout": 0.0}
    update(config, {"model.trunk": trunk, "log_every": 50})
    path = str(folder / "run")
    return path, train.run(config, path)


def test_it_learns_what_follows_what(run):
    path, scores = run
    # By chance 5 of 24, and 5 of 6.
    assert scores["test/hr_5"] > 0.8
    assert scores["test/sampled_hr_5"] > 0.95
    with open(f"{path}/classes.json") as f:
        names = json.load(f)["items"]
    assert names == sorted(f"item{i}" for i in range(ITEMS))
    assert train.run(workdir.open_config(path), path) == scores


def test_reported_numbers_are_those_of_all_scores_by_hand(run):
    path, _ = run
    result = evaluate.run(path, "test", predictions=True)
    opened = workdir.open_run(path)
    config, sizes = opened.config, opened.experiment.sizes
    split = Split.open(config.data, opened.codecs, "test", sizes)
    apply, names = jax.jit(opened.experiment.model.apply), opened.codecs["items"].names
    every, drawn = [], []
    for items, batch in split.batches.evaluation():
        found = apply(opened.variables, batch)
        scores = np.asarray(found["states"][:, -1] @ found["items"].T)
        for row, item in enumerate(items.tolist()):
            history = split.dataset.history(item)
            own, mine = history[-1], scores[row]
            every.append(metrics_of(mine[own], np.delete(mine, own)))
            if batch["candidate_weights"][row]:
                chosen = mine[batch["candidates"][row]]
                drawn.append(metrics_of(mine[own], chosen))
            line = result.predictions[item]
            assert line["input"].split() == [names[i] for i in history[:-1]]
            assert line["items"] == names[own]
            assert line["rank"] == 1 + (np.delete(mine, own) > mine[own]).sum()
    assert len(every) == len(result.predictions) == 80
    assert len(drawn) == config.data.candidate_users
    for name in every[0]:
        for lead, parts in (("test/", every), ("test/sampled_", drawn)):
            expected = np.mean([part[name] for part in parts])
            assert result.scalars[lead + name] == pytest.approx(expected, rel=1e-4)
    # A batch is a function of nothing else.
    again = split.batches.collate(0, np.arange(4), EVALUATION)
    same = split.batches.collate(0, np.arange(4), EVALUATION)
    np.testing.assert_array_equal(again["candidates"], same["candidates"])


def test_it_lists_the_best_items_that_are_new(run):
    path, _ = run
    sampler = generate.Sampler(path, top_k=3)
    asked = ["item3 item4 item5", {"item": ["item22", "item23"]}, "item7 unknown", ""]
    first, second, third, none = sampler(asked)
    assert "item6" in first.items
    assert "item0" in second.items
    assert "item8" in third.items
    assert len(first.items) == 3
    assert not set(first.items) & {"item3", "item4", "item5"}
    assert list(first.items.values()) == sorted(first.items.values(), reverse=True)
    name, share = next(iter(first.items.items()))
    assert first.line().startswith(f"{name} ({share:.4g})  item")
    assert "'unknown'" in third.warnings[0]
    assert none.warnings[0].startswith("empty")
    with pytest.raises(UserError, match="'unknown'"):
        sampler(["item7 unknown"], strict=True)
    # Rows of a log are one request a user, in the order of their times.
    sampler.kind.config.time = "when"
    rows = [
        {"user": u, "item": f"item{i}", "when": t}
        for u, i, t in (("a", 4, "10"), ("b", 9, "1"), ("a", 3, "9"), ("c", 1, "soon"))
    ]
    asked = [Asked(x, f"line {i}") for i, x in enumerate([*rows, {"items": ["item2"]}])]
    both = [*inputs.gathered(asked, sampler.kind)]
    assert [x.value.get("user") for x in both] == ["a", "b", "c", None]
    assert both[0].value["item"] == ["item3", "item4"]
    first, second, bad, whole = sampler(both)
    assert "item5" in first.items and "item10" in second.items and whole.items
    assert "'soon' is neither a number nor a date" in bad.warnings[0]
    many = generate.Sampler(path, top_k=99)(["item1 item2"])[0]
    assert len(many.items) == ITEMS - 2
