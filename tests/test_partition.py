"""Placement: every mesh, pmap and accumulation give what one device gives (law 5)."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from laws import TOLERANCE, assert_same_update, flat, update

from triform.configs import bert_books, vit_mnist
from triform.configs.schema import ExperimentConfig
from triform.data.datasets import Seq2SeqConfig
from triform.experiment import Experiment
from triform.runtime import metrics
from triform.runtime.optim import OptimConfig
from triform.runtime.parameters import ROWS as ROWS_OF_AXES
from triform.runtime.parameters import axes_of
from triform.runtime.partition import (
    AXES,
    MeshConfig,
    MeshPlacement,
    PmapPlacement,
    pad_rows,
    parameter_table,
)
from triform.tasks import Context

LENGTH, ROWS = 8, 6  # rows of no mesh: all but the last pad them
MESHES = (
    *((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2)),
    *((1, 1, 4, 2), (4, 1, 1, 2)),
)
PARTS = {(2, 2, 2, 1): 2, "pmap": 2}  # these accumulate as well


@pytest.fixture(scope="module")
def make_experiment(tiny_config):
    def make(devices=8, accumulate=1, mesh=(0, 1, 1, 1), placement="mesh", **trunk):
        sizes = {"d_model": 16, "num_heads": 4, "d_ff": 32, **trunk}
        experiment = Experiment(
            ExperimentConfig(
                model=tiny_config(vocab_size=16, **sizes),
                data=Seq2SeqConfig(max_len=LENGTH, batch_size=ROWS),
                optim=OptimConfig(
                    "adamw",
                    1e-2,
                    warmup_steps=1,
                    eps=1e-2,
                    weight_decay=0.1,
                    clip_norm=0.5,
                    accumulate=accumulate,
                    ema_decay=0.9,
                ),
                placement=placement,
                mesh=MeshConfig(*mesh),
            )
        )
        if devices == 1:
            experiment.placement = MeshPlacement(MeshConfig(), jax.devices()[:1])
        return experiment

    return make


@pytest.fixture(scope="module")
def batch(pair_batch):
    """Rows of very unequal weight: one of a token, one of none, one padding."""
    rows = pair_batch([8, 3, 5, 1, 0, 8], [1, 8, 0, 5, 0, 7], LENGTH, vocab=16)
    rows["weights"][1] *= 0.25
    return rows


@pytest.fixture(scope="module")
def start(make_experiment):
    """The first state, on the host."""
    state = jax.jit(make_experiment(devices=1).make_state)()
    return jax.tree.map(np.asarray, state.replace(rng=None))


@pytest.fixture(scope="module")
def expected(make_experiment, start, batch):
    """What one device makes of the whole batch at once."""
    return update(make_experiment(devices=1), start, batch)


def test_devices_under_pmap_draw_different_dropout(make_experiment, start, batch):
    """Equal rows on eight devices: with equal masks the loss would be one row's."""
    row = {name: x[:1] for name, x in batch.items()}
    rows = {name: np.repeat(x, 8, 0) for name, x in row.items()}
    alone = update(make_experiment(devices=1, dropout=0.5), start, row)
    spread = update(make_experiment(placement="pmap", dropout=0.5), start, rows)
    assert abs(alone[1]["train/loss"] - spread[1]["train/loss"]) > 1e-3


@pytest.mark.parametrize("mesh", [*MESHES, "pmap"])
def test_every_placement_updates_alike(make_experiment, start, batch, expected, mesh):
    accumulate = PARTS.get(mesh, 1)
    if mesh == "pmap":
        experiment = make_experiment(placement="pmap", accumulate=accumulate)
    else:
        experiment = make_experiment(mesh=mesh, accumulate=accumulate)
        assert tuple(experiment.placement.sizes.values()) == mesh
    assert_same_update(update(experiment, start, batch), expected)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_exact(make_experiment, start, batch, expected, parts):
    experiment = make_experiment(devices=1, accumulate=parts)
    assert_same_update(update(experiment, start, batch), expected)


def test_the_gradient_is_that_of_the_weighted_mean(
    make_experiment, start, batch, expected
):
    task = make_experiment(devices=1).task
    ctx = Context(0, {"dropout": jax.random.key(0)}, True)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        outputs, _ = task.outputs({"params": params}, batch, ctx)
        total = task.terms(outputs, batch, ctx)["token"]
        return total / batch["weights"].sum()

    value, grads = mean(start.params)
    assert expected[1]["train/loss"] == pytest.approx(float(value), rel=1e-5)
    norm = sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
    assert expected[1]["train/grad_norm"] == pytest.approx(norm**0.5, rel=1e-5)


