"""LoRA: adapters beside any model's kernels; merged equals applied (law 11)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import ADAPTED, FAMILIES, applied, batch_of, lm, with_trunk
from laws import assert_trees_close, flat, init

from triform import models
from triform.models import LoRAConfig
from triform.models.lora import merge
from triform.models.stacking import looped_layers, stacked_layers


def adapter_paths(params) -> set[str]:
    return {path.rpartition("/")[0] for path in flat(params) if "lora_" in path}


@pytest.mark.parametrize("name", ADAPTED)
def test_merged_equals_applied(name):
    config, batch = FAMILIES[name], batch_of(FAMILIES[name])
    params = init(config, batch)
    found = applied(config)({"params": params}, batch)
    merged = merge(params, config)
    base = init(config.model, batch)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    expected = applied(config.model)({"params": merged}, batch)
    assert_trees_close(found, expected)
    apart = {k: x for k, x in flat(merged).items() if (x != flat(params)[k]).any()}
    assert apart.keys() == {f"{path}/kernel" for path in adapter_paths(params)}


@pytest.mark.parametrize("name", ADAPTED)
def test_new_adapters_change_nothing(name):
    config, batch = FAMILIES[name], batch_of(FAMILIES[name])
    params = jax.jit(models.build(config).init)(jax.random.key(0), batch)["params"]
    adapters = [path for path in flat(params) if "lora_" in path]
    assert adapters
    for path in adapters:
        assert bool(flat(params)[path].any()) == path.endswith("lora_a")
    merged = merge(params, config)
    for path, x in flat(merged).items():
        np.testing.assert_array_equal(x, flat(params)[path], err_msg=path)
    found = applied(config)({"params": params}, batch)
    assert_trees_close(found, applied(config.model)({"params": merged}, batch))


@pytest.mark.parametrize("remat", [False, True])
def test_looped_and_scanned_are_one_model(remat):
    base = lm(num_layers=4, windows=(2, 0), positions="learned", remat=remat)
    config = LoRAConfig(base, rank=2, ranks=(("self_attention/query", 3),))
    batch = batch_of(config)
    params = init(config, batch)
    scanned = with_trunk(config, scan_layers=True)
    stacked = stacked_layers(params, base.trunk.cycle(), np)
    shapes = jax.eval_shape(models.build(scanned).init, jax.random.key(0), batch)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
        lambda x: x.shape, shapes["params"]
    )
    expected = applied(config)({"params": params}, batch)
    assert_trees_close(applied(scanned)({"params": stacked}, batch), expected)
    merged = looped_layers(merge(stacked, scanned))
    assert_trees_close(merged, merge(params, config), close=1e-6)


def test_patterns_choose_kernels_and_ranks():
    base = FAMILIES["t5 v1.1"]
    config = LoRAConfig(
        base,
        rank=4,
        targets=("self_attention/(query|out)/kernel$", "^head/kernel$"),
        ranks=(("encoder/", 2), ("query", 3)),
    )
    shapes = flat(
        jax.eval_shape(models.build(config).init, jax.random.key(0), batch_of(config))
    )
    # (inputs, rank) and (rank, outputs), each with the axis of scanned layers.
    expected = {"head": ((8, 4), (4, 11))}
    for side, ranks in (("encoder", (2, 2)), ("decoder", (3, 4))):
        layer = f"{side}/layers/layer_0/self_attention"
        query, out = ranks
        expected[f"{layer}/query"] = (2, 8, query), (2, query, 2, 4)
        expected[f"{layer}/out"] = (2, 2, 4, out), (2, out, 8)
    found = adapter_paths({k.removeprefix("params/"): x for k, x in shapes.items()})
    assert found == expected.keys()
    for path, (a, b) in expected.items():
        assert shapes[f"params/{path}/lora_a"].shape == a
        assert shapes[f"params/{path}/lora_b"].shape == b


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_product_is_scaled(rslora, scale):
    config = LoRAConfig(lm(num_layers=1), rank=4, alpha=6.0, rslora=rslora)
    batch = batch_of(config)
    params = init(config, batch)
    query = params["decoder"]["layer_0"]["self_attention"]["query"]
    merged = merge(params, config)["decoder"]["layer_0"]["self_attention"]["query"]
    product = np.einsum("dr,rhe->dhe", query["lora_a"], query["lora_b"])
    expected = query["kernel"] + scale * product
    np.testing.assert_allclose(merged["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_of_the_adapters_inputs_only():
    config = LoRAConfig(lm(), dropout=0.5)
    batch = batch_of(config)
    params, rngs = init(config, batch), {"dropout": jax.random.key(0)}
    apply = jax.jit(models.build(config).apply)
    plain = apply({"params": params}, batch)["targets"]
    dropped = apply({"params": params}, batch, rngs=rngs)["targets"]
    assert np.abs(dropped - plain).max() > 1e-3

    def without(path, x):
        return np.zeros_like(x) if path[-1].key == "lora_b" else x

    params = jax.tree_util.tree_map_with_path(without, params)
    found, expected = (
        apply({"params": params}, batch, **rest) for rest in ({"rngs": rngs}, {})
    )
    assert_trees_close(found, expected, close=0)


@pytest.mark.parametrize("scan", [False, True])
def test_no_gradient_of_a_full_kernel_is_computed(scan):
    """Backward: the products with the activations' gradients, not with the kernels'."""
    base = lm(num_layers=2, d_model=64, d_ff=256, num_heads=2, scan_layers=scan)
    config = LoRAConfig(base, rank=1)
    batch = batch_of(config)
    params = init(config, batch)
    model = models.build(config)

    def flops(trained):
        def loss(some):
            both = {**flat(params), **some}
            tree = jax.tree.unflatten(jax.tree.structure(params), both.values())
            return (model.apply({"params": tree}, batch)["targets"] ** 2).sum()

        some = {k: x for k, x in flat(params).items() if trained in k}
        step = jax.jit(jax.grad(loss)).lower(some).compile()
        return step.cost_analysis()["flops"]

    # 2 of 3 products of a dense layer remain.
    assert flops("lora_") < 0.75 * flops("")


def test_adapters_keep_bfloat16_activations():
    config = LoRAConfig(lm(dtype="bfloat16"))
    batch = batch_of(config)
    out, variables = jax.eval_shape(
        models.build(config).init_with_output, jax.random.key(0), batch
    )
    assert out["targets"].dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ADAPTED)
def test_the_config_answers_for_the_model(name):
    config = FAMILIES[name]
    config.validate()
    for method in ("reads", "outputs", "sizes", "longest", "axes", "generates"):
        assert getattr(config, method)() == getattr(config.model, method)()
    assert config.trunks() == {"model.trunk": config.model.trunk}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("alpha", 0.0),
        ("dropout", 1.0),
        ("targets", ()),
        ("ranks", (("query", 0),)),
    ],
)
def test_a_setting_without_meaning_is_refused(field, value):
    config = LoRAConfig(lm(), **{field: value})
    with pytest.raises(ValueError, match=rf"model\.{field}=") as error:
        config.validate()
    assert repr(value) in str(error.value)
