"""A training step of BERT, the 2017 Transformer and ViT beside PyTorch's, alternated.

    python benchmarks/steps.py --model=bert|translation|multi30k|vit [--rounds=8] \\
        [--no_dropout]

Both sides do all of a step on the same random batch: forward, loss, backward, clipping,
AdamW, and reading the loss. BERT and ViT are those of transformers (with its default
attention), the Transformer is torch.nn.Transformer with embeddings and a tied output.
Machines are noisy, so the two are timed alternately and what counts are the ratios, of
the medians and of the fastest steps. GPT is in gpt_step.py. Results: RESULTS.md.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch.nn import functional as F

from triform.configs import (
    bert_finetune,
    transformer_cldr,
    transformer_multi30k,
    vit_mnist,
)
from triform.experiment import Experiment
from triform.runtime import host, metrics

Step = Callable[[dict[str, np.ndarray]], float]


def bert() -> Any:
    """4 layers of 256 on 32 rows of 64 tokens: clinc150's model, a little wider."""
    config = bert_finetune.get_config("mr_sentiment")
    trunk = config.model.trunk
    trunk.d_model, trunk.num_heads, trunk.d_ff = 256, 4, 1024
    trunk.norm_position, config.data.buckets = "post", ()
    return config


def translation() -> Any:
    """The model of the CLDR phrases on its longest rows."""
    return transformer_cldr.get_config()


def multi30k() -> Any:
    """The model of the captions on rows of their most frequent length."""
    config = transformer_multi30k.get_config("cpu")
    config.data.max_len, config.data.buckets = 15, ()
    config.data.batch_size = 4096 // 15
    return config


def vit() -> Any:
    """The model of vit_mnist on a batch of its pictures."""
    return vit_mnist.get_config()


CONFIGS = {
    "bert": bert,
    "translation": translation,
    "multi30k": multi30k,
    "vit": vit,
}


def random_batch(config: Any, experiment: Experiment) -> dict[str, np.ndarray]:
    """Full rows of random ids, classes and pixels."""
    rng = np.random.default_rng(0)
    batch = experiment.empty_batch(config.data.shapes()[-1])
    for name, field in experiment.spec.items():
        x = batch[name]
        if field.dtype.startswith("float"):
            weights = "weight" in name
            x[...] = 1 if weights else rng.normal(size=x.shape)
        elif "position" in name:
            x[...] = np.arange(x.shape[-1])
        elif "segment" in name:
            x[...] = 1
        else:
            below = field.below
            below = experiment.sizes[below] if isinstance(below, str) else below
            x[...] = rng.integers(1 if below > 10 else 0, below or 2, x.shape)
    return batch


def triform_step(config: Any, experiment: Experiment) -> Step:
    """As train.py does it."""
    state = experiment.placement.init(experiment.make_state)
    example = experiment.put(random_batch(config, experiment))
    compiled = experiment.placement.compile_train(experiment.train_step, state, example)

    def step(batch: dict[str, np.ndarray]) -> float:
        nonlocal state
        state, measured = compiled(state, experiment.put(batch))
        return metrics.to_host(measured)["loss"].value()

    return step


