"""Peak memory of training, import and export beside PyTorch and transformers.

    python benchmarks/memory.py [--layers=12] [--width=768] [--rows=4] [--length=256]

Every case is a process of its own, one after another; what counts is the most memory
that it had resident (VmHWM), libraries included, which the row `imports` shows alone.
Training: steps of GPT-2's shape with AdamW and dropout, float32, equal sizes; each
side has its default attention, `sdpa` and `dot`. transformers reads
a folder and writes it again; Triform imports it into a workdir and exports that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def resident() -> float:
    """The most MiB that this process had resident."""
    with open("/proc/self/status", encoding="utf-8") as f:
        (line,) = (x for x in f if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def gpt(args: argparse.Namespace) -> Any:
    """A GPT-2 of transformers with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=args.layers, n_embd=args.width, n_head=args.width // 64
        )
    )


def torch_imports(args: argparse.Namespace) -> None:
    """PyTorch and transformers' model."""
    import torch  # noqa: F401
    from transformers import GPT2LMHeadModel  # noqa: F401


def triform_imports(args: argparse.Namespace) -> None:
    """Triform with all that a training imports."""
    import jax

    from triform import train  # noqa: F401
    from triform.runtime import host

    host.prepare()
    jax.devices()


def torch_train(args: argparse.Namespace) -> None:
    """Steps of AdamW."""
    import torch

    model = gpt(args)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.randint(300, 50_000, (args.rows, args.length))
    for _ in range(args.steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def triform_train(args: argparse.Namespace) -> None:
    """The same, as train.py does it."""
    import numpy as np

    from triform.configs import gpt2
    from triform.experiment import Experiment
    from triform.runtime import host, metrics

    host.prepare()
    config = gpt2.get_config("small")
    trunk = config.model.trunk
    trunk.num_layers, trunk.d_model, trunk.d_ff = (
        args.layers,
        args.width,
        4 * args.width,
    )
    trunk.num_heads, trunk.dtype = args.width // 64, "float32"
    config.data.max_len, config.data.batch_size = args.length, args.rows
    config = config.resolved()
    experiment = Experiment(config)
    state = experiment.placement.init(experiment.make_state)
    batch = experiment.empty_batch(config.data.shapes()[-1])
    ids = np.random.default_rng(0).integers(300, 50_000, batch["inputs"].shape)
    batch["inputs"][:], batch["targets"][:], batch["weights"][:] = ids, ids, 1
    batch = experiment.put(batch)
    step = experiment.placement.compile_train(experiment.train_step, state, batch)
    for _ in range(args.steps):
        state, measured = step(state, batch)
        assert np.isfinite(metrics.to_host(measured)["loss"].value())


def transformers_folder(args: argparse.Namespace) -> None:
    """Reads a folder and writes it."""
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(args.folder)
    model.save_pretrained(f"{args.folder}/again")


def triform_import(args: argparse.Namespace) -> None:
    """A workdir of the folder."""
    from triform.data.codecs.text import ByteTokenizer
    from triform.interop.workdir import import_model

    import_model(args.folder, f"{args.folder}/workdir")
    ByteTokenizer().save(f"{args.folder}/workdir")


def triform_export(args: argparse.Namespace) -> None:
    """A folder of the workdir."""
    from triform.interop.workdir import export_model

    export_model(f"{args.folder}/workdir", f"{args.folder}/exported")


CASES = {
    "imports, PyTorch": torch_imports,
    "imports, Triform": triform_imports,
    "training, PyTorch": torch_train,
    "training, Triform": triform_train,
    "reading and writing, transformers": transformers_folder,
    "import, Triform": triform_import,
    "export, Triform": triform_export,
}


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        CASES[args.case](args)
        print(json.dumps(resident()))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = gpt(args)
        print(f"{sum(x.numel() for x in model.parameters()):,} parameters", flush=True)
        model.save_pretrained(folder)
        for name in CASES:
            command = [sys.executable, __file__, *sys.argv[1:], f"--case={name}"]
            done = subprocess.run(
                [*command, f"--folder={folder}"], stdout=subprocess.PIPE, text=True
            )
            lines = done.stdout.splitlines()
            told = f"{float(lines[-1]):,.0f} MiB" if done.returncode == 0 else "failed"
            print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()
