"""A corpus to ids, part by part, on all cores.

A part is a file of arrays; parts that an interrupted program has finished are kept. The
processes that encode are started by name, not forked: a fork of a process with threads,
as JAX has, may hang, and Python's own other ways run the user's program again.
"""

import contextlib
import dataclasses
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from triform.data.codecs import text
from triform.data.codecs.pieces import pieces
from triform.data.codecs.text import Tokenizer
from triform.runtime import files
from triform.runtime.errors import DataError

PART = 4 << 20  # characters of a part: few, so that all processes end together
EXAMPLES = 1 << 18  # of a part, at most
BATCH = 1 << 16  # characters encoded at once: what they take fits into a core's cache
# Characters that are encoded as one text: of longer ones tokenizers take memory and
# time beyond measure.
LONGEST = 4 << 20
WORKERS = 0  # processes; 0: one a core


@dataclasses.dataclass(frozen=True)
class Column:
    """What becomes of one feature."""

    name: str
    is_text: bool
    end: bool  # EOS after every text


Arrays = dict[str, np.ndarray]  # by name


class ExampleError(DataError):
    """An example that cannot be encoded; `number` counts those of the split."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.number)


class Encoder(Protocol):
    """Examples to arrays, in this process or in others."""

    def __call__(self, examples: Sequence[Any]) -> Arrays:
        """Arrays of some examples; DataError if one cannot be encoded."""
        ...

    def size(self, example: Any) -> int:
        """Its characters."""
        ...

    def elsewhere(self, folder: str) -> tuple[Callable[..., "Encoder"], tuple]:
        """A function and its arguments, both to be pickled, that make this encoder from
        what is saved into a folder now.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Texts:
    """Encodes examples that have a list of values a column.

    Of texts: `column/ids`, flat; `sizes`, of every text; `first`, texts of every
    example; `counts`, whitespace words and newlines, and UTF-8 bytes. Of others:
    `column/values` and `first`.
    """

    tok: Tokenizer
    columns: Sequence[Column]

    def __call__(self, examples: Sequence[Sequence[list]]) -> Arrays:
        """The arrays."""
        arrays: Arrays = {}
        for i, column in enumerate(self.columns):
            rows = [example[i] for example in examples]
            values = [value for row in rows for value in row]
            found = {"first": np.array([len(row) for row in rows], np.int64)}
            if column.is_text:
                found |= _texts(self.tok, values, column.end)
            else:
                found["values"] = _values(values)
            arrays |= {f"{column.name}/{key}": x for key, x in found.items()}
        return arrays

    def size(self, example: Sequence[list]) -> int:
        """Characters of all texts."""
        return sum(len(x) for row in example for x in row if isinstance(x, str))

    def elsewhere(self, folder: str) -> tuple[Callable[..., "Texts"], tuple]:
        """With the saved tokenizer."""
        return Texts.loaded, (self.tok.save(folder), self.columns)

    @classmethod
    def loaded(cls, path: str, columns: Sequence[Column]) -> "Texts":
        """The same with the tokenizer at `path`."""
        return cls(text.load(path), columns)


def _texts(tok: Tokenizer, texts: list[str], end: bool) -> Arrays:
    # Where texts are words, few are distinct.
    distinct = list(dict.fromkeys(texts))
    parts = [pieces(text, LONGEST) for text in distinct]
    encoded = iter(_encoded(tok, [piece for part in parts for piece in part]))
    ids = {
        text: np.concatenate([next(encoded) for _ in part])
        for text, part in zip(distinct, parts, strict=True)
    }
    dtype = np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32
    eos = np.array([tok.eos] if end else [], dtype)
    rows = [x for text in texts for x in (ids[text].astype(dtype), eos)]
    words = sum(len(text.split()) + text.count("\n") for text in texts)
    return {
        "ids": np.concatenate([eos[:0], *rows]),
        "sizes": np.array([len(ids[text]) + len(eos) for text in texts], np.int64),
        "counts": np.array([words, sum(len(text.encode()) for text in texts)]),
    }


