"""Source -> token arrays -> batches. Batch t is a function of (seed, t).

A corpus is tokenised once into flat memory-mapped arrays with offsets, cached by corpus
and tokenizer. Batches are then cut from them by index with NumPy, which keeps the
position of a run to one integer, the step, on any number of devices.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from triform import datasets, tokenizer
from triform.datasets import DataError
from triform.tokenizer import EOS, Tokenizer, TokenizerConfig

Batch = Mapping[str, np.ndarray]
FIELDS = ("inputs", "targets")


@dataclasses.dataclass
class DataConfig:
    """Parallel text. Lengths are in tokens and include the end-of-sequence token."""

    source: str = "cldr"  # embedded, our own, or a public TFDS name
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str = "test"
    inputs: str = "en"  # the feature that is read
    targets: str = "de"  # the feature that is predicted
    max_len: int = 64  # longer pairs are left out of training, cut in evaluation
    # Rows of max_len a batch; shorter buckets hold more rows, of as many tokens in all.
    batch_size: int = 32
    buckets: tuple[int, ...] = ()  # row lengths below max_len, ascending
    drop_empty: bool = False  # leave pairs with an empty side out instead of stopping
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data_dir: str = ""  # prepared TFDS data; empty: the TFDS default
    manual_dir: str = ""  # files of a corpus that is not to be downloaded
    cache_dir: str = ""  # token arrays; empty: $TRIFORM_CACHE or ~/.cache/triform
    prefetch: int = 2  # batches prepared ahead of the device

    def lengths(self) -> tuple[int, ...]:
        """All row lengths, ascending."""
        return (*self.buckets, self.max_len)

    def rows(self, length: int) -> int:
        """Rows of a batch whose rows have `length` tokens."""
        return self.batch_size * self.max_len // length

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if self.max_len < 2:
            raise ValueError(f"data.max_len={self.max_len}: must be at least 2")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size={self.batch_size}: must be at least 1")
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch={self.prefetch}: must be at least 1")
        lengths = self.lengths()
        if not all(isinstance(n, int) for n in lengths):
            raise ValueError(
                f"data.buckets={self.buckets}: must be a tuple of row lengths"
            )
        if sorted(set(lengths)) != list(lengths) or lengths[0] < 2:
            raise ValueError(
                f"data.buckets={self.buckets}: must ascend from at least 2 to below "
                f"max_len={self.max_len}"
            )
        self.tokenizer.validate()


class TokenStore:
    """Tokens of one split: for each field a flat array and offsets, memory-mapped."""

    def __init__(self, directory: str):
        # Names corpus, split, features and tokenizer: equal digests, equal tokens.
        self.digest = os.path.basename(directory)
        self.tokens = {}
        self.offsets = {}
        for field in FIELDS:
            path = os.path.join(directory, field)
            self.offsets[field] = np.load(f"{path}.offsets.npy")
            dtype = np.load(f"{path}.dtype.npy").dtype
            if self.offsets[field][-1]:
                self.tokens[field] = np.memmap(f"{path}.tokens", dtype, "r")
            else:  # an empty file cannot be mapped
                self.tokens[field] = np.zeros(0, dtype)
            if len(self.tokens[field]) != self.offsets[field][-1]:
                raise DataError(
                    f"{path}.tokens: {len(self.tokens[field])} tokens where "
                    f"{self.offsets[field][-1]} were written; delete {directory}"
                )

    def __len__(self) -> int:
        return len(self.offsets[FIELDS[0]]) - 1

    def sizes(self, field: str) -> np.ndarray:
        """Tokens of every example, without the end of sequence."""
        return np.diff(self.offsets[field])

    def row(self, field: str, index: int) -> np.ndarray:
        """Tokens of one example."""
        start, stop = self.offsets[field][index : index + 2]
        return self.tokens[field][start:stop]


def cache_root(config: DataConfig) -> str:
    """Where token arrays are kept."""
    default = os.path.join(os.path.expanduser("~"), ".cache", "triform")
    return config.cache_dir or os.environ.get("TRIFORM_CACHE") or default


def raw_examples(config: DataConfig, split: str) -> Sequence[Mapping[str, str]]:
    """The examples of a split, as the source has them."""
    return datasets.load(
        config.source, split, data_dir=config.data_dir, manual_dir=config.manual_dir
    )


def _text(example: Mapping[str, str], name: str, config: DataConfig) -> str:
    if name not in example:
        raise DataError(
            f"data.inputs/targets: {config.source!r} has no feature {name!r}; expected "
            f"one of {', '.join(sorted(example))}"
        )
    if not isinstance(example[name], str):
        raise DataError(
            f"data.inputs/targets: feature {name!r} of {config.source!r} is no text "
            f"({example[name]!r:.40}); name a text feature"
        )
    return example[name]


def load_tokenizer(workdir: str) -> Tokenizer:
    """The tokenizer that a run saved in its workdir."""
    path = tokenizer.find(workdir)
    if path is None:
        raise DataError(f"{workdir}: its tokenizer is gone; restore the file")
    try:
        return tokenizer.load(path)
    except ValueError as error:
        raise DataError(str(error)) from error


def build_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that the config names, or a new one trained on the corpus."""
    path = config.tokenizer.path
    if path and not os.path.exists(path):
        raise DataError(
            f"data.tokenizer.path={path!r}: no such file; leave it empty to train a "
            "tokenizer on the corpus"
        )
    try:
        if path:
            result = tokenizer.load(path)
        else:
            texts = (
                _text(example, name, config)
                for example in raw_examples(config, config.train_split)
                for name in (config.inputs, config.targets)
            )
            result = tokenizer.train(config.tokenizer, texts, vocab_size)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error
    if result.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size}: the tokenizer "
            f"{path or config.tokenizer.kind} has {result.vocab_size} ids; raise it to "
            "at least that"
        )
    return result


