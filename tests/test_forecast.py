"""Forecasts equal counts by hand, shards that exist, and what compilers report."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import lm

from triform import config_flag, forecast
from triform.configs.schema import ExperimentConfig, update
from triform.data.datasets import CausalLMConfig
from triform.experiment import Experiment
from triform.runtime import chips, program
from triform.runtime.errors import UserError
from triform.runtime.optim import OptimConfig
from triform.runtime.partition import MeshConfig
from triform.runtime.scopes import kind_of, path_of
from triform.scores.text import EvaluationConfig

ROWS, LENGTH, VOCAB = 8, 32, 11
LAYERS, WIDTH, FORWARD = 2, 16, 24
# One device's worth of the eight that tests have.
ONE = MeshConfig(data=8)


def config(rows=ROWS, mesh=ONE, accumulate=1, vocab=VOCAB, **fields):
    """A language model with 4 heads."""
    sizes = {"num_layers": LAYERS, "d_model": WIDTH, "d_ff": FORWARD, "num_heads": 4}
    model = lm(**{**sizes, "max_len": LENGTH, "norm_position": "pre", **fields})
    model.vocab_size = vocab
    found = ExperimentConfig(
        model=model,
        data=CausalLMConfig(max_len=LENGTH, batch_size=rows),
        optim=OptimConfig(accumulate=accumulate),
        mesh=mesh,
        evaluation=EvaluationConfig(metrics=()),
    )
    return found.resolved()


def by_hand(rows=ROWS, keys=LENGTH):
    """FLOPs by kind: 2 a multiplication; backward twice the forward pass."""
    tokens = rows * LENGTH
    attention = 4 * WIDTH * WIDTH + 2 * keys * WIDTH  # projections; scores and sums
    return {
        "attention": 3 * 2 * tokens * LAYERS * attention,
        "feed-forward": 3 * 2 * tokens * LAYERS * 2 * WIDTH * FORWARD,
        "logits and loss": 3 * 2 * tokens * WIDTH * VOCAB,
    }


# --- FLOPs ---


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scan_layers": True},
        {"attention": "flash"},
        {"attention": "flash", "scan_layers": True, "remat": True},
        {"rows": 16, "accumulate": 2},
    ],
)
def test_flops_are_those_by_hand(fields):
    found = forecast.of(config(**fields))
    assert found.flops == by_hand(fields.get("rows", ROWS))
    assert not found.open_loops
    assert bool(found.again) == fields.get("remat", False)


def test_flops_are_six_a_parameter_and_token_and_attention():
    # Chowdhery et al. 2022, appendix B; embeddings are looked up.
    ours = config()
    params = jax.eval_shape(Experiment(ours).make_state).params
    kernels = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in str(path) or path[0].key == "embedding"
    )
    each = 6 * kernels + 12 * LAYERS * WIDTH * LENGTH
    assert sum(forecast.of(ours).flops.values()) == each * ROWS * LENGTH


@pytest.mark.parametrize("attention", ["dot", "flash"])
def test_a_window_counts_the_keys_that_it_leaves(attention):
    found = forecast.of(config(attention=attention, windows=(8,)))
    assert found.flops == by_hand(keys=8)


def test_remat_computes_the_blocks_again():
    again = forecast.of(config(remat=True, scan_layers=True)).again
    hand = by_hand()
    blocks = (hand["attention"] + hand["feed-forward"]) // 3
    # All but the last product of a block, which nothing of its gradient reads.
    assert again == blocks - 2 * ROWS * LENGTH * LAYERS * WIDTH * FORWARD


def test_remat_that_keeps_products_computes_attention_again():
    kept = config(remat=True, remat_keeps="products", scan_layers=True)
    scores_and_sums = 2 * ROWS * LENGTH * LAYERS * 2 * LENGTH * WIDTH
    assert forecast.of(kept).again == scores_and_sums


def test_loops_and_branches_are_counted():
    x = jnp.zeros((4, 4))

    def turns(x):
        x, _ = jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)

    traced = program.trace(turns, x)
    assert traced.flops().total() == (5 + 2) * 2 * 4**3
    assert not traced.open_loops()
    # A sum that is written as a product with a vector is none.
    assert not program.trace(lambda x: jnp.ones(4) @ x, x).flops()
    unknown = program.trace(
        lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), x
    )
    assert unknown.open_loops()


@pytest.mark.parametrize(
    ("stride", "padding"), [(1, "SAME"), (2, "SAME"), (3, "VALID")]
)
def test_a_convolution_counts_no_padding(stride, padding):
    image, kernel = jnp.zeros((2, 7, 7, 3)), jnp.zeros((3, 3, 3, 5))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    # What each output adds up: as many ones as there are products.
    ones = convolve(jnp.ones_like(image), jnp.ones_like(kernel))
    found = program.trace(convolve, image, kernel).flops().total()
    assert found == 2 * int(ones.sum())
    # Either gradient multiplies the same pairs; the product itself is not needed.
    back = program.trace(jax.grad(lambda *x: convolve(*x).sum(), (0, 1)), image, kernel)
    assert back.flops().total() in (2 * found, 3 * found)


# --- Memory ---


@pytest.mark.parametrize(
    ("mesh", "scan"),
    [
        (ONE, False),
        (MeshConfig(1, 8), True),
        (MeshConfig(1, 4, 2), False),
        (MeshConfig(1, 2, 2, 2), True),
    ],
)
def test_bytes_of_the_state_are_those_of_shards(mesh, scan):
    ours = config(mesh=mesh, scan_layers=scan, vocab=12)
    experiment = Experiment(ours)
    state = jax.eval_shape(experiment.make_state).replace(rng=np.zeros(2, np.uint32))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    state = jax.device_put(zeros, experiment.placement.shardings(zeros))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    found = forecast.of(ours)
    assert sum(found.state.values()) == held
    # Adam: two moments and two counters.
    assert found.state["optimiser"] == 2 * found.state["parameters"] + 8
    whole = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert found.checkpoint == 3 * whole + 8 + 4 + 8


def test_llama_8b_on_eight_devices():
    ours = config_flag.load("llama:8b")
    ours.mesh.data, ours.mesh.fsdp = 1, 8
    ours.model.trunk.attention = "flash"
    found = forecast.of(ours.resolved())
    count, scales = 8_030_261_248, 65 * 4096  # norms are not split
    assert found.state["parameters"] == 4 * ((count - scales) // 8 + scales)
    assert found.checkpoint == 4 * 3 * count + 8 + 4 + 8
    tokens, trunk = 512 * 8192, ours.model.trunk
    matrices = count - scales - 128_256 * 4096  # the table is looked up
    attention = 12 * trunk.num_layers * trunk.num_heads * trunk.head_width() * 8192
    assert sum(found.flops.values()) == (6 * matrices + attention) * tokens


def test_memory_is_within_a_fifth_of_what_is_compiled():
    ours = config(rows=64, d_model=64, d_ff=256)
    found, experiment = forecast.of(ours), Experiment(ours)
    held, more = forecast.compiled_bytes(forecast.compiled(experiment))
    # And the number and the limit of the step.
    assert sum(found.state.values()) + found.batch + 8 == held
    assert found.step == pytest.approx(more, rel=0.2)


def test_what_is_fused_needs_no_memory():
    x = jnp.zeros((100, 100))
    size = x.nbytes
    assert program.peak(program.trace(lambda x: jnp.tanh(x * 2 + 1).sum(), x)).size == 4
    # Of two products in a row both are there at once, then one.
    assert program.peak(program.trace(lambda x: x @ x @ x, x)).size == 2 * size
    assert program.peak(program.trace(lambda x: jnp.sin(x @ x) @ x, x)).size == 2 * size

    def both(x):
        return jnp.sin(y := x @ x) @ y

    assert program.peak(program.trace(both, x)).size == 3 * size


# --- What is said ---


def hardware(memory, count=8):
    return forecast.Hardware("H100", count, memory, 1e12, 0.5, named=True)


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not():
    ours, memory = config(), 2**23
    text = forecast.describe(ours, hardware(memory))
    most = int(re.search(r"about ([\d,]+) rows", text)[1].replace(",", ""))
    assert forecast.of(ours, rows=most).total() <= memory
    assert forecast.of(ours, rows=round(1.05 * most) + 1).total() > memory


def test_what_does_not_fit_names_the_largest_array_and_keys_that_help():
    ours, memory = config(rows=256), 300_000
    text = forecast.describe(ours, hardware(memory))
    assert "does not fit" in text
    assert re.search(r"largest arrays.*\n  decoder/layer_\d/\w+.* float32 ", text)
    keys = re.findall(r"--config\.(\S+)=([^\s:]+)", text)
    assert keys
    assert ", fits" in text
    for key, value in keys:
        update(ours, {key: value if value == "flash" else eval(value)})
    assert forecast.of(ours).total() <= memory


def test_hours_follow_from_flops_and_utilisation():
    ours = config()
    ours.steps = 3600 * 10
    seconds = sum(by_hand().values()) / (8 * 1e12 * 0.5)
    text = forecast.describe(ours, hardware(2**30))
    assert f"time: {10 * seconds:,.2f} hours" in text
    assert "50%" in text
    unknown = dataclasses.replace(hardware(2**30), peak=0.0)
    assert "no peak FLOP/s" in forecast.describe(ours, unknown)


# --- Chips and names ---


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("H100", "H100", 1),
        ("8xH100", "H100", 8),
        ("2x8xA100-80GB", "A100-80GB", 16),
        ("v5e-64", "v5e", 64),
        ("v4-8", "v4", 4),  # named by cores
        ("2 x rtx4090", "RTX4090", 2),
    ],
)
def test_devices_that_are_not_here(text, name, count):
    found = chips.parse(text)
    assert (found.chip.name, found.count) == (name, count)


def test_unknown_devices_name_the_known_ones():
    for text in ("8xH900", "0xH100", "", "8x"):
        with pytest.raises(UserError, match="--devices="):
            chips.parse(text)
    with pytest.raises(UserError, match="H100.*v5e"):
        chips.parse("Z80")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_chips_are_known_by_the_name_that_jax_gives(kind, name):
    assert chips.of_kind(kind).name == name


def test_a_cpu_has_no_peak():
    assert chips.of_kind("cpu") is None
    assert forecast.hardware(config()).peak == 0


def test_the_peak_follows_the_dtype_and_the_precision():
    chip = chips.parse("H100").chip
    assert chip.peak("bfloat16") == 989.4e12
    with jax.default_matmul_precision("default"):
        assert chip.peak("float32") == 494.7e12
    with jax.default_matmul_precision("highest"):
        assert chip.peak("float32") == 67e12


def test_memory_is_read_with_its_unit():
    assert chips.parse_memory("16GB") == chips.parse_memory("16") == 16e9
    assert chips.parse_memory("1.5 GiB") == 1.5 * 2**30
    for text in ("16 apples", "", "1.2.3GB"):
        with pytest.raises(UserError, match="16GB"):
            chips.parse_memory(text)


@pytest.mark.parametrize(
    ("scope", "path", "kind"),
    [
        (
            "jit(pinned)/transpose(jvp(LanguageModel))/decoder/layer_1/feed_forward/up",
            "decoder/layer_1/feed_forward/up",
            "feed-forward",
        ),
        (
            "/jvp(Encoder)/encoder/layers/layers/remat/layer_0/self_attention_norm",
            "encoder/layers/layer_0/self_attention_norm",
            "norms",
        ),
        ("jvp(LanguageModel)/LanguageModel._logits", "_logits", "logits and loss"),
        ("jvp(loss)", "loss", "logits and loss"),
        ("jvp(X)/frontend/frontend.embed/embedding", "frontend/embed/embedding", None),
        ("optimiser", "optimiser", "optimiser"),
        ("", "", "other"),
    ],
)
def test_paths_and_kinds(scope, path, kind):
    assert path_of(scope) == path
    assert kind_of(path) == (kind or "embedding")


def test_numbers_of_rows_that_do_not_divide_are_padded():
    # 9 rows on 8 devices: two rows each.
    assert forecast.of(config(rows=9)).rows == 2
    assert forecast.of(config(rows=9)).flops == by_hand(16)
    np.testing.assert_equal(forecast.of(config(rows=9)).batch, 2 * LENGTH * 12)
