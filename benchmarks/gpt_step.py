"""A training step of a small GPT: Triform and nanoGPT's model in PyTorch, alternated.

    python benchmarks/gpt_step.py [--shape=char|full] [--attention=dot] [--rounds=8]

Both do all of a step on random tokens: forward, cross-entropy, backward, clipping,
AdamW, and reading the loss. nanoGPT's modules are re-created here with torch.nn, in
its shapes and with its choices (no biases, erf gelu, scaled_dot_product_attention).
Machines are noisy, so the two are timed alternately and what counts is the ratio.
Results: benchmarks/RESULTS.md.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from triform.configs import gpt_shakespeare_char
from triform.experiment import Experiment
from triform.runtime import host, metrics

VOCAB = 68


class Attention(nn.Module):
    """Causal self-attention with one fused projection."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        b, n, d = x.shape
        q, k, v = (
            y.view(b, n, self.heads, d // self.heads).transpose(1, 2)
            for y in self.qkv(x).split(d, 2)
        )
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).reshape(b, n, d)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class NanoGPT(nn.Module):
    """The model, with its loss."""

    def __init__(self, trunk):
        super().__init__()
        width, rate = trunk.d_model, trunk.dropout
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(trunk.max_len, width)
        self.drop = nn.Dropout(rate)
        blocks = (Block(width, trunk.num_heads, rate) for _ in range(trunk.num_layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of targets y after inputs x, both [B, L]."""
        h = self.drop(self.tokens(x) + self.positions(torch.arange(x.shape[1])))
        logits = self.head(self.norm(self.blocks(h)))
        return F.cross_entropy(logits.view(-1, VOCAB), y.reshape(-1))


def torch_step(config):
    """step(tokens [B, L + 1]) -> loss."""
    torch.manual_seed(0)
    model, c = NanoGPT(config.model.trunk), config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        c.learning_rate,
        betas=(c.b1, c.b2),
        weight_decay=c.weight_decay,
    )

    def step(tokens: np.ndarray) -> float:
        x, y = (torch.from_numpy(t) for t in (tokens[:, :-1], tokens[:, 1:]))
        loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def triform_step(config):
    """step(tokens [B, L + 1]) -> loss, as train.py does it."""
    experiment = Experiment(config)
    state = experiment.placement.init(experiment.make_state)

    def put(tokens: np.ndarray):
        batch = experiment.empty_batch(config.data.shapes()[-1])
        batch["inputs"][:], batch["targets"][:] = tokens[:, :-1], tokens[:, 1:]
        batch["weights"][:] = 1
        return experiment.put(batch)

    batch = put(np.zeros((config.data.batch_size, config.data.max_len + 1), np.int64))
    compiled = experiment.placement.compile_train(experiment.train_step, state, batch)

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        state, measured = compiled(state, put(tokens))
        return metrics.to_host(measured)["loss"].value()

    return step


def main() -> None:
    """Prints milliseconds a step, round by round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("char", "full"), default="char")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=0)
    parser.add_argument("--attention", default="flash")
    args = parser.parse_args()
    host.prepare()
    config = gpt_shakespeare_char.get_config("cpu" if args.shape == "char" else "")
    config.data.batch_size = args.batch_size or (12 if args.shape == "char" else 16)
    config.model.trunk.attention = args.attention
    config.model.trunk.dropout = config.model.trunk.attention_dropout = 0.0
    config = config.resolved()
    steps = {"PyTorch": torch_step(config), "Triform": triform_step(config)}
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.max_len + 1)
    repeats = 30 if args.shape == "char" else 2
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            batches = rng.integers(3, VOCAB, (repeats, *shape))
            start = time.perf_counter()
            for tokens in batches:
                step(tokens)
            took = (time.perf_counter() - start) / repeats
            if number:  # the first round warms up
                times[name].append(1e3 * took)
        if number:
            row = "  ".join(f"{name} {t[-1]:8.1f} ms" for name, t in times.items())
            print(f"round {number}: {row}", flush=True)
    middle = {name: statistics.median(t) for name, t in times.items()}
    trunk = config.model.trunk
    print(
        f"{jax.devices()[0].device_kind}, {trunk.num_layers} layers, width "
        f"{trunk.d_model}, batch {shape[0]} x {shape[1] - 1}: "
        + ", ".join(f"{name} {t:.1f} ms" for name, t in middle.items())
        + f"; Triform / PyTorch = {middle['Triform'] / middle['PyTorch']:.2f}"
    )


if __name__ == "__main__":
    main()
