"""What must be said to the host's allocator and compiler before arrays are made."""

import ctypes
import functools
import mmap
import os
import pathlib
import sys

import jaxlib

from triform.runtime import files
from triform.runtime.errors import UserError

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_M_MMAP_MAX, _M_ARENA_MAX = -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc reuse the memory of freed arrays; False where there is no glibc.

    By default large buffers are mapped and unmapped at every step, and every page of
    them faults and is zeroed anew (see benchmarks/RESULTS.md).
    Call it before the first array; the process then never shrinks.
    """
    return _mallopt(
        {
            _M_ARENA_MAX: 1,  # only the main arena can hold blocks above 32 MB
            _M_MMAP_MAX: 0,
            _M_TRIM_THRESHOLD: -1,  # never: 2**31 - 1 gave large programs' pages back
            _M_TOP_PAD: 2**28,
        }
    )


def return_freed_memory() -> bool:
    """Lets glibc return the memory of freed arrays; False where there is no glibc.

    By default it keeps blocks of up to 32 MB, of which reading a checkpoint frees many.
    """
    return _mallopt({_M_MMAP_THRESHOLD: 1 << 20})


def resident_bytes(trim: bool = False) -> int:
    """Memory of this process in bytes, 0 where it cannot be told.

    With `trim` freed memory that the allocator kept so far is given back first.
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        if trim:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except (OSError, AttributeError, IndexError):
        return 0
    return int(pages) * mmap.PAGESIZE


def _mallopt(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in settings.items())


# What is set unless XLA_FLAGS already says something of it.
COMPILER_FLAGS = {
    # By default XLA's library for CPU kernels (YNNPACK) also takes every reduction, one
    # call each with its own start-up: the norms, softmaxes and losses of a small model
    # then cost more than its matrix products, which it keeps (benchmarks/RESULTS.md).
    "--xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    # A pass for CPUs that splits sums into stages of 32 terms, each a loop of its own
    # that nothing is fused with. Without it steps are faster, and only sums of very
    # many terms less exact: see benchmarks/RESULTS.md. That of GPUs has another name.
    "--xla_disable_hlo_passes": "tree_reduction_rewriter",
    # GPUs otherwise add up in whatever order threads finish, and two runs of one config
    # end at different losses: see benchmarks/RESULTS.md.
    "--xla_gpu_deterministic_ops": "true",
}


SUFFIXES = (".so", ".dylib", ".pyd", ".dll")  # of libraries


def set_compiler_flags() -> None:
    """Adds COMPILER_FLAGS to XLA_FLAGS, which the first backend to start reads.

    XLA_FLAGS may be the name of a file with flags: its content is taken in its place.
    What this jaxlib does not know is left out, since an unknown flag ends the process.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if given.strip() and not given.lstrip().startswith("-"):
        text = files.read_text(given)
        if text is None:
            raise UserError(
                f"XLA_FLAGS={given!r}: no such file, and flags start with '-'; mend or "
                "unset it"
            )
        given = text
    names = {flag.partition("=")[0] for flag in given.split()}
    missing = {k: v for k, v in COMPILER_FLAGS.items() if k not in names}
    ours = [f"{k}={v}" for k, v in missing.items() if known(k, v)]
    os.environ["XLA_FLAGS"] = " ".join([given.strip(), *ours]).strip()


@functools.cache
def known(flag: str, value: str) -> bool:
    """Does this jaxlib's library have the words of a flag and its value?"""
    words = flag.lstrip("-").encode(), value.encode()
    folder = pathlib.Path(jaxlib.__file__).parent
    libraries = [x for x in folder.iterdir() if x.suffix in SUFFIXES]
    largest = max(libraries, key=lambda x: x.stat().st_size, default=None)
    if largest is None:
        return False
    with (
        open(largest, "rb") as f,
        mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return all(content.find(word) >= 0 for word in words)


def prepare() -> None:
    """Allocator and compiler, for a program that is about to compute."""
    keep_freed_memory()
    set_compiler_flags()