def test_the_step_does_something(start, expected):
    state, found = expected
    moved = flat(
        jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, start.params)
    )
    assert all(x > 100 * TOLERANCE for k, x in moved.items() if k.endswith("kernel"))
    assert found["train/grad_norm"] > 0.5  # was clipped


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), "pmap"])
def test_every_placement_evaluates_alike(make_experiment, start, batch, mesh):
    found, predicted = [], []
    for experiment in (
        make_experiment(devices=1),
        make_experiment(placement="pmap")
        if mesh == "pmap"
        else make_experiment(mesh=mesh),
    ):
        placement = experiment.placement
        variables = {"params": start.params}
        if isinstance(placement, PmapPlacement):
            variables = placement.load(variables)
        else:
            variables = jax.device_put(variables, placement.shardings(variables))
        step = placement.compile_eval(experiment.eval_step)
        measured, rows = step(variables, np.int32(0), experiment.put(batch))
        found.append(experiment.values(metrics.to_host(measured), 0))
        predicted.append({k: np.asarray(x)[:ROWS] for k, x in rows.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    for name, x in predicted[0].items():
        np.testing.assert_allclose(predicted[1][name], x, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), "pmap"])
def test_the_first_state_is_the_same_everywhere(make_experiment, start, mesh):
    if mesh == "pmap":
        experiment = make_experiment(placement="pmap")
    else:
        experiment = make_experiment(mesh=mesh)
    state = experiment.placement.init(experiment.make_state)
    params = flat(experiment.placement.unload(state).params)
    for name, x in flat(start.params).items():
        np.testing.assert_allclose(params[name], x, atol=1e-6, err_msg=name)
    if mesh != "pmap":
        wanted = flat(experiment.placement.shardings(state))
        for name, x in flat(state).items():
            assert x.sharding.is_equivalent_to(wanted[name], x.ndim), name


# --- Where what is placed ---


def spec_for(path, shape, mesh):
    return axes_of(path, shape, ROWS_OF_AXES).spec(shape, mesh)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (
            "decoder/layer_0/cross_attention/query/kernel",
            (8, 4, 2),
            ("fsdp", "tensor", None),
        ),
        (
            "encoder/layer_0/self_attention/out/kernel",
            (4, 2, 8),
            ("tensor", None, "fsdp"),
        ),
        ("encoder/layer_0/self_attention/value/bias", (4, 2), ("tensor", None)),
        ("encoder/layer_0/self_attention/out/bias", (8,), (None,)),
        ("encoder/layer_0/feed_forward/up/kernel", (8, 16), ("fsdp", "tensor")),
        ("encoder/layer_0/feed_forward/gate/bias", (16,), ("tensor",)),
        ("encoder/layer_0/feed_forward/down/kernel", (16, 8), ("tensor", "fsdp")),
        ("encoder/layer_0/feed_forward/down/bias", (8,), (None,)),
        ("encoder/layer_0/feed_forward_norm/scale", (8,), (None,)),
        ("embedding/embedding", (16, 8), ("tensor", "fsdp")),
        ("encoder_positions/table/embedding", (16, 8), (None, "fsdp")),
        ("head/kernel", (8, 16), ("fsdp", "tensor")),
        ("label_head/kernel", (8, 4), ("fsdp", "tensor")),
        ("tag_head/kernel", (8, 4), ("fsdp", "tensor")),
        ("label_head/bias", (4,), (None,)),
        ("pooler/kernel", (8, 8), ("fsdp", "tensor")),
        ("masked_head/dense/kernel", (8, 8), ("fsdp", "tensor")),
        ("masked_bias", (16,), (None,)),
        ("head_bias", (16,), (None,)),
        ("token_type_embedding/embedding", (4, 8), ("tensor", "fsdp")),
        ("encoder/relative_bias/embedding", (32, 4), (None, "tensor")),
        ("positions/table/embedding", (16, 8), (None, "fsdp")),
        ("patches/kernel", (4, 4, 2, 8), (None, None, None, "fsdp")),
        ("token", (1, 1, 8), (None, None, "fsdp")),
    ],
)
def test_specs_of_the_table(path, shape, spec):
    mesh = dict(zip(AXES, (1, 2, 4, 1), strict=True))
    assert spec_for(path, shape, mesh) == P(*spec)
    if "layer_0" in path:
        # A scanned trunk has one more axis in front, which is never split.
        inside = path.replace("layer_0", "layers/layer_0")
        assert spec_for(inside, (6, *shape), mesh) == P(None, *spec)
    # Sizes that are not divisible are not split.
    odd = spec_for(path, tuple(n + 1 for n in shape), mesh)
    assert odd == P(*(None for _ in shape))
    alone = dict.fromkeys(AXES, 1)
    assert spec_for(path, shape, alone) == P(*(None for _ in shape))
    # A parameter of another rank needs a row of its own.
    with pytest.raises(ValueError, match="add a row") as error:
        spec_for(path, (6, *shape), mesh)
    assert path in str(error.value)


