"""safetensors: tensors of a folder one by one, and a folder of tensors one by one."""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from triform.runtime.errors import UserError

Shape = tuple[int, ...]

# Their name of a dtype that parameters may have -> ours.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5_000_000_000  # bytes in a file at most, as transformers shards


class Weights:
    """The tensors of a Hugging Face folder; `names` maps a name to the one in a file.

    Nothing is held: every `read` reads its bytes. Use it as a context.
    """

    def __init__(self, folder: str, single: str = SINGLE):
        self.folder = folder
        self._open = contextlib.ExitStack()
        files = {}
        where = _files(folder, single)
        for name in sorted(set(where.values())):
            files[name] = self._file(name)
        stored = {key: f for f in files.values() for key in f.keys()}  # noqa: SIM118
        if lost := sorted(set(where) - set(stored) - {""}):
            raise UserError(
                f"{os.path.join(folder, INDEX)}: lists {len(lost)} tensors that are in "
                f"no file: {', '.join(lost)}; copy the folder again"
            )
        self._stored = stored
        self.names = {name: name for name in stored}

    def _file(self, name: str):
        path = os.path.join(self.folder, name)
        try:
            # Not mapped into memory: pages would stay beside the arrays read from them.
            opened = safe_open(path, framework="numpy", backend="pread")
            return self._open.enter_context(opened)
        except FileNotFoundError as error:
            raise UserError(f"{path}: not there; copy the folder again") from error
        except SafetensorError as error:
            raise UserError(f"{path}: {error}; copy the file again") from error

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def shape(self, name: str) -> Shape:
        """Of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor, as safetensors calls it."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """A tensor, in its own dtype."""
        return self._stored[self.names[name]].get_tensor(self.names[name])

    def same(self, name: str, other: str) -> bool:
        """Do two names hold the same values?"""
        if self.shape(name) != self.shape(other):
            return False
        return np.array_equal(self.read(name), self.read(other), equal_nan=True)

    def _slice(self, name: str):
        return self._stored[self.names[name]].get_slice(self.names[name])


def _files(folder: str, single: str) -> dict[str, str]:
    """{tensor: file} of an index, or {'': file} of a single file."""
    index = os.path.join(folder, INDEX)
    if os.path.exists(os.path.join(folder, single)):
        return {"": single}
    if not os.path.exists(index):
        raise UserError(
            f"{folder}: holds neither {single} nor {INDEX}; save the model with "
            "save_pretrained of a transformers that writes safetensors"
        )
    try:
        with open(index, encoding="utf-8-sig") as f:
            return dict(json.load(f)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: no weight_map ({error}); copy it again") from error


@dataclass(frozen=True)
class Tensor:
    """One to be written; `make` gives its values when it is written."""

    name: str
    shape: Shape
    dtype: str
    make: Callable[[], np.ndarray]

    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def write(folder: str, tensors: Iterable[Tensor], shard: int = SHARD) -> Iterator[int]:
    """Writes the tensors one by one; yields the bytes of each when it is written.

    safetensors' own writer wants all of them at once, in memory.
    """
    # Wide elements first: every tensor is aligned to its own.
    order = sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name))
    shards: list[list[Tensor]] = [[]]
    for tensor in order:
        if shards[-1] and sum(t.size() for t in shards[-1]) + tensor.size() > shard:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        yield from write_file(os.path.join(folder, SINGLE), order)
        return
    files = {}
    for i, part in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        files |= {t.name: name for t in part}
        yield from write_file(os.path.join(folder, name), part)
    total = sum(t.size() for t in order)
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as f:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        json.dump(index, f, indent=2, sort_keys=True)


def write_file(path: str, tensors: list[Tensor]) -> Iterator[int]:
    """Writes one file; yields the bytes of each tensor when it is written."""
    header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size()
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = tensor.make().astype(DTYPES[tensor.dtype], order="C", copy=False)
            f.write(values.reshape(-1).view(np.uint8).data)
            yield tensor.size()
        f.flush()
        os.fsync(f.fileno())
