"""Hashes of files' contents, read once for every state of a file."""

import hashlib
import json
import os
import time
from collections.abc import Sequence

from triform.data import progress
from triform.data.sources.streams import CHUNK, opened_raw

# A file that was written less than this before it was read may change again within the
# same tick of its clock: its hash is not kept.
RACY = 2.0  # seconds


def digests(paths: Sequence[str], cache: str) -> list[str]:
    """A hash of the content of every file.

    Always of all its bytes: a sample would miss a corrected label, and a run would go
    on with other data than it began with. Hashes are kept in the folder `cache` ('':
    nowhere) by path, size, time of change and inode, so that a file is read again only
    if one of these differs.
    """
    table_path = ""
    if cache:
        key = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape"))
        table_path = os.path.join(cache, f"digests-{key.hexdigest()[:32]}.json")
    known, found = _load(table_path), {}
    for path in progress.counted(paths, "looking at files", len(paths), "files"):
        state = _state(path)
        old = known.get(path)
        digest = old[1] if old and old[0] == state else _digest(path)
        found[path] = (state, digest)
    if table_path and found != known:
        now = time.time_ns()
        kept = {k: v for k, v in found.items() if now - v[0][1] > RACY * 1e9}
        os.makedirs(cache, exist_ok=True)
        part = f"{table_path}.{os.getpid()}.tmp"
        with open(part, "w", encoding="utf-8", errors="surrogateescape") as f:
            json.dump(kept, f)
        os.replace(part, table_path)
    return [found[path][1] for path in paths]


def _load(path: str) -> dict[str, tuple]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            return {
                k: (list(state), digest) for k, (state, digest) in json.load(f).items()
            }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _state(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return [-1]  # opening it says why
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _digest(path: str) -> str:
    content = hashlib.blake2b(digest_size=16)
    with opened_raw(path) as raw:
        while part := raw.read(CHUNK):
            content.update(part)
    return content.hexdigest()