@pytest.mark.parametrize("scan", [False, True])
def test_moments_lie_with_their_parameters(make_experiment, scan):
    experiment = make_experiment(
        mesh=(2, 2, 2, 1), scan_layers=scan, positions="learned", ffn="swiglu"
    )
    state = jax.eval_shape(experiment.make_state)
    shardings = flat(experiment.placement.shardings(state))
    params = {
        k.removeprefix("params/"): v
        for k, v in shardings.items()
        if k.startswith("params/")
    }
    assert params.keys() == flat(state.params).keys()
    assert any(any(x.spec) for x in params.values())
    moments = 0
    for name, sharding in shardings.items():
        for path, wanted in params.items():
            if name.startswith("opt_state/") and name.endswith(f"/{path}"):
                moments += 1
                assert sharding == wanted, name
    assert moments >= 3 * len(params)  # two moments and an average
    for name in ("step", "rng"):
        assert shardings[name].spec == P()


def test_what_no_row_matches_is_an_error():
    with pytest.raises(ValueError, match="'router/weights'.*PARAMETERS"):
        spec_for("router/weights", (4, 4), dict.fromkeys(AXES, 1))


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(tensor=2, sequence=2), 8, (2, 1, 2, 2)),
        (MeshConfig(data=2, fsdp=4), 8, (2, 4, 1, 1)),
        (MeshConfig(fsdp=8), 8, (1, 8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1, 1)),
    ],
)
def test_possible_sizes(mesh, devices, sizes):
    assert mesh.sizes(devices) == sizes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "the product must be the number of devices, 8"),
        (MeshConfig(tensor=3), "the product must be the number of devices, 8"),
        (MeshConfig(fsdp=16), "the product must be the number of devices, 8"),
        (MeshConfig(data=4), "the product must be the number of devices, 8"),
    ],
)
def test_impossible_sizes(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh.sizes(8)


def test_pmap_only_splits_batches():
    message = (
        "pmap only splits batches; use placement='mesh' or set the other axes to 1"
    )
    with pytest.raises(ValueError, match=message):
        PmapPlacement(MeshConfig(tensor=2))


def test_only_places_are_split_over_the_sequence():
    placement = MeshPlacement(MeshConfig(data=2, fsdp=2, sequence=2))
    tokens, chosen = np.zeros((4, 8), np.int32), np.zeros((4, 2), np.int32)
    rows, split = P(("data", "fsdp")), P(("data", "fsdp"), "sequence")
    frames = np.zeros((4, 8, 3), np.float32)
    for axes, x, wanted in (
        ("BL", tokens, split),
        ("BS", tokens, split),
        ("BTM", frames, split),
        ("BLC", frames, split),
        ("BP", chosen, rows),  # chosen positions
        ("B", chosen[:, 0], rows),
        ("BHWC", np.zeros((4, 8, 8, 2)), rows),
        ("BL", tokens[:, :7], rows),  # not divisible
    ):
        put = placement.put({"x": x}, {"x": axes})["x"]
        assert put.sharding.is_equivalent_to(
            NamedSharding(placement.mesh, wanted), x.ndim
        ), axes
        np.testing.assert_array_equal(put, x)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_added_rows_weigh_nothing(batch, rows):
    part = {k: x[:rows] for k, x in batch.items()}
    padded = pad_rows(part, 4)
    for name, x in padded.items():
        assert len(x) % 4 == 0
        assert len(x) - len(part[name]) < 4
        assert x.dtype == part[name].dtype
        np.testing.assert_array_equal(x[: len(part[name])], part[name])
        assert not x[len(part[name]) :].any()


def test_the_plan_lists_every_parameter(make_experiment):
    experiment = make_experiment(mesh=(2, 2, 2, 1))
    params = jax.eval_shape(experiment.make_state).params
    lines = parameter_table(params, experiment.placement).splitlines()
    count = sum(x.size for x in jax.tree.leaves(params))
    assert f"{count:,} parameters" in lines[-1]
    listed = [
        int(re.search(r"\)\s+([\d,]+)", x)[1].replace(",", "")) for x in lines[:-1]
    ]
    assert sum(listed) == count
    assert any("fsdp, tensor" in line for line in lines)


def test_rules_are_all_needed(make_experiment):
    """Each row is the first match of some parameter."""
    configs = [
        make_experiment(devices=1, **fields).config
        for fields in (
            {"positions": "learned", "ffn": "swiglu", "tie_head": False},
            {"positions": "relative", "scan_layers": True},
            {"positions": "relative_keys"},
        )
    ]
    files = (bert_books, vit_mnist)
    configs += [file.get_config("smoke").resolved() for file in files]
    used = set()
    for config in configs:
        params = jax.eval_shape(Experiment(config).make_state).params
        for name in flat(params):
            used.add(next(p for p, _ in ROWS_OF_AXES if re.search(p, name)))
    assert used == {pattern for pattern, _ in ROWS_OF_AXES}