def token_store(config: DataConfig, split: str, tok: Tokenizer) -> TokenStore:
    """The tokens of a split, from the cache or computed into it."""
    origin = datasets.fingerprint(
        config.source, split, data_dir=config.data_dir, manual_dir=config.manual_dir
    )
    key = hashlib.sha256(tok.to_bytes())
    for part in ("v2", origin, config.inputs, config.targets):
        key.update(b"\0" + part.encode())
    final = os.path.join(cache_root(config), "tokens", key.hexdigest()[:32])
    if not os.path.isdir(final):
        os.makedirs(os.path.dirname(final), exist_ok=True)
        _sweep(os.path.dirname(final))
        part = tempfile.mkdtemp(dir=os.path.dirname(final), prefix="part-")
        try:
            _write_tokens(config, split, tok, part)
            os.chmod(part, 0o755)  # mkdtemp's is for us alone; a cache may be shared
            os.rename(part, final)
        except OSError:
            # Another process may have been first: its arrays are the same.
            if not os.path.isdir(final):
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return TokenStore(final)


def _sweep(directory: str) -> None:
    """Removes what killed processes began more than a day ago."""
    yesterday = time.time() - 86_400
    for entry in os.scandir(directory):
        if entry.name.startswith("part-") and entry.stat().st_mtime < yesterday:
            shutil.rmtree(entry.path, ignore_errors=True)