def _encoded(tok: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    batch, size = [], 0
    for one in texts:
        batch.append(one)
        size += len(one)
        if size >= BATCH:
            yield from tok.encode_batch(batch)
            batch, size = [], 0
    yield from tok.encode_batch(batch)


def _values(values: list) -> np.ndarray:
    """Numbers or names; an array of another kind or shape if they are neither."""
    try:
        found = np.asarray(values) if values else np.zeros(0, bool)
    except ValueError:  # of uneven shapes
        return np.array([[repr(values[0])]])
    return np.array([[repr(values[0])]]) if found.dtype.kind == "O" else found


def grouped(encoder: Encoder, examples: Iterable[Any]) -> Iterator[list[Any]]:
    """Examples of one part after another, the same for the same examples."""
    part, size = [], 0
    for example in examples:
        part.append(example)
        size += encoder.size(example)
        if size >= PART or len(part) >= EXAMPLES:
            yield part
            part, size = [], 0
    if part:
        yield part


def save(path: str, arrays: Arrays) -> None:
    """Writes a part; whoever reads it sees all or nothing."""
    with files.replacing(path, binary=True) as f:
        np.savez(f, **arrays)


def write_parts(encoder: Encoder, examples: Iterable[Any], folder: str) -> list[str]:
    """Encodes into parts in a folder; their paths. What is there is not made again.

    A second part is what makes it worth to start processes.
    """
    paths: list[str] = []
    with contextlib.ExitStack() as stack:
        pool = None
        groups = grouped(encoder, examples)
        group, following = next(groups, None), None
        while group is not None:
            following = next(groups, None)
            path = os.path.join(folder, f"{len(paths):06d}.npz")
            paths.append(path)
            if not os.path.exists(path):
                if pool is None and following is not None:
                    count = WORKERS or len(os.sched_getaffinity(0))
                    pool = stack.enter_context(Pool(encoder, count))
                if pool is None:
                    save(path, encoder(group))
                else:
                    pool.put(path, group)
            group = following
    return paths


def joined(parts: Sequence[str], name: str) -> Iterator[np.ndarray]:
    """The array of that name of every part."""
    for path in parts:
        with np.load(path) as arrays:
            yield arrays[name]


class Pool:
    """Processes that encode parts. Leaving it waits for all; DataError if one fails."""

    def __init__(self, encoder: Encoder, count: int):
        self._folder = tempfile.TemporaryDirectory(prefix="triform-")
        setting = encoder.elsewhere(self._folder.name)
        self._jobs: queue.Queue = queue.Queue(1)
        self._failed: list[DataError] = []
        code = f"import sys; sys.path[:] = {sys.path!r}\n"
        code += f"from {__name__} import work; work()"
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                # Ctrl-C is for us: they end when we do, after the part at hand.
                start_new_session=True,
            )
            for _ in range(count)
        ]
        self._threads = [
            threading.Thread(target=self._feed, args=(p, setting), daemon=True)
            for p in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def put(self, path: str, examples: list[Any]) -> None:
        """Has a part encoded; waits while all are busy."""
        self._raise()
        self._jobs.put((path, examples))

    def _feed(self, process: subprocess.Popen, setting: Any) -> None:
        try:
            pickle.dump(setting, process.stdin, pickle.HIGHEST_PROTOCOL)
            while (job := self._jobs.get()) is not None:
                if self._failed:
                    continue
                pickle.dump(job, process.stdin, pickle.HIGHEST_PROTOCOL)
                process.stdin.flush()
                if error := pickle.load(process.stdout):
                    self._failed.append(error)
        except (OSError, EOFError, pickle.PickleError):
            code = process.wait()
            self._failed.append(
                DataError(
                    f"a process that encodes texts ended with {code}; is there enough "
                    "memory? Start again: finished parts are kept"
                )
            )
            while self._jobs.get() is not None:  # nobody waits for ever
                pass
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self._failed.append(
                DataError("interrupted")
            )  # parts that wait are not begun
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()
            process.stdout.close()
        self._folder.cleanup()
        if kind is None:
            self._raise()


def work() -> None:
    """What a process of a pool does: reads jobs, answers each with None or an error."""
    answers: Callable = sys.stdout.buffer
    jobs = sys.stdin.buffer
    make, arguments = pickle.load(jobs)
    encoder = make(*arguments)
    while True:
        try:
            path, examples = pickle.load(jobs)
        except EOFError:
            return
        try:
            save(path, encoder(examples))
            failed = None
        except DataError as error:
            failed = error
        except OSError as error:
            failed = DataError(
                f"{error.strerror or error}: {error.filename or path}; free disk space "
                "or mend the path, and start again: finished parts are kept"
            )
        except Exception as error:  # told to the one who asked, whatever it is
            failed = DataError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(BrokenPipeError):  # it is gone; the part is kept
            pickle.dump(failed, answers)
            answers.flush()
