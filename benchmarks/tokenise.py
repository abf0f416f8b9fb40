"""How fast and in how much memory a corpus is tokenised, beside `datasets.map`.

    python benchmarks/tokenise.py --megabytes=2000 --processes=2 \
        --baseline=PYTHON_WITH_DATASETS

The corpus is JSON lines of runs of paragraphs of the classic books, repeated until it
is as large as asked for; the tokenizer a byte-level BPE of 8,000 ids trained on them.
Both sides read the same file, encode with the same tokenizer in as many processes, and
write what they make. CPU seconds are of all processes of a side, reading and writing
included: they hold on a machine that has other work, too. Memory is the sum over all
processes, sampled ten times a second: a page that two share counts twice.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from triform.data import encoding, sources, store
from triform.data.codecs import text
from triform.data.datasets import CausalLMConfig

BASELINE = """
import json, sys, time
import datasets, tokenizers

corpus, path, cache, processes = *sys.argv[1:4], int(sys.argv[4])
tok = tokenizers.Tokenizer.from_file(path)
end = tok.token_to_id("</s>")

def encode(batch):
    found = tok.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [x.ids + [end] for x in found]}

start = time.perf_counter()
data = datasets.load_dataset("json", data_files=corpus, cache_dir=cache, split="train")
loaded = time.perf_counter()
done = data.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
mapped = time.perf_counter()
tokens = sum(len(x) for b in done.with_format("arrow").iter(1000) for x in b["ids"])
print(json.dumps({"read": loaded - start, "encode": mapped - loaded, "tokens": tokens,
                  "versions": [datasets.__version__, tokenizers.__version__]}))
"""


def books() -> list[str]:
    """Runs of paragraphs, about 4,000 characters each."""
    config = CausalLMConfig(source="classic_books")
    found = []
    for example in store.examples(config, config.source, "train"):
        run: list[str] = []
        for paragraph in example["text"].split("\n"):
            run.append(paragraph)
            if sum(map(len, run)) > 4000:
                found.append("\n".join(run))
                run = []
    return found


def write_corpus(path: str, size: int) -> int:
    """Writes JSON lines until their texts have `size` bytes; their bytes."""
    texts, written, copy = books(), 0, 0
    with open(path, "w", encoding="utf-8") as f:
        while written < size:
            copy += 1
            for one in texts:
                one = f"{copy}\n{one}"  # no two are equal
                f.write(json.dumps({"text": one}, ensure_ascii=False) + "\n")
                written += len(one.encode())
    return written


def _memory(root: int) -> int:
    """Resident bytes of a process and all below it."""
    parents, resident = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat") as f:
                fields = f.read().rpartition(")")[2].split()
            parents[int(name)] = int(fields[1])
            resident[int(name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    total, level = 0, {root}
    while level:
        total += sum(resident.get(x, 0) for x in level)
        level = {x for x, parent in parents.items() if parent in level}
    return total


@contextlib.contextmanager
def peak(process: int) -> Iterator[list[int]]:
    """[largest memory so far] of a process and its children."""
    found, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            found[0] = max(found[0], _memory(process))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def ours(corpus: str, tok: text.Tokenizer, folder: str) -> dict[str, float]:
    """Seconds of the first look at the rows and of encoding them; tokens."""
    config = CausalLMConfig(source=corpus, held_out=0.0, cache_dir=folder)
    start = time.perf_counter()
    sources.source(corpus)  # what an import costs is not counted
    store.origin(config, corpus).fingerprint("train")
    read = time.perf_counter()
    opened = store.open_store(config, "train", tok, config.features())
    done = time.perf_counter()
    tokens = len(opened.tokens["text"].ids)
    return {"read": read - start, "encode": done - read, "tokens": tokens}


def main() -> None:
    """Prints a line a side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--kind", default="bpe", choices=text.KINDS)
    parser.add_argument("--baseline", default="", help="Python that has datasets")
    parser.add_argument("--folder", help="for corpus and caches; default: temporary")
    flags = parser.parse_args()
    encoding.WORKERS = flags.processes
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        corpus = os.path.join(folder, "corpus.jsonl")
        size = write_corpus(corpus, flags.megabytes * 10**6)
        sample = books()[::10]
        tok = text.train(text.TokenizerConfig(kind=flags.kind), sample, 8000)
        saved = tok.save(folder)
        before = cpu_seconds()
        with peak(os.getpid()) as memory:
            found = {"triform": ours(corpus, tok, folder)}
        found["triform"] |= {"memory": memory[0], "cpu": cpu_seconds() - before}
        if flags.baseline:
            command = [flags.baseline, "-c", BASELINE, corpus, saved, folder]
            command.append(str(flags.processes))
            before = cpu_seconds()
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ""}
            )
            with peak(process.pid) as memory:
                output, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{flags.baseline} ended with {process.returncode}")
            found["datasets"] = json.loads(output.splitlines()[-1])
            used = {"memory": memory[0], "cpu": cpu_seconds() - before}
            found["datasets"] |= used
    for name, x in found.items():
        print(
            f"{name:9} {size / 1e6:,.0f} MB, {flags.processes} processes: reading "
            f"{x['read']:.0f} s, encoding {x['encode']:.0f} s = "
            f"{size / 1e6 / x['encode']:.2f} MB/s, {x['cpu']:.0f} CPU s, "
            f"{x['tokens']:,} tokens, memory {x['memory'] / 1e9:.2f} GB "
            f"{x.get('versions', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
