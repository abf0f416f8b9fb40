"""What lets runs train in one program: traced numbers, groups, batches, turns."""

import copy
import dataclasses
import json
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from triform import packed
from triform.configs import listops, schema
from triform.data.datasets.base import EVALUATION, Epoch
from triform.input_pipeline import Batches, TrainBatches
from triform.models.algorithms.blockwise import blockwise
from triform.models.mask import Mask
from triform.packed import __main__ as program
from triform.packed import grouping
from triform.packed.lines import Lines
from triform.packed.pack import equal_ones_shared, joined, same_ones
from triform.packed.sharing import SharedBatches
from triform.runtime import optim
from triform.runtime.optim import OPTIMIZERS, SCHEDULES, OptimConfig
from triform.runtime.parameters import ROWS
from triform.runtime.traced import Traced, stacked
from triform.runtime.turns import Turns

CLOSE = {"rtol": 2e-5, "atol": 1e-7}


# Traced numbers


def test_a_traced_number_computes_as_the_number_and_promotes_as_it():
    numbers = [0.25, 0.5]

    def use(x, rate):
        one = x * rate + rate * x - (1 - rate) / x + x / rate - rate**2 + 2**rate
        return jnp.where(x < rate, one, -rate)

    x = jnp.linspace(0.1, 1, 7, dtype=jnp.bfloat16)
    many = jax.jit(jax.vmap(lambda rate, x: use(x, Traced(rate)), in_axes=(0, None)))
    found = many(stacked(numbers), x)
    assert found.dtype == jnp.bfloat16
    for number, row in zip(numbers, found, strict=True):
        np.testing.assert_array_equal(row, jax.jit(use)(x, number))


def test_a_traced_number_is_positive_and_no_other_number():
    number = Traced(jnp.float32(0.0))
    assert number and number > 0 and number >= 0 and number != 0 and number != 1
    assert not (number < 0 or number <= 0 or number == 0.0)
    assert copy.deepcopy({"x": number})["x"] is number
    with pytest.raises(TypeError, match="compared with 1"):
        max(1, number)


def test_dropout_of_a_traced_rate():
    x, key = jnp.ones((64, 64)), jax.random.key(0)

    def dropped(rate):
        module = nn.Dropout(rate, deterministic=False)
        return module.apply({}, x, rngs={"dropout": key})

    many = jax.jit(jax.vmap(lambda rate: dropped(Traced(rate))))
    rates = [0.0, 0.1, 0.5]
    for rate, found in zip(rates, many(stacked(rates)), strict=True):
        np.testing.assert_allclose(found, dropped(rate), rtol=1e-6)


