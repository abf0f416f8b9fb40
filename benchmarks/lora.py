"""LoRA beside full fine-tuning of an imported LLaMA: memory and time of a step.

    python benchmarks/lora.py [--width=512] [--layers=8] [--rank=8] [--rounds=5]

transformers makes a LLaMA with random weights, which is imported. Both ways are then
compiled and their steps timed alternately, AdamW and all. Memory is what the compiled
step needs at once: its arguments, results that do not reuse them, and temporaries. In
the end the adapters are written and loaded by PEFT over the same LLaMA: its logits must
equal ours. Results: benchmarks/RESULTS.md.
"""

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import peft
import torch
import transformers
from flax.traverse_util import flatten_dict

from triform import workdir as workdirs
from triform.configs.schema import ExperimentConfig, InitRule, LoRAConfig, OptimConfig
from triform.data.codecs.text import ByteTokenizer
from triform.experiment import Experiment
from triform.interop import families
from triform.interop import peft as adapters
from triform.interop.workdir import import_model
from triform.runtime import host, metrics, optim
from triform.runtime.partition import Across

VOCAB = 8000
ADAPTERS = (".*/lora_[ab]",)


def published(folder: str, width: int, layers: int) -> Any:
    """A LLaMA with random weights, written as transformers does."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=width * 11 // 4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def configured(
    workdir: str, rank: int, rows: int, length: int
) -> dict[str, ExperimentConfig]:
    """Both ways to train the imported model."""
    found = {}
    for name in ("full", "lora"):
        config = workdirs.open_config(workdir)
        config.optim = OptimConfig(name="adamw", schedule="constant", warmup_steps=1)
        config.data.batch_size, config.data.max_len = rows, length
        if name == "lora":
            config.model = LoRAConfig(config.model, rank=rank, alpha=2.0 * rank)
            config.optim.train = ADAPTERS
        found[name] = config.resolved()
    return found


def size(tree: Any) -> float:
    """MiB of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20


class Way:
    """One way to train: its state, its compiled step and the times of its steps."""

    def __init__(self, name: str, config: ExperimentConfig, workdir: str):
        self.name, self.experiment, self.times = name, Experiment(config), []
        experiment = self.experiment
        self.state, _ = workdirs.start(experiment, (InitRule(workdir),))
        batch = experiment.empty_batch(config.data.shapes()[-1])
        shape = batch["inputs"].shape
        tokens = np.random.default_rng(0).integers(3, VOCAB, shape)
        batch["inputs"][:], batch["targets"][:], batch["weights"][:] = tokens, tokens, 1
        self.batch = experiment.put(batch)

        def step(state: Any, batch: Any) -> Any:
            return experiment.train_step(state, batch, Across())

        jitted = jax.jit(step, donate_argnums=0)
        self.compiled = jitted.lower(self.state, self.batch).compile()
        used = self.compiled.memory_analysis()
        total = used.argument_size_in_bytes + used.temp_size_in_bytes
        total += used.output_size_in_bytes - used.alias_size_in_bytes
        self.memory = total / 2**20

    def step(self) -> None:
        """One step, timed."""
        start = time.perf_counter()
        self.state, measured = self.compiled(self.state, self.batch)
        assert np.isfinite(metrics.to_host(measured)["loss"].value())
        self.times.append(time.perf_counter() - start)

    def line(self) -> str:
        """What was measured."""
        count = sum(x.size for x in jax.tree.leaves(self.state.params))
        state = size((self.state.params, self.state.frozen, self.state.opt_state))
        return (
            f"{self.name}: {count:,} trained, state {state:.0f} MiB, a step needs "
            f"{self.memory:.0f} MiB, {1e3 * statistics.median(self.times[1:]):.0f} ms, "
            f"saved at a checkpoint "
            f"{size((self.state.params, self.state.opt_state)):.1f} MiB"
        )


def difference(way: Way, model: Any, folder: str) -> float:
    """Largest difference of PEFT's logits from ours, over their standard deviation."""
    config = way.experiment.config.model
    family = families.family_for(config.model)
    params = optim.join(way.state.params, way.state.frozen)
    flat = {k: np.asarray(x) for k, x in flatten_dict(params, sep="/").items()}
    adapters.save(folder, family, config, flat)
    loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    tokens = np.random.default_rng(1).integers(3, VOCAB, (2, 24))
    with torch.no_grad():
        theirs = loaded(torch.tensor(tokens)).logits.numpy()
    ours = way.experiment.model.apply(
        {"params": params}, {"inputs": tokens.astype(np.int32)}
    )["targets"]
    return float(np.abs(np.asarray(ours) - theirs).max() / theirs.std())


def main() -> None:
    """Prints a line for each way, and how PEFT's logits compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        *(("width", 512), ("layers", 8), ("rank", 8)),
        *(("rows", 4), ("length", 128), ("rounds", 5)),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    host.prepare()
    with tempfile.TemporaryDirectory() as folder:
        hf, workdir, saved = (os.path.join(folder, x) for x in ("hf", "run", "peft"))
        model = published(hf, args.width, args.layers)
        print(import_model(hf, workdir)[0])
        ByteTokenizer().save(workdir)  # runs have one
        configs = configured(workdir, args.rank, args.rows, args.length)
        ways = [Way(name, config, workdir) for name, config in configs.items()]
        for _ in range(args.rounds):
            for way in ways:
                way.step()
        print("\n".join(way.line() for way in ways))
        os.mkdir(saved)
        print(f"PEFT's logits differ by {difference(ways[1], model, saved):.1e}")


if __name__ == "__main__":
    main()
