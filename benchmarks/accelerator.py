"""What one accelerator does with Triform, in at most eight minutes, as one JSON file.

    python benchmarks/accelerator.py [--minutes=8] [--out=accelerator.json] [--smoke]

Nothing is prepared by hand. Each part is a process of its own: one that fails, or finds
no memory, is a row with its error. Steps are timed with the loss read on the host.

FLOPs of a step are counted as in PaLM (Chowdhery et al. 2022, appendix B): for a token
6 a parameter, and 12 x layers x width x length for attention, though half of causal
attention is never computed and embeddings are looked up. The peak is that of dense
bfloat16 products by the maker's sheet (runtime/chips.py). Results: RESULTS.md.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
# Layers, width, heads, length. 1.3b: GPT-3 XL (Brown et al. 2020, table 2.1).
SHAPES = {
    "124m": (12, 768, 12, 1024),
    "1.3b": (24, 2048, 16, 2048),
    "smoke": (2, 64, 2, 128),
}
# name: (what it is given, XLA flags beside those of a run). In order of importance: the
# last ones are left out where the time is over.
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "step 124m": ({"shape": "124m", "rows": 32}, ""),
    "step 1.3b": ({"shape": "1.3b", "rows": 8, "scan": True}, ""),
    "attention": ({"lengths": "2048,8192"}, ""),
    "decode 124m": ({"shape": "124m"}, ""),
    "step 124m, 64 rows": ({"shape": "124m", "rows": 64}, ""),
    "step 1.3b, remat": (
        {"shape": "1.3b", "rows": 16, "scan": True, "remat": True},
        "",
    ),
    "step 1.3b, remat that keeps products": (
        {"shape": "1.3b", "rows": 16, "scan": True, "remat": True}
        | {"remat_keeps": "products"},
        "",
    ),
    "step 124m, 64 rows, logits in parts": (
        {"shape": "124m", "rows": 64, "logit_chunks": 8},
        "",
    ),
    "step 124m, dot": ({"shape": "124m", "rows": 32, "attention": "dot"}, ""),
    "step 124m, not deterministic": (
        {"shape": "124m", "rows": 32},
        "--xla_gpu_deterministic_ops=false",
    ),
    "step 124m, latency hiding": (
        {"shape": "124m", "rows": 32},
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ),
    "train": ({}, ""),  # translation, for the rest of the time
}
REST = 60  # seconds that a part needs at least, to be begun


def configured(shape: str, rows: int = 8, **trunk_fields: Any) -> Any:
    """GPT-2's config in another size, without dropout."""
    from triform.configs import gpt2

    config = gpt2.get_config("small")
    trunk = config.model.trunk
    trunk.num_layers, trunk.d_model, trunk.num_heads, length = SHAPES[shape]
    trunk.d_ff = 4 * trunk.d_model
    trunk.dropout = trunk.attention_dropout = 0.0
    trunk.attention = "flash"
    for name, value in trunk_fields.items():
        setattr(trunk, {"scan": "scan_layers"}.get(name, name), value)
    # A multiple of 128, as everybody rounds it: matrix units work in such tiles.
    config.model.vocab_size = 50_304 if shape != "smoke" else 512
    config.data.max_len, config.data.batch_size = length, rows
    return config.resolved()


