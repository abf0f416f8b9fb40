"""Tokens a second beside `transformers.generate` with the same weights, alternated.

    python benchmarks/decode.py --model=gpt2|small|translation [--batches=1,16]
        [--method=greedy|sample|beam] [--prompt=32] [--tokens=64] [--rounds=5]

transformers makes a model with random weights, which is imported; no text ends before
`--tokens`, on either side. Prompts are random ids, all of one length. Greedy tokens and
those of beams must be the same on both sides; how many are is printed. `gpt2` has the
published shape (124 million parameters), `small` 6 layers of 384 with the vocabulary of
GPT-2, `translation` that of the Multi30k recipe as Marian has it (3 + 3 layers of 256,
10,000 ids), which is decoded by 5 beams unless another method is asked for.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
import transformers

from triform import workdir as workdirs
from triform.answers.writing import Continuation, Draft, Targets
from triform.data.codecs.text import ByteTokenizer
from triform.interop.workdir import import_model
from triform.runtime import host

Write = Callable[[], np.ndarray]  # ids of all rows, [B, tokens]


def gpt(layers: int, width: int, heads: int) -> Any:
    """A GPT-2 of this shape."""
    config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads)
    return transformers.GPT2LMHeadModel(config)


def marian() -> Any:
    """A Marian of the shape of transformer_multi30k.py."""
    sizes = {"layers": 3, "ffn_dim": 1024, "attention_heads": 8}
    config = transformers.MarianConfig(
        vocab_size=10_000,
        d_model=256,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        **{f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in sizes.items()},
    )
    return transformers.MarianMTModel(config)


MODELS = {
    "gpt2": lambda: gpt(12, 768, 12),
    "small": lambda: gpt(6, 384, 6),
    "translation": marian,
}


def theirs(model: Any, ids: np.ndarray, args: argparse.Namespace, end: int) -> Write:
    """transformers' generate; the ids after the prompt."""
    options = {"max_new_tokens": args.tokens, "suppress_tokens": [end]}
    if args.method == "beam":
        options |= {"num_beams": args.beams, "length_penalty": 1.0}
    options["do_sample"] = args.method == "sample"
    options["top_k"] = 0
    given = torch.from_numpy(ids).long()
    before = 1 if args.model == "translation" else ids.shape[1]

    def write() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(
                given, attention_mask=torch.ones_like(given), **options
            )
        return found[:, before:].numpy()

    return write


def ours(workdir: str, ids: np.ndarray, args: argparse.Namespace, end: int) -> Write:
    """What generate.py and evaluate.py run, without texts."""
    config = workdirs.open_config(workdir)
    config.decode.method, config.decode.beam_size = args.method, args.beams
    # The same choice as 1.0 there: all hypotheses have one length.
    config.decode.length_penalty, config.decode.banned = 1.0, (end,)
    run = workdirs.open_run(workdir, "best", config)
    experiment, variables = run.experiment, run.variables
    numbers = np.stack([np.arange(len(ids)), np.zeros(len(ids), int)], 1)
    numbers = numbers.astype(np.int32)
    if args.model == "translation":
        targets = Targets(experiment, run.codecs, args.tokens)
        batch = {
            "encoder_inputs": ids,
            "encoder_segments": np.ones_like(ids),
            "inputs": np.zeros((len(ids), 1), np.int32),
        }

        def write() -> np.ndarray:
            drafts = targets(variables, batch, numbers)
            return np.array([d.ids for d in drafts])

        return write
    continuation = Continuation(experiment, run.codecs["text"])

    def write_on() -> np.ndarray:
        drafts = [Draft(row.tolist()) for row in ids]
        for _ in continuation(variables, drafts, 0, numbers, args.tokens):
            pass
        return np.array([d.ids for d in drafts])

    return write_on


def compare(workdir: str, model: Any, batch: int, args: argparse.Namespace) -> None:
    """Times both on one batch and prints a line."""
    end, rng = ByteTokenizer().eos, np.random.default_rng(0)
    size = model.config.vocab_size
    ids = rng.integers(300, size, (batch, args.prompt)).astype(np.int32)
    sides = {
        "transformers": theirs(model, ids, args, end),
        "Triform": ours(workdir, ids, args, end),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    written = {}
    for number in range(args.rounds + 1):
        for name, write in sides.items():
            start = time.perf_counter()
            written[name] = write()
            if number:  # the first round compiles
                times[name].append(time.perf_counter() - start)
    rates = {
        name: batch * args.tokens / statistics.median(t) for name, t in times.items()
    }
    told = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items())
    same = np.mean(written["Triform"] == written["transformers"])
    shown = f"; {same:.1%} of the tokens equal" if args.method != "sample" else ""
    ratio = rates["Triform"] / rates["transformers"]
    print(f"batch {batch}: {told}; {ratio:.2f} times{shown}", flush=True)


def main() -> None:
    """Prints a line a batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--method", choices=("greedy", "sample", "beam"))
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.method = args.method or ("beam" if args.model == "translation" else "greedy")
    host.prepare()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = MODELS[args.model]().eval()
    with tempfile.TemporaryDirectory() as folder:
        hf, workdir = os.path.join(folder, "hf"), os.path.join(folder, "workdir")
        model.save_pretrained(hf)
        print(import_model(hf, workdir)[0])
        ByteTokenizer().save(workdir)  # runs have one
        kind = jax.devices()[0].device_kind
        print(
            f"{kind}, {args.model}, {args.method}: prompts of {args.prompt}, "
            f"{args.tokens} written"
        )
        for batch in map(int, args.batches.split(",")):
            compare(workdir, model, batch, args)


if __name__ == "__main__":
    main()