@pytest.mark.parametrize("length", [16, 80])
def test_attention_drops_at_a_traced_rate(length):
    """Unrolled and in loops: values and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, 2, 4)), jnp.float32) for _ in range(3)
    )
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    mask = Mask.self_attention(positions, causal=True)

    def loss(inputs, rate):
        options = {"scale": 0.5, "rng": jax.random.key(1), "dropout": rate, "block": 16}
        return (blockwise(*inputs, mask, **options) ** 2).sum()

    gradient = jax.value_and_grad(loss)
    many = jax.jit(jax.vmap(lambda rate: gradient((q, k, v), Traced(rate))))
    rates = [0.1, 0.4]
    found = many(stacked(rates))
    for i, rate in enumerate(rates):
        alone = jax.jit(lambda inputs, rate=rate: gradient(inputs, rate))((q, k, v))
        one = jax.tree.map(lambda x, i=i: x[i], found)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
            one,
            alone,
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_takes_its_numbers_as_inputs(name):
    """Three updates by optim.build, every number of the config traced."""
    params = {"up": {"kernel": jnp.ones((3, 4))}, "norm": {"scale": jnp.ones(4)}}
    configs = [
        OptimConfig(name=name, schedule="cosine", warmup_steps=2, clip_norm=1.0),
        OptimConfig(
            *(name, 3e-2, "cosine", 4, 0.1, 0.8, 0.95, 1e-6),
            *(0.0 if name == "adam" else 0.1, 2.0),
        ),
    ]
    for config, decay in zip(configs, (0.9, 0.5), strict=True):
        config.ema_decay = decay
    keys = [
        field.name
        for field in dataclasses.fields(OptimConfig)
        if grouping.matches(grouping.TRACED, f"optim.{field.name}")
    ]
    assert len(keys) == 9  # all but names, patterns and the micro-batches

    def three(config, steps):
        tx = optim.build(config, steps, ROWS)
        state, now = tx.init(params), params
        for t in range(3):
            grads = jax.tree.map(lambda x, t=t: jnp.sin(x * (t + 1)), now)
            updates, state = tx.update(grads, state, now)
            now = jax.tree.map(jnp.add, now, updates)
        return now, optim.evaluation_params(now, state)

    def traced(values, steps):
        for key, x in values.items():
            if grouping.matches(grouping.ASKED, f"optim.{key}"):
                values[key] = Traced(x)
        return three(dataclasses.replace(configs[0], **values), steps)

    values = {k: stacked([getattr(c, k) for c in configs]) for k in keys}
    found = jax.jit(jax.vmap(traced))(values, stacked([7, 9]))
    for i, (config, steps) in enumerate(zip(configs, (7, 9), strict=True)):
        alone = jax.jit(lambda c=config, s=steps: three(c, s))()
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, **CLOSE), found, alone
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_its_numbers_as_inputs(name):
    make, cases = SCHEDULES[name], [(1e-3, 1, 5, 0.0), (1e-2, 4, 20, 0.1)]
    if name != "rsqrt":
        cases.append((1e-2, 0, 20, 0.1))
    columns = [stacked(column) for column in zip(*cases, strict=True)]
    steps = jnp.arange(20)
    found = jax.jit(jax.vmap(lambda *x: make(*x)(steps)))(*columns)
    for case, row in zip(cases, found, strict=True):
        np.testing.assert_allclose(row, jax.jit(make(*case))(steps), **CLOSE)


# Groups


def config(**changes):
    found = listops.get_config("smoke").resolved()
    return schema.vary(found, {"x": changes}, "x")


def grouped(*changes):
    return packed.groups([(config(**x), f"w{i}") for i, x in enumerate(changes)])


def test_what_a_program_takes_as_inputs_may_differ():
    (group,) = grouped(
        {"seed": 1},
        {"optim.learning_rate": 0.5, "model.trunk.dropout": 0.0},
        {"optim.warmup_steps": 7, "steps": 9, "task.label_smoothing": 0.3},
        {"checkpoint.every": 3, "evaluation.every": 3, "log_every": 7},
    )
    assert group.members == [0, 1, 2, 3] and not group.apart
    assert set(group.inputs) == {
        *("seed", "steps", "optim.learning_rate", "optim.warmup_steps"),
        *("model.trunk.dropout", "task.label_smoothing"),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model.trunk.d_ff": 64}, "model.trunk.d_ff=64, which is 32"),
        ({"optim.name": "lion"}, "optim.name='lion'"),
        ({"optim.clip_norm": 1.0}, "optim.clip_norm=1.0, which is 0.0"),
        (
            {"data.batch_size": 8},
            "other shapes than the first group's: data.batch_size=8",
        ),
        ({"placement": "pmap"}, "placement='pmap'"),
        ({"optim.accumulate": 2}, "optim.accumulate=2"),
    ],
)
def test_what_makes_another_program_is_said(change, told):
    first, second = grouped({}, change)
    assert (first.members, second.members) == ([0], [1])
    assert told in second.apart and "\n" not in second.apart


def test_what_is_no_config_fails_alone(tmp_path, monkeypatch, capfd):
    first, second = grouped({}, {"init_from": "~nobody_of_this_name/run"})
    assert (first.members, second.members) == ([0], [1])
    assert second.apart == "its config is not valid"
    monkeypatch.setattr(program.signals, "Interrupt", lambda: lambda: "")
    asked = []
    monkeypatch.setattr(packed, "run", lambda members, **_: asked.extend(members) or [])
    runs = [
        {"workdir": str(tmp_path / name), "config": "listops:smoke", "flags": [flag]}
        for name, flag in (("a", "--config.stepz=3"), ("b", "--config.steps=3"))
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    assert program.main(["packed", str(tmp_path / "runs.json")]) == 1
    assert "error: a: unknown config key 'stepz'" in capfd.readouterr().err
    assert (tmp_path / "a" / packed.OUTPUT).read_text().startswith("error: unknown")
    ((config, workdir),) = asked
    assert config.steps == 3 and workdir == runs[1]["workdir"]


def test_another_corpus_of_the_same_shapes_is_no_other_program():
    (group,) = grouped({}, {"data.source": "elsewhere.jsonl", "data.truncate": False})
    assert group.inputs == ()


def test_every_key_of_the_table_exists():
    """In some config: a renamed setting must be renamed in the table, too."""
    names = set(schema.flat(listops.get_config()))
    for kind in (*schema.MODELS, *schema.TASKS):
        part = "model" if kind in schema.MODELS else "task"
        with_part = dataclasses.replace(listops.get_config(), **{part: kind()})
        names |= set(schema.flat(with_part))
    for pattern in grouping.TRACED:
        for one in alternatives(pattern):
            assert any(grouping.matches((one,), name) for name in names), one


def alternatives(pattern):
    """'a(b|c)' -> 'ab', 'ac'."""
    head, bracket, rest = pattern.rpartition("(")
    if not bracket:
        return pattern.split("|")
    return [f"{head}{x}" for x in rest.rstrip(")").split("|")]


# Shared arrays and batches


def test_arrays_that_all_members_have_are_not_copied():
    x, y = jnp.arange(3), jnp.ones(2)
    trees = [{"a": x, "b": y}, {"a": jnp.arange(3), "b": y + 1}]
    trees = equal_ones_shared(trees)
    arrays, axes = joined(trees, same_ones(trees))
    assert axes == {"a": None, "b": 0}
    assert arrays["a"] is x and arrays["b"].shape == (2, 2)


class Numbers:
    """A dataset whose items are their numbers, drawn upon in training."""

    truncates, sizes = True, {}

    def __init__(self):
        self.empty, self.made = np.zeros(10, bool), 0
        self.config, self.spec = listops.get_config("smoke").data, {}

    def __len__(self):
        return 10


def test_members_of_one_seed_share_a_batch(monkeypatch):
    made = []

    def collate(self, index, items, epoch, rows=slice(None)):
        made.append(epoch)
        return {"ids": np.array(items), "drawn": epoch.rng(0).random(1)}

    monkeypatch.setattr(Batches, "collate", collate)
    shared = SharedBatches(Batches(Numbers()), 4)
    first, items = Epoch(0, 0, True), np.arange(3)
    a = shared.collate(0, items, first)
    assert shared.collate(0, items.copy(), Epoch(0, 0, True)) is a and len(made) == 1
    others = [(0, items, EVALUATION), (0, items, Epoch(1, 0, True))]
    others += [(1, items, first), (0, items[:2], first)]
    for other in others:
        assert shared.collate(*other) is not a
    assert shared.collate(0, items, first) is a  # somebody has it
    drawn = a["drawn"]
    del a
    again = shared.collate(0, items, first)  # forgotten, and made as before
    assert again["drawn"] == drawn and len(made) == 6


def test_training_batches_are_those_of_a_run_alone(monkeypatch):
    monkeypatch.setattr(Numbers, "order", lambda *x: x[3].permutation(x[1]), False)
    monkeypatch.setattr(
        Batches, "collate", lambda self, index, items, *rest: {"ids": np.array(items)}
    )
    plain, shared = (make(Numbers()) for make in (Batches, lambda x: _shared(x)))
    for seed in (0, 1):
        ours, alone = TrainBatches(shared, seed), TrainBatches(plain, seed)
        for step in range(5):
            np.testing.assert_array_equal(ours[step]["ids"], alone[step]["ids"])


def _shared(dataset):
    return SharedBatches(Batches(dataset), 2)


# Turns


def test_functions_take_turns_one_at_a_time():
    running, order = threading.Lock(), []

    def work(name):
        for step in range(3):
            assert running.acquire(blocking=False)
            order.append((name, step))
            running.release()
            turns[name].ask(step)
        return name

    turns = {name: Turns(name, lambda name=name: work(name)) for name in "ab"}
    for step in range(3):
        for name in "ab":
            assert turns[name].go_on() == step
    for name in "ab":
        assert turns[name].go_on() is None
        assert turns[name].over and turns[name].result == name
    assert order == [(name, step) for step in range(3) for name in "ab"]


def test_an_error_is_raised_where_it_was_asked_and_kept():
    def work():
        try:
            turns.ask(1)
        except ValueError as error:
            raise KeyError("mine") from error

    turns = Turns("x", work)
    assert turns.go_on() == 1
    assert turns.go_on(error=ValueError("yours")) is None
    assert isinstance(turns.error, KeyError)


def test_what_is_left_lets_go():
    let_go = []

    def work():
        try:
            turns.ask(1)
        finally:
            let_go.append(True)

    turns = Turns("x", work)
    turns.go_on()
    turns.end()
    assert turns.over and let_go


def test_lines_say_whose_they_are(capsys, tmp_path):
    texts = ("1\n", "step 2", "3\ntest 4")
    with open(tmp_path / "a", "w") as f:
        lines = Lines(sys.stdout, {"a": f})
        thread = threading.Thread(
            target=lambda: [print(x, end="", file=lines) for x in texts], name="a"
        )
        thread.start()
        thread.join()
        print("mine", file=lines)
    assert capsys.readouterr().out == "a | step 23\nmine\n"
    assert (tmp_path / "a").read_text() == "1\nstep 23\n"
    assert not lines.isatty()