def step(steps: int = 12, **given: Any) -> dict[str, Any]:
    """Seconds of a training step, and its share of the peak."""
    import jax
    import numpy as np

    from triform.experiment import Experiment
    from triform.runtime import chips, metrics

    config = configured(**given)
    experiment = Experiment(config)
    state = experiment.placement.init(experiment.make_state)
    shape = (config.data.batch_size, config.data.max_len)
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, shape)
    batch = experiment.empty_batch(config.data.shapes()[-1])
    batch["inputs"][:], batch["targets"][:], batch["weights"][:] = tokens, tokens, 1
    batch = experiment.put(batch)
    start = time.perf_counter()
    compiled = experiment.placement.compile_train(experiment.train_step, state, batch)
    compiling, times = time.perf_counter() - start, []
    for _ in range(steps):
        start = time.perf_counter()
        state, measured = compiled(state, batch)
        loss = metrics.to_host(measured)["loss"].value()
        times.append(time.perf_counter() - start)
    assert np.isfinite(loss)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    trunk, took = config.model.trunk, statistics.median(times[3:])
    each = 6 * count + 12 * trunk.num_layers * trunk.d_model * shape[1]
    device = jax.devices()[0]
    chip, stats = chips.of_kind(device.device_kind), device.memory_stats() or {}
    rate = each * tokens.size / took
    return {
        "parameters": count,
        "compiling": compiling,
        "seconds": took,
        "tokens/s": tokens.size / took,
        "flops/s": rate,
        "utilisation": rate / chip.bfloat16 if chip and chip.bfloat16 else None,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def decode(shape: str, tokens: int = 128, rounds: int = 3) -> dict[str, Any]:
    """Tokens a second that are written, greedily, after prompts of 32."""
    import jax
    import numpy as np

    from triform.answers.writing import Continuation, Draft
    from triform.data.codecs.text import ByteTokenizer
    from triform.experiment import Experiment

    config = configured(shape)
    config.decode.method, config.decode.banned = "greedy", (ByteTokenizer().eos,)
    experiment = Experiment(config)
    state = experiment.placement.init(experiment.make_state)
    variables = {"params": state.params}
    write = Continuation(experiment, ByteTokenizer())
    found = {}
    for rows in (1, 16, 64):
        numbers = np.zeros((rows, 2), np.int32)
        times = []
        for _ in range(rounds + 1):  # the first one compiles
            drafts = [Draft(list(range(300, 332))) for _ in range(rows)]
            start = time.perf_counter()
            for _ in write(variables, drafts, 0, numbers, tokens):
                pass
            times.append(time.perf_counter() - start)
            assert all(len(d.ids) == tokens for d in drafts)
        found[f"tokens/s, batch {rows}"] = rows * tokens / statistics.median(times[1:])
    return found | {"devices": jax.device_count()}


def attention(lengths: str) -> dict[str, Any]:
    """The table of attention.py, in bfloat16."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, os.path.join(HERE, "attention.py")]
        command += [f"--out={out}", f"--lengths={lengths}", "--rounds=1"]
        subprocess.run([*command, "--dtype=bfloat16"], check=True, stdout=sys.stderr)
        (name,) = (x for x in os.listdir(out) if x.endswith(".json"))
        with open(os.path.join(out, name)) as f:
            return json.load(f)


def train(seconds: float, smoke: bool) -> dict[str, Any]:
    """The recipe of transformer_multi30k, or of the CLDR phrases where there are no
    data, until the time is over: then it saves, and the last evaluation counts.
    """
    from triform.data import sources
    from triform.runtime import metrics

    name = "transformer_multi30k" if sources.local_copy("multi30k_ende") else ""
    name = name or "transformer_cldr"
    with tempfile.TemporaryDirectory() as workdir:
        config = f"--config={ROOT}/configs/{name}.py" + ":smoke" * smoke
        command = [sys.executable, os.path.join(ROOT, "train.py"), config]
        run = subprocess.Popen([*command, f"--workdir={workdir}"], stdout=sys.stderr)
        try:
            run.wait(max(1.0, seconds - 30))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGTERM)
            run.wait()
        lines = metrics.read_lines(workdir)
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    return {"config": name, "ended_with": run.returncode, "last": last}


def run_part(name: str, seconds: float, smoke: bool) -> dict[str, Any]:
    """What a part measured; `error` if it failed."""
    command = [sys.executable, __file__, f"--part={name}", f"--seconds={seconds:.0f}"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {PARTS[name][1]}".strip()
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--smoke"] if smoke else command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        found = json.loads(output.splitlines()[-1])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        found = {"error": f"not finished in {seconds:.0f} s"}
    except (IndexError, ValueError):
        found = {"error": f"ended with {process.returncode}"}
    return found | {"took": time.perf_counter() - start}


def measure(name: str, seconds: float, smoke: bool) -> dict[str, Any]:
    """One part, in this process."""
    from triform.runtime import host

    host.prepare()
    given = dict(PARTS[name][0])
    if smoke:
        given |= {k: "smoke" for k in given if k == "shape"}
        given |= {k: "128,256" for k in given if k == "lengths"}
        given |= {k: 2 for k in given if k == "rows"}
    if name == "train":
        return train(seconds, smoke)
    kinds = {"step": step, "decode": decode, "attention": attention}
    return kinds[name.replace(",", "").split()[0]](**given)


def about() -> dict[str, Any]:
    """Card, versions, date and commit."""
    code = (
        "import jax, jaxlib, json; d = jax.devices(); print(json.dumps({'device': "
        "d[0].device_kind, 'devices': len(d), 'jax': jax.__version__, 'jaxlib': "
        "jaxlib.__version__}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    found = json.loads(told.stdout.splitlines()[-1])
    found["date"] = time.strftime("%Y-%m-%d")
    return found | {"commit": commit.stdout.strip()}


def main() -> None:
    """Writes the file, part by part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", default="accelerator.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--part", choices=PARTS, help="this one, to standard output")
    parser.add_argument("--seconds", type=float, default=480.0, help="of the part")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args.part, args.seconds, args.smoke)))
        return
    end = time.monotonic() + 60 * args.minutes
    found: dict[str, Any] = {"about": about(), "parts": {}}
    print(found["about"], flush=True)
    for name in PARTS:
        left = end - time.monotonic()
        if left < REST:
            found["parts"][name] = {"error": "left out: the time was over"}
        else:
            found["parts"][name] = run_part(name, left, args.smoke)
        shown = {
            k: round(v, 4) if isinstance(v, float) else v
            for k, v in found["parts"][name].items()
            if not isinstance(v, list | dict)
        }
        print(f"{name}: {shown}", flush=True)
        with open(args.out, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1)


if __name__ == "__main__":
    main()
