"""What must be said to the host's allocator and compiler before arrays are made."""

import ctypes
import os
import sys

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc reuse the memory of freed arrays; False where there is no glibc.

    By default large buffers are mapped and unmapped at every step, and every page of
    them faults and is zeroed anew. On 2 CPU cores a step of 4,096 places of the
    Multi30k model took 347 ms with 193,000 page faults, and 280 ms with 16,000 in the
    same run.
    Call it before the first array; the process then never shrinks.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _M_ARENA_MAX: 1,  # only the main arena can hold blocks above 32 MB
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: -1,  # never: 2**31 - 1 gave large programs' pages back
        _M_TOP_PAD: 2**28,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())


# What is set unless XLA_FLAGS already says something of it.
COMPILER_FLAGS = {
    # By default XLA's library for CPU kernels (YNNPACK) also takes every reduction, one
    # call each with its own start-up: the norms, softmaxes and losses of a small model
    # then cost more than its matrix products, which it keeps. A step of the 4-layer,
    # width-128 GPT on 2 CPU cores took 60 ms with them and 44 ms without
    # (benchmarks/gpt_step.py); one of the model for CLDR, of seven times as many
    # places, took 4 % more without.
    "--xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    # A pass for CPUs that cuts sums in stages of 32 terms, each a loop of its own that
    # nothing is fused with. In one run a step of the 4-layer, width-128 GPT went from
    # 1.03 to 0.96 of PyTorch's without it, and of the 6-layer, width-384 one from 1.04
    # to 1.01. Sums of 4,096 numbers near 2 were as exact (1.0 roundings of the result,
    # and 1.2), one of a million less so (5, and 0.1). That of GPUs has another name.
    "--xla_disable_hlo_passes": "tree_reduction_rewriter",
    # GPUs otherwise add up in whatever order threads finish. On an H200 two runs of
    # gpt_shakespeare_char.py:cpu ended at 2.0024 and 2.0035 nats after 1,000 steps
    # without it; with it all evaluation losses of two runs were the same numbers.
    "--xla_gpu_deterministic_ops": "true",
}


def set_compiler_flags() -> None:
    """Adds COMPILER_FLAGS to XLA_FLAGS, which the first backend to start reads."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.partition("=")[0] for flag in flags}
    flags += [f"{k}={v}" for k, v in COMPILER_FLAGS.items() if k not in given]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def prepare() -> None:
    """Allocator and compiler, for a program that is about to compute."""
    keep_freed_memory()
    set_compiler_flags()
