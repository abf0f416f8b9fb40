"""Recommendation: ranks with ties, splits by position, draws, and what is answered."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform import input_pipeline, models, tasks
from triform.data import datasets, store
from triform.data.codecs import files
from triform.data.datasets import (
    EVALUATION,
    Epoch,
    InteractionsConfig,
    MaskedInteractionsConfig,
)
from triform.data.datasets.interactions import outside, packed
from triform.models import RecommenderConfig
from triform.models.config import TransformerConfig
from triform.runtime.errors import DataError
from triform.tasks import Context, SampledItemsConfig, ranking

# --- Ranks ---


def metrics_of(own, others):
    """By hand: the mean over all orders of the items that have the same score."""
    above = sum(x > own for x in others)
    ties = sum(x == own for x in others)
    ranks = range(above + 1, above + ties + 2)
    found = {"mrr": np.mean([1 / r for r in ranks])}
    for k in ranking.CUTOFFS:
        found[f"hr_{k}"] = np.mean([r <= k for r in ranks])
        gains = [1 / math.log2(r + 1) if r <= k else 0 for r in ranks]
        found[f"ndcg_{k}"] = np.mean(gains)
    return found


def measure(function, *args):
    """(Ranked, expected ranks, metrics), compiled."""

    def run(*args):
        found = function(*args)
        return found, found.place(), found.metrics()

    return jax.jit(run)(*args)


def integers(rows, items, width=3, seed=0):
    """States and items whose products are exact, with many ties."""
    rng = np.random.default_rng(seed)
    states = rng.integers(-2, 3, (rows, width)).astype(np.float32)
    return states, rng.integers(-2, 3, (items, width)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_ranks_are_those_of_all_scores_however_they_are_divided(monkeypatch, chunk):
    monkeypatch.setattr(ranking, "CHUNK", chunk)
    states, items = integers(9, 60)
    states[0] = 0  # all items alike
    own = np.arange(9) * 6
    left_out = np.array([[5, 5, -1]] * 9)
    left_out[3] = own[3]  # it is never left out itself
    scores = states @ items.T
    for without in (None, left_out):
        found, place, measured = measure(ranking.ranked, states, items, own, without)
        assert measured.keys() == set(ranking.NAMES)
        for row in range(len(own)):
            gone = set() if without is None else set(without[row].tolist())
            others = [
                x for i, x in enumerate(scores[row]) if i not in gone | {own[row]}
            ]
            mine = scores[row, own[row]]
            for name, value in metrics_of(mine, others).items():
                assert measured[name][row] == pytest.approx(value, rel=2e-5), name
            assert place[row] == pytest.approx(
                1 + sum(x > mine for x in others) + sum(x == mine for x in others) / 2
            )
        log_z = np.log(np.exp(scores).sum(1))
        np.testing.assert_allclose(found.log_z, log_z, rtol=1e-5)
        np.testing.assert_array_equal(found.score, scores[np.arange(9), own])


def test_scores_that_are_alike_are_right_by_chance():
    inputs = np.zeros((1, 2)), np.ones((50, 2)), np.array([7])
    assert measure(ranking.ranked, *inputs)[2]["hr_10"] == pytest.approx(10 / 50)


def test_candidates_may_repeat_and_hold_the_target():
    states, items = integers(4, 30)
    own = np.array([3, 4, 5, 6])
    candidates = np.array([[3, 8, 8], [9, 9, 9], [1, 2, 29], [6, 6, 0]])
    among = ranking.ranked_among
    measured = measure(among, states, items, own, candidates)[2]
    scores = states @ items.T
    for row, others in enumerate(candidates):
        expected = metrics_of(scores[row, own[row]], scores[row, others])
        for name, value in expected.items():
            assert measured[name][row] == pytest.approx(value, rel=2e-5)


@pytest.mark.parametrize("chunk", [4, 100])
def test_the_best_are_those_of_all_scores(monkeypatch, chunk):
    monkeypatch.setattr(ranking, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    states, items = rng.standard_normal((3, 5)), rng.standard_normal((37, 5))
    scores, ids = ranking.best(states.astype("f4"), items.astype("f4"), 6)
    expected = np.argsort(-(states @ items.T), 1)[:, :6]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(
        scores, np.take_along_axis(states @ items.T, expected, 1), rtol=1e-5
    )


# --- Splits ---


def config(path, kind=InteractionsConfig, **fields):
    made = kind(source=str(path), cache_dir=str(path.parent / "cache"), **fields)
    made.validate()
    return made


def opened(made, split="train"):
    codecs = files.build(made, {"num_items": -1})
    count = codecs["items"].size
    sizes = {"num_items": count, "num_inputs": count + made.MASKED}
    return datasets.dataset(made, split, codecs, sizes)


LOG = "a 9\nb 10\na 10\nc 9\nb 2\na 2\nd 1\na 30\nd 2\nd 30\n\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(LOG)
    return path


def test_splits_are_positions_of_one_sequence(log):
    made = config(log)
    source = store.origin(made, made.source)
    assert source.splits() == ("train", "validation", "test")
    # Numbers in their order, not 10 before 2.
    assert source.classes("item") == ("1", "2", "9", "10", "30")
    found = {s: [*source.examples(s)] for s in source.splits()}
    a = ["9", "10", "2", "30"]
    # b has two items, so both are for training; c has one; d has one left to train on.
    assert found["train"] == [
        {"user": "a", "item": a[:2]},
        {"user": "b", "item": ["10", "2"]},
    ]
    d = {"user": "d", "item": ["1", "2"]}
    assert found["validation"] == [{"user": "a", "item": a[:3]}, d]
    d = {"user": "d", "item": ["1", "2", "30"]}
    assert found["test"] == [{"user": "a", "item": a}, d]
    assert [*source.examples("test[1:]")] == [d]
    assert source.where("test", 1).endswith("log.txt, user d")


def test_inputs_end_before_the_target_and_on_the_right(log):
    made = config(log, max_len=2)
    for split, inputs, target in (
        ("train", [[0, 9]], 10),
        ("validation", [[9, 10]], 2),
        ("test", [[10, 2]], 30),
    ):
        dataset = opened(made, split)
        names = dataset.codecs["items"].names
        batches = input_pipeline.Batches(dataset)
        _, batch = next(batches.evaluation())
        shown = np.where(batch["segments"][0] > 0, batch["inputs"][0], -1)
        shown = [int(names[i]) if i >= 0 else 0 for i in shown]
        assert shown == inputs[0]
        assert names[batch["targets"][0, -1]] == str(target)
        assert batch["weights"][0].tolist() == [0, 1]
        assert dataset.input_text(0) == {"test": "9 10 2"}.get(
            split, "9 10" if split == "validation" else "9"
        )


@pytest.mark.parametrize(
    ("name", "text", "fields"),
    [
        ("x.csv", "who,what,when\nb,7,5\na,007,9\na,7,1\nb,x,4\na,y,9\n", {}),
        ("x.jsonl", '{"who":"a","what":["7","007","y"],"when":[1,9,9]}\n', {}),
        ("x.txt", "a 007 9\na y 9\na 7 1\n", {"user": "user", "items": "item"}),
    ],
)
def test_items_are_in_the_order_of_time(tmp_path, name, text, fields):
    path = tmp_path / name
    path.write_text(text)
    time = "time" if "user" in fields else "when"
    names = {"user": "who", "items": "what", "time": time, **fields}
    source = store.origin(config(path, **names), str(path))
    by_user = {x[names["user"]]: x for x in source.examples("test")}
    assert by_user["a"][names["items"]] == ["7", "007", "y"]
    assert by_user["a"][time] == [1, 9, 9]
    assert source.splits() == ("train", "validation", "test")


def test_the_published_log_is_the_same_as_a_file_of_it(tmp_path, shared_data):
    folder = shared_data("sasrec_video")
    made = InteractionsConfig(data_dir=str(tmp_path), cache_dir=str(tmp_path / "c"))
    logs = [
        store.origin(dataclasses.replace(made, source=source), source).log
        for source in ("sasrec_video", f"{folder}/Video.txt.gz")
    ]
    for name, x in vars(logs[0]).items():
        np.testing.assert_array_equal(x, getattr(logs[1], name), name)
    assert (len(logs[0].users), len(logs[0].items)) == (31_013, 23_715)
    assert len(logs[0].ids) == 287_107


def test_an_example_may_be_all_of_a_user(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"item": [3, 1, 2]}\n{"item": [3, 1, 1]}\n')
    source = store.origin(config(path, user=""), str(path))
    items = [x["item"] for x in source.examples("test")]
    assert items == [["3", "1", "2"], ["3", "1", "1"]]


@pytest.mark.parametrize(
    ("text", "fields", "parts"),
    [
        ("a 1\nb 2 3 4 5\n", {}, ("line 2", "5 words", "user item")),
        ("a\n", {}, ("line 1", "2 or 3")),
        ("a 1\n", {"time": "time"}, ("data.time", "line 1", "'user', 'item'")),
        ("a 1\n", {"items": "song"}, ("data.items='song'", "'user', 'item'")),
    ],
)
def test_what_is_no_log_is_told_with_its_line(tmp_path, text, fields, parts):
    path = tmp_path / "x.txt"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        opened(config(path, **fields))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_files_by_split_need_times(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("a 1 1\na 2 2\na 3 3\n")
    made = config(folder)
    with pytest.raises(DataError, match="divided by position.*set data.time"):
        opened(made)
    made.time = "time"
    assert len(opened(made, "test").history(0)) == 6


@pytest.mark.parametrize("split", ["train+test", "all", "dev"])
def test_a_split_that_is_no_position_is_refused(log, split):
    made = config(log)
    with pytest.raises(DataError, match="expected one of train, validation, test"):
        store.origin(made, made.source).examples(split)


def test_items_that_the_run_has_never_seen_are_named(log, tmp_path):
    dataset = opened(config(log))
    other = tmp_path / "other.txt"
    other.write_text("a 9\na 77\na 2\n")
    with pytest.raises(DataError, match="1 of its 3 items.*'77'"):
        datasets.dataset(
            config(other), "test", dataset.codecs, dict(dataset.model_sizes)
        )


# --- Rows and draws ---

ITEMS = 40


def written(tmp_path, change=False, users=30, seed=0):
    """A log of users with 1 to 12 items; `change`: others as the last two."""
    rng = np.random.default_rng(seed)
    path = tmp_path / f"log{change}.txt"
    lines = [f"all {i}" for i in range(ITEMS)]  # so that all items are in both
    for user in range(users):
        items = rng.permutation(ITEMS)[: rng.integers(1, 13)]
        if change and len(items) > 2:
            items[-2:] = (items[-2:] + 1) % ITEMS
        lines += [f"u{user} {i}" for i in items]
    path.write_text("\n".join(lines) + "\n")
    return path


def epochs(dataset, *numbers, seed=3):
    """All training rows of these epochs, one batch each."""
    dataset.config = dataclasses.replace(dataset.config, batch_size=len(dataset.rows))
    batches = input_pipeline.Batches(dataset)
    return [
        batches.collate(0, np.arange(len(dataset.rows)), Epoch(seed, number, True))
        for number in numbers
    ]


def users_of(batch):
    """(inputs, targets, negatives) of every user in the rows."""
    for row, segments in enumerate(batch["segments"]):
        for number in range(1, segments.max() + 1):
            at = segments == number
            yield tuple(batch[k][row][at] for k in ("inputs", "targets", "negatives"))


def test_what_is_left_out_changes_nothing_in_training(tmp_path):
    fields = {"max_len": 8, "negatives": 2}
    first, second = (
        epochs(opened(config(written(tmp_path, change), **fields)), 0, 1)
        for change in (False, True)
    )
    for a, b in zip(first, second, strict=True):
        for name, x in a.items():
            np.testing.assert_array_equal(x, b[name], name)
    test = [opened(config(written(tmp_path, c)), "test") for c in (False, True)]
    assert any((test[0].history(i) != test[1].history(i)).any() for i in range(9))


def test_every_user_is_in_one_row_of_every_epoch(tmp_path):
    dataset = opened(config(written(tmp_path), max_len=8))
    expected = sorted(
        tuple(dataset.history(i)[-9:].tolist()) for i in range(len(dataset))
    )
    found = epochs(dataset, 0, 1)
    for batch in found:
        whole = [(*x[:1].tolist(), *y.tolist()) for x, y, _ in users_of(batch)]
        assert sorted(whole) == expected
        for inputs, targets, _ in users_of(batch):
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
        # The last item of a user has the last position.
        last = batch["segments"] != np.pad(batch["segments"], ((0, 0), (0, 1)))[:, 1:]
        last &= batch["segments"] > 0
        assert (batch["positions"][last] == 7).all()
        np.testing.assert_array_equal(batch["weights"] > 0, batch["segments"] > 0)
    assert (found[0]["inputs"] != found[1]["inputs"]).any()
    assert dataset.lengths.sum() / (8 * len(dataset.rows)) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_packing_holds_every_length_once(seed):
    lengths = np.random.default_rng(seed).integers(1, 11, 200)
    rows = packed(lengths, 10)
    assert sorted(itertools.chain(*rows)) == sorted(lengths.tolist())
    assert max(map(sum, rows)) <= 10
    # Nothing that comes later would fit into an earlier row.
    for at, row in enumerate(rows[:-1]):
        assert 10 - sum(row) < min(itertools.chain(*rows[at + 1 :]))


def test_negatives_depend_on_seed_epoch_and_user_alone(tmp_path):
    path = written(tmp_path)

    def drawn(max_len, number, seed=3):
        (batch,) = epochs(opened(config(path, max_len=max_len)), number, seed=seed)
        return {tuple(y.tolist()): n for _, y, n in users_of(batch)}

    first = drawn(38, 0)
    again = drawn(60, 0)  # other rows
    assert first.keys() == again.keys()
    for user, negatives in first.items():
        np.testing.assert_array_equal(negatives, again[user])
    for other in (drawn(38, 1), drawn(38, 0, seed=4)):
        same = [np.array_equal(first[user], other[user]) for user in first]
        assert sum(same) < len(same) / 2


def test_draws_are_uniform_outside_what_a_user_has():
    taken = np.array([0, 1, 4, 6, 9])
    others = [2, 3, 5, 7, 8]
    assert outside(taken, np.arange(5)).tolist() == others
    assert outside(taken[:0], np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_candidates_are_drawn_once_and_leave_out_training_alone(tmp_path, split):
    made = config(written(tmp_path), candidates=400, candidate_users=10)
    dataset = opened(made, split)
    batches = input_pipeline.Batches(dataset)
    (first, again) = ([*batches.evaluation()] for _ in range(2))
    weights = 0
    for (items, batch), (_, same) in zip(first, again, strict=True):
        np.testing.assert_array_equal(batch["candidates"], same["candidates"])
        weights += batch["candidate_weights"].sum()
        for row, item in enumerate(items):
            user = dataset._ids[dataset._starts[item] : dataset._ends[item]]
            met = set(batch["candidates"][row].tolist())
            if len(user) < ITEMS:
                # 400 draws of at most 40: all are met, the last two of a user too.
                assert met == set(range(ITEMS)) - set(user[:-2].tolist())
    assert weights == 10
    made.candidate_seed = 1
    other = next(input_pipeline.Batches(opened(made, split)).evaluation())[1]
    assert (other["candidates"] != first[0][1]["candidates"]).any()


def test_a_user_with_all_items_leaves_nothing_to_draw(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a 1\na 2\n")
    with pytest.raises(DataError, match="user a: has all 2 items"):
        epochs(opened(config(path)), 0)


def test_masked_items_are_the_targets(tmp_path):
    path = written(tmp_path)
    fields = {"max_len": 8, "mask_rate": 0.5, "last_rate": 0.25}
    dataset = opened(config(path, MaskedInteractionsConfig, **fields))
    mask, last, users = ITEMS, 0, 0
    for batch in epochs(dataset, *range(20)):
        assert "negatives" not in batch
        chosen = batch["weights"] > 0
        np.testing.assert_array_equal(batch["inputs"] == mask, chosen)
        for row, segments in enumerate(batch["segments"]):
            for number in range(1, segments.max() + 1):
                mine = chosen[row][segments == number]
                n = len(mine)
                count = max(1, round(n / 2))
                assert mine.sum() in (1, count)
                if count > 1:
                    last, users = last + (mine.sum() == 1), users + 1
                    assert mine.sum() > 1 or mine[-1]
    assert last / users == pytest.approx(0.25, abs=0.05)
    test = opened(config(path, MaskedInteractionsConfig, **fields), "test")
    batch = input_pipeline.Batches(test).collate(0, np.arange(4), EVALUATION)
    assert (batch["inputs"][:4, -1] == mask).all()
    for row in range(4):
        history = test.history(row)
        assert batch["targets"][row, -1] == history[-1]
        kept = batch["inputs"][row, batch["segments"][row] > 0][:-1]
        np.testing.assert_array_equal(kept, history[:-1][-7:])


def test_users_in_one_row_are_as_users_in_rows_of_their_own(tmp_path):
    trunk = TransformerConfig(
        num_layers=1, d_model=8, num_heads=1, d_ff=8, max_len=12, positions="learned"
    )
    model = models.build(RecommenderConfig(trunk, ITEMS))
    task = tasks.build(SampledItemsConfig(), model)

    @jax.jit
    def total(batch):
        variables = task.init(jax.random.key(0), batch)
        ctx = Context(jnp.int32(0), {}, True)
        outputs, _ = task.outputs(variables, batch, ctx)
        return task.terms(outputs, batch, ctx)["item"]

    totals = []
    for alone in (False, True):
        dataset = opened(config(written(tmp_path), max_len=12))
        if alone:
            dataset.rows = [[length] for length in dataset.lengths.tolist()]
        (batch,) = epochs(dataset, 0)
        missing = len(dataset) - len(dataset.rows)
        assert (missing > 0) != alone
        pad = {k: [(0, missing), *[(0, 0)] * (x.ndim - 1)] for k, x in batch.items()}
        totals.append(float(total({k: np.pad(x, pad[k]) for k, x in batch.items()})))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


# --- Answers ---


def test_answers_leave_out_all_of_a_history(log):
    made = config(log, max_len=2)
    dataset = opened(made)
    kind = datasets.requests(made, dataset.codecs, dataset.model_sizes)
    kind.most = 2
    item = kind.read("9 10 nothing 2")
    assert "1 of 4 items left out" in item.notes[0]
    assert "'nothing'" in item.notes[0]
    batch, left_out = kind.batch([item, kind.read({"item": [30]})], 2)
    assert left_out == [1, 0]
    assert batch["inputs"].tolist() == [[3, 1], [0, 4]]
    assert batch["segments"].tolist() == [[1, 1], [0, 1]]
    assert kind.flags(made, dataset.codecs) == "--input='1 2'"
    # 9, which is no longer read, has been chosen all the same.
    row = {"candidates": np.array([2, 1, 4, 0, 3]), "shares": np.arange(5)[::-1] / 5}
    assert kind.answer(item, row) == {"items": {"30": 0.4, "1": 0.2}}
    assert kind.read([9, "10"]).parts[0].tolist() == [2, 3]
    assert kind.read("").empty
