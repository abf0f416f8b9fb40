"""What was compiled is kept: JAX's persistent compilation cache, on in every program.

It lies under the cache root. A user's JAX_COMPILATION_CACHE_DIR wins: then all is as
JAX does it; JAX_ENABLE_COMPILATION_CACHE=0 compiles everything anew.

JAX's own store locks the whole folder for every entry, reads the times of all others
before it writes one, and is stuck once a process was killed while it wrote. Ours
replaces it: entries are written whole or not at all, and none is trusted unread.
"""

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import sys
import threading
import warnings
from typing import Any

import jax
import jaxlib
from jax import monitoring
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from triform.runtime import files, paths
from triform.runtime.errors import UserError

# What is set unless the environment says otherwise, in capitals.
SETTINGS = {
    "jax_compilation_cache_max_size": 2 << 30,  # bytes of all entries; -1: no limit
    # By default JAX leaves out what took less than a second to compile.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
REFUSED = "refused-by-xla"  # file of a folder: XLA does not take back what it gave
CPU_FACTS = ("vendor_id", "cpu family", "model", "flags", "Features")  # /proc/cpuinfo
_HIT = "/jax/compilation_cache/cache_hits"
_JAX_ERROR = re.compile(r"Error (read|writ)ing persistent compilation cache entry for ")
_here = threading.local()  # of this thread: how many executables came from the cache


class Cache(CacheInterface):
    """Entries in a folder: a file each, the checksum in front.

    Everything that goes wrong is a miss; the first time, it is told in one line.
    """

    def __init__(self, folder: str, limit: int):
        self._path = pathlib.Path(folder)  # JAX's name for it
        self.folder, self.limit = folder, limit
        self.off = os.path.exists(os.path.join(folder, REFUSED))
        self._room = 0  # bytes that may be written before the folder is looked at
        self._told = False

    def get(self, key: str) -> bytes | None:
        """The value of a key, None if there is none."""
        if self.off:
            return None
        path = self._file(key)
        try:
            with open(path, "rb") as f:
                entry = f.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"{path} cannot be read ({error.strerror}); compiling anew")
            return None
        value = entry[16:]
        if _checksum(value) != entry[:16]:
            self._tell(f"{path} is damaged; compiling anew")
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: the oldest ones go first
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keeps the value of a key."""
        entry = _checksum(value) + value
        if self.off or 0 <= self.limit < len(entry):
            return
        try:
            if self.limit >= 0 and self._room < len(entry):
                used = prune(os.path.dirname(self.folder), self.limit - len(entry))
                self._room = self.limit - used
            with files.replacing(self._file(key), binary=True) as f:
                f.write(entry)
            self._room -= len(entry)
        except OSError as error:
            self.off = True
            self._tell(
                f"{self.folder} cannot be written ({error.strerror}): what is compiled "
                "is not kept; set TRIFORM_CACHE"
            )

    def refuse(self, reason: str) -> None:
        """XLA did not take an entry back, so it will take none: the folder is not used
        any more, by later processes neither.
        """
        if self.off:
            return
        self.off = True
        with contextlib.suppress(OSError):
            pathlib.Path(self.folder, REFUSED).write_text(reason + "\n")
        self._tell(
            f"XLA refuses what it compiled itself ({reason:.120}); it is not used from "
            f"now on. To try again: rm -r {self.folder}"
        )

    def _file(self, key: str) -> str:
        return os.path.join(self.folder, f"{key[:64]}-{_checksum(key.encode()).hex()}")

    def _tell(self, text: str) -> None:
        if not self._told and sys.stderr is not None:
            print(f"compilation cache: {text}", file=sys.stderr, flush=True)
        self._told = True


def _checksum(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()


def prune(root: str, limit: int) -> int:
    """Deletes the files below `root` that were not used for longest, down to `limit`
    bytes, if they are more; then to a tenth less. The bytes that are left.
    """
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                about = os.stat(path := os.path.join(folder, name))
                found.append((about.st_mtime, about.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= limit:
        return total
    for _, size, path in sorted(found):
        if total <= 0.9 * limit:
            break
        with contextlib.suppress(OSError):  # another process was first
            os.unlink(path)
        total -= size
    return total


def host_facts() -> str:
    """What compiled code depends on besides what JAX puts into an entry's name."""
    facts = {platform.machine(), platform.processor()}
    text = files.read_text("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else ""
    for line in (text or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in CPU_FACTS:
            facts.add(f"{name.strip()}: {' '.join(sorted(value.split()))}")
    # JAX compresses with it where it is installed, and cannot read it elsewhere.
    facts.add(f"zstandard: {importlib.util.find_spec('zstandard') is not None}")
    return "\n".join(sorted(facts))


def folder_of(root: str) -> str:
    """The folder under a cache root for this user, this jaxlib and this host's CPU.

    Entries are programs: nobody takes those that another user wrote.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    cpu = _checksum(host_facts().encode()).hex()[:12]
    return os.path.join(root, f"compiled-{user}", f"{jaxlib.__version__}-{cpu}")


def prepare() -> None:
    """Turns the cache on for this process, before anything is compiled."""
    monitoring.register_event_listener(_count)
    _show_in_one_line()
    config = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        folder = folder_of(paths.cache_root())
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        os.makedirs(folder, exist_ok=True)
    except (OSError, UserError):  # whoever needs the cache root says why
        return
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            config.update(name, value)
    config.update("jax_compilation_cache_dir", folder)
    cache = Cache(folder, config.jax_compilation_cache_max_size)
    compilation_cache.get_file_cache = lambda path: (cache, path)
    compilation_cache.reset_cache()


def hits() -> int:
    """How many executables of this thread came from the cache."""
    return getattr(_here, "hits", 0)


def _count(event: str, **about: Any) -> None:
    if event == _HIT:
        _here.hits = hits() + 1


def _show_in_one_line() -> None:
    """JAX warns of every entry that it cannot use; ours is told once."""
    show, told = warnings.showwarning, []

    def shown(message: Any, *where: Any, **more: Any) -> None:
        if not _JAX_ERROR.match(str(message)):
            show(message, *where, **more)
            return
        cache = compilation_cache._cache
        reason = " ".join(str(message).split())
        if isinstance(cache, Cache) and reason.startswith("Error reading"):
            cache.refuse(_JAX_ERROR.sub("", reason))
        elif not told:
            told.append(reason)
            print(f"compilation cache: {reason:.300}; compiling anew", file=sys.stderr)

    warnings.showwarning = shown
