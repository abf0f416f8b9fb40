"""Model FLOPs utilisation of a GPT's training step, in bfloat16 on one accelerator.

    python benchmarks/mfu.py [--shape=124m|1.3b] [--batch_size=32] [--attention=flash]

FLOPs of a step are counted as in PaLM (Chowdhery et al. 2022, appendix B): for a token
6 a parameter, and 12 x layers x width x length for attention, though half of causal
attention is never computed and embeddings are looked up. The peak is that of dense
bfloat16 products by the maker's sheet.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from triform.configs import gpt2
from triform.experiment import Experiment
from triform.runtime import host, metrics

# Dense bfloat16 FLOP/s by the makers' sheets.
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "v4": 275e12,
    "v5 lite": 197e12,
}
# Layers, width, heads, length. 1.3b: GPT-3 XL (Brown et al. 2020, table 2.1).
SHAPES = {
    "124m": (12, 768, 12, 1024),
    "1.3b": (24, 2048, 16, 2048),
    "smoke": (2, 64, 2, 128),
}


def configured(args: argparse.Namespace):
    """The experiment's config: GPT-2's of another size, without dropout of weights."""
    config = gpt2.get_config("small")
    trunk = config.model.trunk
    trunk.num_layers, trunk.d_model, trunk.num_heads, length = SHAPES[args.shape]
    trunk.d_ff = 4 * trunk.d_model
    trunk.dropout = trunk.attention_dropout = 0.0
    trunk.attention, trunk.remat, trunk.scan_layers = (
        args.attention,
        args.remat,
        args.scan,
    )
    # A multiple of 128, as everybody rounds it: matrix units work in such tiles.
    config.model.vocab_size = 50_304
    config.data.max_len, config.data.batch_size = length, args.batch_size
    return config.resolved()


def main() -> None:
    """Prints the time of a step, tokens and FLOP/s, and their share of the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--attention", default="flash")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--scan", action="store_true")
    args = parser.parse_args()
    host.prepare()
    config = configured(args)
    experiment = Experiment(config)
    state = experiment.placement.init(experiment.make_state)
    shape = (config.data.batch_size, config.data.max_len)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.model.vocab_size, shape)
    batch = experiment.empty_batch(config.data.shapes()[-1])
    batch["inputs"][:], batch["targets"][:], batch["weights"][:] = tokens, tokens, 1
    batch = experiment.put(batch)
    start = time.perf_counter()
    step = experiment.placement.compile_train(experiment.train_step, state, batch)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        state, measured = step(state, batch)
        loss = metrics.to_host(measured)["loss"].value()
        times.append(time.perf_counter() - start)
    assert np.isfinite(loss)
    took = statistics.median(times[3:])
    trunk = config.model.trunk
    each = 6 * count + 12 * trunk.num_layers * trunk.d_model * trunk.max_len
    rate = each * tokens.size / took
    kind = jax.devices()[0].device_kind
    peak = next((v for k, v in PEAKS.items() if k in kind), None)
    share = f"{rate / peak:.1%} of {peak / 1e12:.0f}" if peak else "peak unknown"
    print(
        f"{kind}, {args.shape}, {count:,} parameters, {shape[0]} x {shape[1]} tokens, "
        f"attention={args.attention}, remat={args.remat}, scan={args.scan}: "
        f"{1e3 * took:.1f} ms a step, {tokens.size / took:,.0f} tokens/s, "
        f"{rate / 1e12:.1f} TFLOP/s, {share}"
    )


if __name__ == "__main__":
    main()