def _write_tokens(config: DataConfig, split: str, tok: Tokenizer, path: str) -> None:
    """Streams: a corpus need not fit into memory, only its lengths."""
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)
    sizes: dict[str, list[int]] = {field: [0] for field in FIELDS}
    raw = raw_examples(config, split)
    examples = iter(tqdm(raw, f"tokenising {split}", disable=None, leave=False))
    with contextlib.ExitStack() as stack:
        files = {
            field: stack.enter_context(
                open(os.path.join(path, f"{field}.tokens"), "wb")
            )
            for field in FIELDS
        }
        while chunk := list(itertools.islice(examples, 10_000)):
            for field, file in files.items():
                texts = [_text(e, getattr(config, field), config) for e in chunk]
                rows = tok.encode_batch(texts)
                sizes[field] += [len(row) for row in rows]
                file.write(np.concatenate(rows).astype(dtype).tobytes())
    for field in FIELDS:
        offsets = np.cumsum(sizes[field], dtype=np.int64)
        np.save(os.path.join(path, f"{field}.offsets.npy"), offsets)
        np.save(os.path.join(path, f"{field}.dtype.npy"), np.zeros(0, dtype))


def empty_batch(rows: int, length: int) -> Batch:
    """What every batch holds, empty: PAD is 0, as are segments and weights."""
    names = ("encoder_inputs", "encoder_segments", "inputs", "targets")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch | {"weights": np.zeros((rows, length), np.float32)}


