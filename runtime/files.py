"""Files that are written whole or not at all, and JSON that every reader accepts.

A path may be on an object store (s3://bucket/run): see stores.py.
"""

import contextlib
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any

from triform.runtime import stores


@contextlib.contextmanager
def replacing(path: str, binary: bool = False) -> Iterator[IO]:
    """A file that takes the place of `path` once all is written: UTF-8, or `binary`.

    If that fails, what was there is still there. Devices and pipes are written to
    directly: /dev/stdout must stay what it is.
    """
    if stores.is_store(path):
        content = io.BytesIO()
        f = content if binary else io.TextIOWrapper(content, "utf-8", newline="")
        yield f
        f.flush()
        stores.write(path, content.getvalue())
        return
    kind, encoding = ("b", None) if binary else ("", "utf-8")
    special = os.path.exists(path) and not os.path.isfile(path)
    if special or path.startswith(("/dev/", "/proc/")):
        with open(path, f"w{kind}", encoding=encoding) as f:
            yield f
        return
    path = os.path.realpath(path)  # a link stays a link
    # A name that nobody else has: two programs may write the same file at once.
    part = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(part, f"x{kind}", encoding=encoding) as f:
            yield f
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and error.filename == part:
            error.filename = path  # the name that means something to a user
        raise


def strict(value: Any) -> Any:
    """The value with NaN and infinities as text: JSON has none."""
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON."""
    return json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: str, value: Any) -> None:
    """Replaces the file by the value, indented."""
    with replacing(path) as f:
        f.write(dumps(value, indent=2) + "\n")


def read_json(path: str) -> Any:
    """The value; None if there is no such file or it holds no JSON."""
    with contextlib.suppress(ValueError):
        return json.loads(read_text(path) or "null")
    return None


def read_text(path: str, errors: str = "strict") -> str | None:
    """The content; None only if there is no such file: a read error is raised.

    `errors` is what bytes become that are no UTF-8, as for `open`.
    """
    if stores.is_store(path):
        content = stores.read(path)
        if content is None:
            return None
        return io.TextIOWrapper(io.BytesIO(content), "utf-8", errors).read()
    try:
        with open(path, encoding="utf-8", errors=errors) as f:
            return f.read()
    except FileNotFoundError:
        return None


def append(path: str, text: str) -> None:
    """Adds text at the end of a file, which need not be there yet."""
    if stores.is_store(path):
        stores.write(path, (stores.read(path) or b"") + text.encode())
        return
    with open(path, "a", encoding="utf-8") as f:
        f.write(text)


def exists(path: str) -> bool:
    """Is there such a file or folder?"""
    return stores.exists(path) if stores.is_store(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    """Is there such a folder? One of a store is there if something is in it."""
    return bool(stores.names(path)) if stores.is_store(path) else os.path.isdir(path)


def size_below(path: str) -> int:
    """Bytes of all files in a folder and below it; 0 if there is no such folder."""
    if stores.is_store(path):
        return stores.size(path)
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    )


def remove_folder(path: str) -> None:
    """Removes a folder with all that is in it, as far as that goes."""
    if stores.is_store(path):
        stores.remove(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_folder(source: str, target: str) -> None:
    """Gives a folder another name, which is free."""
    if stores.is_store(source):
        stores.move(source, target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(source, target)


def make_folder(path: str) -> None:
    """The folder is there, with those above it; a store needs none."""
    if not stores.is_store(path):
        os.makedirs(path, exist_ok=True)