class Translation(torch.nn.Module):
    """torch.nn.Transformer with one table for both sides and the output."""

    def __init__(self, trunk: Any, vocabulary: int, dropout: float):
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, trunk.d_model)
        torch.nn.init.normal_(self.table.weight, std=trunk.d_model**-0.5)
        self.core = torch.nn.Transformer(
            *(trunk.d_model, trunk.num_heads, trunk.num_layers, trunk.num_layers),
            *(trunk.d_ff, dropout),
            batch_first=True,
        )
        self.drop, self.scale = torch.nn.Dropout(dropout), math.sqrt(trunk.d_model)
        angles = np.arange(1024)[:, None] / 1e4 ** (np.arange(0, 1, 2 / trunk.d_model))
        both = np.concatenate([np.sin(angles), np.cos(angles)], -1)
        self.register_buffer("positions", torch.tensor(both, dtype=torch.float32))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        x = self.table(ids) * self.scale + self.positions[: ids.shape[1]]
        return self.drop(x)

    def forward(self, source: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V]."""
        mask = torch.nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
        x = self.core(
            self.embed(source), self.embed(inputs), tgt_mask=mask, tgt_is_causal=True
        )
        return F.linear(x, self.table.weight)


def torch_model(name: str, config: Any) -> tuple[torch.nn.Module, Callable]:
    """(model, loss of a batch of tensors)."""
    model, trunk = config.model, config.model.trunk
    rates = {
        "hidden_dropout_prob": trunk.dropout,
        "attention_probs_dropout_prob": trunk.attention_dropout or 0.0,
    }
    sizes = {
        "hidden_size": trunk.d_model,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.d_ff,
        "num_labels": getattr(model, "num_labels", 0),
    }
    smoothing = config.task.label_smoothing
    if name == "bert":
        made = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=model.vocab_size,
                max_position_embeddings=trunk.max_len,
                **sizes,
                **rates,
            )
        )
        return made, lambda x: F.cross_entropy(
            made(input_ids=x["inputs"], attention_mask=torch.ones_like(x["inputs"]))[0],
            x["label"],
            label_smoothing=smoothing,
        )
    if name == "vit":
        made = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=model.image_size,
                patch_size=model.patch_size,
                num_channels=model.channels,
                **sizes,
                **rates,
            )
        )
        return made, lambda x: F.cross_entropy(
            made(pixel_values=x["image"].permute(0, 3, 1, 2))[0],
            x["label"],
            label_smoothing=smoothing,
        )
    made = Translation(trunk, model.vocab_size, trunk.dropout)
    return made, lambda x: F.cross_entropy(
        made(x["encoder_inputs"], x["inputs"]).flatten(0, 1),
        x["targets"].flatten(),
        label_smoothing=smoothing,
    )


def torch_step(name: str, config: Any) -> Step:
    """A step of PyTorch, training mode."""
    torch.manual_seed(0)
    model, loss_of = torch_model(name, config)
    model.train()
    c = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        c.learning_rate,
        betas=(c.b1, c.b2),
        weight_decay=c.weight_decay,
    )

    def step(batch: dict[str, np.ndarray]) -> float:
        x = {k: torch.from_numpy(v) for k, v in batch.items()}
        x = {k: v if v.is_floating_point() else v.long() for k, v in x.items()}
        loss = loss_of(x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if c.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Prints milliseconds a step, round by round, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="bert")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="")
    parser.add_argument("--no_dropout", action="store_true")
    args = parser.parse_args()
    host.prepare()
    config = CONFIGS[args.model]()
    trunk = config.model.trunk
    trunk.attention = args.attention or trunk.attention
    if args.no_dropout:
        trunk.dropout = trunk.attention_dropout = 0.0
    config = config.resolved({})
    experiment = Experiment(config)
    batch = random_batch(config, experiment)
    steps = {
        "PyTorch": torch_step(args.model, config),
        "Triform": triform_step(config, experiment),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            for _ in range(args.repeats):
                start = time.perf_counter()
                step(batch)
                if number:  # the first round warms up
                    times[name].append(1e3 * (time.perf_counter() - start))
        if number:
            row = "  ".join(
                f"{name} {min(t[-args.repeats :]):8.1f} ms" for name, t in times.items()
            )
            print(f"round {number}: {row}", flush=True)
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in batch.items())
    print(f"{jax.devices()[0].device_kind}, {args.model}: {shapes}")
    for what, of in (("median", statistics.median), ("fastest", min)):
        found = {name: of(t) for name, t in times.items()}
        told = ", ".join(f"{name} {t:.1f} ms" for name, t in found.items())
        print(f"{what}: {told}; ratio {found['Triform'] / found['PyTorch']:.2f}")


if __name__ == "__main__":
    main()