class Batches:
    """The batches of one split: an epoch visits every example once.

    Each example belongs to the shortest bucket that holds both its sides. A bucket's
    examples are permuted by (seed, epoch), cut into batches, the last one smaller, and
    the batches of all buckets permuted by (seed, epoch).
    """

    def __init__(self, config: DataConfig, store: TokenStore, split: str, vocab: int):
        self.config, self.store, self.split, self.vocab = config, store, split, vocab
        sizes = {field: store.sizes(field) for field in FIELDS}
        empty = np.minimum(sizes["inputs"], sizes["targets"]) == 0
        if empty.any() and not config.drop_empty:
            example = int(np.flatnonzero(empty)[0])
            raise DataError(
                f"{config.source} {split}, example {example}: one side is empty; mend "
                "the corpus or set data.drop_empty=True"
            )
        self.longest = np.maximum(sizes["inputs"], sizes["targets"]) + 1  # EOS
        self.usable = ~empty

    def buckets(self, cut: bool) -> dict[int, np.ndarray]:
        """Row length -> example ids. Over-long examples are in the last if `cut`."""
        lengths = self.config.lengths()
        longest = self.longest
        if cut:
            longest = np.minimum(longest, lengths[-1])
        which = np.searchsorted(lengths, longest)
        result = {
            n: np.flatnonzero((which == i) & self.usable) for i, n in enumerate(lengths)
        }
        if not any(map(len, result.values())):
            raise DataError(
                f"{self.config.source} {self.split}: none of its {len(self.store)} "
                f"examples fits into data.max_len={self.config.max_len}; raise it"
            )
        return {n: ids for n, ids in result.items() if len(ids)}

    def collate(self, length: int, ids: np.ndarray) -> Batch:
        """The batch of the examples `ids` with rows of `length`, checked.

        Always the full number of rows of that length: missing ones have weight 0.
        """
        batch = empty_batch(self.config.rows(length), length)
        for r, i in enumerate(ids):
            source = self.store.row("inputs", i)[: length - 1]
            target = self.store.row("targets", i)[: length - 1]
            s, t = len(source), len(target)
            batch["encoder_inputs"][r, :s] = source
            batch["encoder_inputs"][r, s] = EOS
            batch["encoder_segments"][r, : s + 1] = 1
            batch["targets"][r, :t] = target
            batch["targets"][r, t] = EOS
            batch["inputs"][r, 1 : t + 1] = target  # shifted right; PAD starts
            batch["weights"][r, : t + 1] = 1
        where = f"{self.config.source} {self.split}"
        check_ids(batch, self.vocab, lambda r: f"{where}, example {ids[r]}")
        return batch

    def cut(self) -> int:
        """How many examples evaluation shortens to data.max_len."""
        return int((self.longest[self.usable] > self.config.max_len).sum())

    def evaluation(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """(example ids, batch) in a fixed order, every example exactly once."""
        for length, ids in self.buckets(cut=True).items():
            rows = self.config.rows(length)
            for start in range(0, len(ids), rows):
                part = ids[start : start + rows]
                yield part, self.collate(length, part)


class TrainBatches:
    """Endless training batches, addressed by step."""

    def __init__(self, batches: Batches, seed: int):
        self.batches, self.seed = batches, seed
        self.buckets = batches.buckets(cut=False)
        counts = [
            -(-len(ids) // batches.config.rows(length))
            for length, ids in self.buckets.items()
        ]
        self.per_epoch = sum(counts)
        # (bucket length, number within the bucket) of every batch of an epoch
        self.slots = [
            (length, i)
            for length, n in zip(self.buckets, counts, strict=True)
            for i in range(n)
        ]
        self.left_out = len(batches.store) - sum(map(len, self.buckets.values()))
        self._epoch: tuple[int, list] = (-1, [])

    def ids(self, step: int) -> tuple[int, np.ndarray]:
        """(row length, example ids) of the batch of a step."""
        epoch, position = divmod(step, self.per_epoch)
        cached, plan = self._epoch
        if cached != epoch:
            plan = self._plan(epoch)
            self._epoch = (epoch, plan)
        return plan[position]

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = {n: rng.permutation(ids) for n, ids in self.buckets.items()}
        plan = []
        for slot in rng.permutation(len(self.slots)):
            length, i = self.slots[slot]
            rows = self.batches.config.rows(length)
            plan.append((length, shuffled[length][i * rows : (i + 1) * rows]))
        return plan

    def __getitem__(self, step: int) -> Batch:
        return self.batches.collate(*self.ids(step))

    def shapes(self) -> list[int]:
        """The row lengths that occur, ascending."""
        return list(self.buckets)

    def fill(self) -> float:
        """Share of real target and source tokens among all places of an epoch."""
        store, real, places = self.batches.store, 0, 0
        for length, ids in self.buckets.items():
            real += sum(int(store.sizes(f)[ids].sum()) + len(ids) for f in FIELDS)
            rows = self.batches.config.rows(length)
            places += 2 * length * rows * -(-len(ids) // rows)
        return real / places


def check_ids(batch: Batch, vocab: int, name: Callable[[int], str]) -> None:
    """Stops on ids outside the vocabulary: an embedding turns them into NaN silently.

    `name(row)` says which example a row is.
    """
    for key, x in batch.items():
        if not key.endswith(("inputs", "targets")):
            continue
        bad = (x < 0) | (x >= vocab)
        if bad.any():
            row = int(np.flatnonzero(bad.any(-1))[0])
            value = int(x[row][bad[row]][0])
            raise DataError(
                f"{name(row)}: id {value} in '{key}' is outside the vocabulary of "
                f"{vocab}; raise model.vocab_size or use the tokenizer of this model"
            )


class Prefetch:
    """Runs an iterator in a thread, `depth` items ahead; errors arrive where read."""

    def __init__(self, items: Iterable, depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._over: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterable) -> None:
        try:
            for item in items:
                if not self._offer((item, None)):
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # handed to the reader, whatever it is
            self._offer((None, error))

    def _offer(self, entry: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        if self._over is not None:
            raise self._over
        item, self._over = self._queue.get()
        if self._over is not None:
            raise self._over
        return item

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()


def report(train: TrainBatches) -> str:
    """One paragraph: examples, buckets, steps an epoch, share of real tokens."""
    config = train.batches.config
    lines = [
        f"data: {config.source} {train.batches.split}, {len(train.batches.store):,} "
        f"examples, {train.per_epoch:,} batches an epoch, {train.fill():.1%} of their "
        "places are real tokens"
    ]
    for length, ids in train.buckets.items():
        rows = config.rows(length)
        lines.append(f"  length {length}: {len(ids):,} examples, {rows} rows a batch")
    if train.left_out:
        lines.append(
            f"  {train.left_out:,} longer than data.max_len={config.max_len} or empty, "
            "left out of training"
        )
    return "\n".join(lines)
