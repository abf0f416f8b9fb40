"""What accelerators can do by their makers' sheets, and devices that are not here."""

import dataclasses
import math
import os
import re

import jax

from triform.runtime.errors import UserError

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks are of dense products, in FLOP/s; 0: the maker names none."""

    name: str
    kind: str  # regular expression of the device_kind that JAX reports
    memory: float  # bytes
    bfloat16: float
    tf32: float  # float32 products with fewer bits: what JAX does by default on GPUs
    float32: float
    bandwidth: float  # bytes/s to the memory

    def gpu(self) -> bool:
        """Is it a GPU, of whose memory JAX takes a share?"""
        return not self.kind.startswith("TPU")

    def usable(self) -> float:
        """Bytes that JAX takes of its memory."""
        return self.memory * (memory_fraction() if self.gpu() else 1.0)

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products of this dtype; 0 if unknown."""
        if dtype in ("bfloat16", "float16"):
            return self.bfloat16
        exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
        if not self.gpu():
            # JAX's default multiplies float32 in one pass of bfloat16.
            return 0.0 if exact else self.bfloat16
        return self.float32 if exact else self.tf32 or self.float32


def _chip(name, kind, memory, bfloat16, tf32, float32, bandwidth) -> Chip:
    """From GB, TFLOP/s and GB/s, as sheets have them."""
    flops = (x * 1e12 for x in (bfloat16, tf32, float32))
    return Chip(name, kind, memory * GB, *flops, bandwidth * 1e9)


# NVIDIA's data sheets of each product, figures "with sparsity" halved; of the GeForce
# cards its Ampere GA102 and Ada whitepapers, float32 accumulation. Google's pages
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. H100, v5e and v6e were compared with these
# pages; B200, A100-40GB, RTX3090, RTX4090 and v4, in part, with others that quote them;
# the rest still has to be. The first kind that matches counts.
# name, device_kind, memory GB, bfloat16, tf32, float32 TFLOP/s, bandwidth GB/s
CHIPS = (
    _chip("B200", "B200", 180, 2250, 1125, 75, 8000),
    _chip("H200", "H200", 141, 989.4, 494.7, 67, 4800),
    _chip("H100-PCIE", "H100 PCIe", 80, 756, 378, 51, 2000),
    _chip("H100", "H100", 80, 989.4, 494.7, 67, 3350),
    _chip("A100-80GB", "A100.*80GB", 80, 312, 156, 19.5, 2039),
    _chip("A100-40GB", "A100", 40, 312, 156, 19.5, 1555),
    _chip("L40S", "L40S", 48, 362, 183, 91.6, 864),
    _chip("L4", r"L4\b", 24, 121, 60, 30.3, 300),
    _chip("A10", r"A10G?\b", 24, 125, 62.5, 31.2, 600),
    _chip("V100-32GB", "V100.*32GB", 32, 0, 0, 15.7, 900),
    _chip("V100-16GB", "V100", 16, 0, 0, 15.7, 900),
    _chip("T4", r"\bT4", 16, 0, 0, 8.1, 320),
    _chip("RTX4090", "RTX 4090", 24, 165.2, 82.6, 82.6, 1008),
    _chip("RTX3090", r"RTX 3090\b", 24, 71, 35.6, 35.6, 936),
    _chip("v6e", "TPU v6 lite|TPU v6e", 32, 918, 0, 0, 1640),
    _chip("v5e", "TPU v5 ?lite|TPU v5e", 16, 197, 0, 0, 819),
    _chip("v5p", "TPU v5", 95, 459, 0, 0, 2765),
    _chip("v4", "TPU v4", 32, 275, 0, 0, 1228),
)
# Names that others use.
ALIASES = {
    "A100": "A100-40GB",
    "A100-40": "A100-40GB",
    "A100-80": "A100-80GB",
    "H100-80GB": "H100",
    "H100-SXM": "H100",
    "A10G": "A10",
    "V100": "V100-16GB",
    "4090": "RTX4090",
    "3090": "RTX3090",
    "V5LITEPOD": "v5e",
}
# Slices of these are named by cores, two a chip; of the others by chips. JAX sees one
# device a chip.
NAMED_BY_CORES = ("v4", "v5p")


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes."""
    # The name that JAX reads, and its default.
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX names so, None if it is not in the table."""
    return next((c for c in CHIPS if re.search(c.kind, device_kind)), None)


def memory_of(device: jax.Device) -> float:
    """Bytes of a device that JAX takes; of a CPU the host's; 0 if unknown."""
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


@dataclasses.dataclass(frozen=True)
class Devices:
    """Chips to plan for."""

    chip: Chip
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.chip.name}"


def parse(text: str) -> Devices:
    """'H100', '8xH100', '2x8xA100-80GB' (hosts x devices of each) or 'v5e-64'.

    UserError names the chips that are known.
    """
    found = re.fullmatch(r"((?:\d+\s*[xX*]\s*)*)(.+)", text.strip())
    counts = re.findall(r"\d+", found[1]) if found else ["0"]
    name, size = found[2] if found else "", 1
    known = {c.name.upper(): c for c in CHIPS}
    slice_of = re.fullmatch(r"(?:tpu-?)?(v\w+?)-(\d+)", name, re.I)
    if slice_of and name.upper() not in known and name.upper() not in ALIASES:
        name, size = slice_of[1], int(slice_of[2])
    name = name.upper().removeprefix("NVIDIA").strip(" -").replace(" ", "-")
    chip = known.get(ALIASES.get(name, name).upper())
    if chip is None:
        raise UserError(
            f"--devices={text}: write 8xH100, 2x8xA100-80GB or v5e-64; known are "
            f"{', '.join(c.name for c in CHIPS)}"
        )
    if slice_of and chip.name in NAMED_BY_CORES:
        size //= 2
    count = math.prod(map(int, counts)) * size
    if not count:
        raise UserError(f"--devices={text}: that are no devices; name at least one")
    return Devices(chip, count)


def simulate(count: int) -> None:
    """Lets JAX see so many devices, which are none. Call it before the first array."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def parse_memory(text: str) -> float:
    """Bytes of '16GB', '16 GiB', '512MB' or a number of GB. UserError if it is none."""
    units = {"": GB, "GB": GB, "G": GB, "MB": 10**6, "GIB": 2**30, "MIB": 2**20}
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in units or found[1].count(".") > 1:
        raise UserError(f"--memory={text}: write a size like 16GB or 512MB")
    return float(found[1]) * units[found[2].upper()]
