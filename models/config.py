"""TransformerConfig, the trunk and nothing else; ModelConfig, base of the families."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from triform.models.patterns import PATTERNS, is_pattern

NORMS = ("layer", "rms")
NORM_POSITIONS = ("pre", "post")
BIASES = ("all", "qkv", "none")
# Scaling of rotary positions: the fields of RopeConfig that it reads.
ROPE_SCALINGS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "length", "low", "high"),
    "yarn": ("factor", "length", "fast", "slow", "attention"),
}
DTYPES = ("float32", "bfloat16")
REMAT_KEEPS = ("nothing", "products")
POOLS = ("token", "mean")  # what represents a row: its first position, or the mean
# Parameters with an axis over the vocabulary, and that axis.
VOCABULARY = {
    "embedding/embedding": 0,
    "target_embedding/embedding": 0,
    "head/kernel": 1,
    "masked_bias": 0,
    "head_bias": 0,
}
POSITION_TABLE = "positions/table/embedding"


@dataclasses.dataclass(unsafe_hash=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, 3.2.2) and their scaling to longer rows.

    `scaling` is one of
      none
      linear  positions are divided by `factor` (Chen et al. 2023)
      llama3  frequencies that turn fewer than `low` times over the original `length`
        are divided by `factor`, those above `high` kept, in between interpolated
        (Llama 3.1)
      yarn    the same between `slow` and `fast` turns (Peng et al. 2023, 3.2), and
        cosines and sines times `attention`; 0: 0.1 ln(factor) + 1
    """

    base: float = 10_000.0  # theta; the slowest wavelength is about 2 pi * base
    scaling: str = "none"  # how rotary positions are extended to longer rows
    factor: float = 1.0  # new length / original length
    length: int = 0  # original length, in positions (llama3, yarn)
    low: float = 1.0  # frequencies with fewer turns: divided by `factor` (llama3)
    high: float = 4.0  # frequencies with more turns in `length`: kept (llama3)
    fast: float = 32.0  # frequencies with more turns in `length`: kept (yarn)
    slow: float = 1.0  # frequencies with fewer turns: divided by `factor` (yarn)
    attention: float = 0.0  # factor on cos and sin (yarn); 0: 0.1 ln(factor) + 1

    def validate(self, where: str) -> None:
        """Raises ValueError with the value, the rule and the fix."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{where}.{name}={getattr(self, name)!r}: {rule}")

        require(self.base > 1, "base", "must be above 1")
        rule = f"expected one of {', '.join(ROPE_SCALINGS)}"
        require(self.scaling in ROPE_SCALINGS, "scaling", rule)
        read = ROPE_SCALINGS[self.scaling]
        for field in dataclasses.fields(self)[2:]:
            require(
                field.name in read or getattr(self, field.name) == field.default,
                field.name,
                f"scaling={self.scaling!r} does not read it; set {field.default}",
            )
        require(self.factor > 0, "factor", "must be positive")
        rule = f"scaling={self.scaling!r} needs the original length; set it"
        require("length" not in read or self.length > 0, "length", rule)
        require(0 <= self.low < self.high, "low", f"must lie below high={self.high}")
        require(0 < self.slow < self.fast, "slow", f"must lie below fast={self.fast}")
        require(self.attention >= 0, "attention", "must be 0 (derived) or positive")


@dataclasses.dataclass(unsafe_hash=True)
class TransformerConfig:
    """Settings that `Stack` and its parts read, the same for every family.

    A value of 0 in `num_kv_heads` and `head_dim` means the usual choice (num_heads,
    d_model // num_heads): a number, not None, so that it can be set from the command
    line.
    """

    # Sizes
    num_layers: int = 6  # number of blocks N
    d_model: int = 512  # model width D: size of the residual stream
    num_heads: int = 8  # number of query heads H
    num_kv_heads: int = 0  # key/value heads K (grouped-query attention); 0: num_heads
    head_dim: int = 0  # width E of one head; 0: d_model // num_heads
    d_ff: int = 2048  # hidden width F of the feed-forward sublayer
    max_len: int = 512  # longest sequence, in positions; 0: as long as the data's rows
    # Parts
    block: str = "standard"  # a name in models.blocks.BLOCKS
    attention: str = "dot"  # a name in models.algorithms.ALGORITHMS
    # Options of the attention algorithm, as alternating names and values: ("features",
    # 128, "kernel", "relu"). "scale" multiplies the query-key products in all of them
    # (default 1 / sqrt(head_dim)).
    attention_options: tuple[str | float, ...] = ()
    windows: tuple[int, ...] = ()  # one per layer, cycled; w: |i - j| < w; 0: no limit
    # One per layer, cycled: "none", or a name in models.patterns.PATTERNS and its
    # numbers ("strided:8"). A layer's window and pattern must both allow a position.
    patterns: tuple[str, ...] = ()
    positions: str = "sinusoidal"  # a name in models.positions.POSITIONS
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    norm: str = "layer"  # layer: LayerNorm; rms: RMSNorm (no mean, no bias)
    norm_position: str = "post"  # pre: before each sublayer; post: after residual sum
    norm_eps: float = 1e-6  # epsilon that the norm adds to the variance
    ffn: str = "relu"  # a name in models.feed_forward.FFNS
    bias: str = "all"  # which layers have a bias; qkv: only queries, keys, values
    init: str = "xavier"  # initialiser of all kernels: a name in models.layers.INITS
    dropout: float = 0.1  # rate on embeddings and sublayer outputs
    attention_dropout: float = 0.0  # dropout rate on attention weights
    # Type of activations. Parameters, statistics of norms and softmax stay float32.
    dtype: str = "float32"
    # Execution
    remat: bool = False  # recompute the activations of blocks in the backward pass
    # What remat stores besides the input of each block. products: also the products
    # with kernels; only attention, norms and activation functions are recomputed.
    remat_keeps: str = "nothing"
    # Number of chunks of positions; logits are computed chunk by chunk and recomputed
    # in the backward pass: less memory, slower. 1: all logits at once.
    logit_chunks: int = 1
    scan_layers: bool = False  # scan over stacked layers: compiles one block only

    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.num_kv_heads or self.num_heads

    def head_width(self) -> int:
        """Width E of a head."""
        return self.head_dim or self.d_model // self.num_heads

    def cycle(self) -> int:
        """Number of consecutive layers that differ: one step of a scanned trunk."""
        return math.lcm(len(self.windows) or 1, len(self.patterns) or 1)

    def limits_of(self, layer: int) -> tuple[int, str]:
        """(window, pattern) of a layer; 0 and "none": unlimited."""
        windows, patterns = self.windows or (0,), self.patterns or ("none",)
        return windows[layer % len(windows)], patterns[layer % len(patterns)]

    def options(self) -> dict[str, Any]:
        """The options of the attention algorithm by name, `scale` left out."""
        found = self._all_options()
        found.pop("scale", None)
        return found

    def _all_options(self) -> dict[str, Any]:
        flat = self.attention_options
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def reach(self, window: int) -> int:
        """How many positions back, its own included, a causal window sees."""
        return (window - 1) * self.options().get("dilation", 1) + 1

    def scale(self) -> float:
        """Factor on the query-key products."""
        return self._all_options().get("scale", self.head_width() ** -0.5)

    def validate(self, where: str = "model.trunk") -> None:
        """Raises ValueError with the value, the rule and the fix."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{where}.{name}={getattr(self, name)!r}: {rule}")

        names = "num_layers", "d_model", "num_heads", "d_ff", "max_len", "logit_chunks"
        for name in names:
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name, choices in (
            ("bias", BIASES),
            ("norm", NORMS),
            ("norm_position", NORM_POSITIONS),
            ("dtype", DTYPES),
            ("remat_keeps", REMAT_KEEPS),
        ):
            rule = f"expected one of {', '.join(choices)}"
            require(getattr(self, name) in choices, name, rule)
        self._validate_heads(require)
        self._validate_attention(require)
        self.rope.validate(f"{where}.rope")
        require(self.norm_eps > 0, "norm_eps", "must be positive")
        for name in ("dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")

    def _validate_heads(self, require: Callable[[bool, str, str], None]) -> None:
        require(
            self.head_dim > 0 or self.d_model % self.num_heads == 0,
            "num_heads",
            f"must divide d_model={self.d_model}; change one of them or set head_dim",
        )
        require(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads() == 0,
            "num_kv_heads",
            f"must be 0 or divide num_heads={self.num_heads}",
        )
        require(self.head_dim >= 0, "head_dim", "must be 0 (derived) or positive")
        require(
            self.block != "query_norm"
            or self.num_heads * self.head_width() == self.d_model,
            "head_dim",
            f"block='query_norm' has no kernel after the heads, so num_heads="
            f"{self.num_heads} of them must be as wide as d_model={self.d_model}; set "
            "head_dim=0",
        )
        require(
            self.positions != "sinusoidal" or self.d_model % 2 == 0,
            "d_model",
            "must be even with positions='sinusoidal' (sine and cosine halves)",
        )
        require(
            not self.positions.startswith("rotary") or self.head_width() % 2 == 0,
            "head_dim",
            f"the width of a head, {self.head_width()}, must be even with "
            f"positions={self.positions!r}, which rotates pairs of channels",
        )

    def _validate_attention(self, require: Callable[[bool, str, str], None]) -> None:
        names = self.attention_options[::2]
        require(
            len(self.attention_options) % 2 == 0
            and all(isinstance(name, str) for name in names)
            and len(set(names)) == len(names),
            "attention_options",
            "expected names and values alternating, each name once: ('block', 128)",
        )
        require(
            isinstance(self.scale(), (int, float)) and self.scale() > 0,
            "attention_options",
            "the scale must be a positive number: ('scale', 1.0)",
        )
        require(
            all(isinstance(w, int) and w >= 0 for w in self.windows),
            "windows",
            "must be a tuple of window sizes, 0 for unlimited",
        )
        require(
            all(map(is_pattern, self.patterns)),
            "patterns",
            "each must be 'none' or a name and its positive numbers, 'strided:8'; "
            f"names: {', '.join(PATTERNS)}",
        )
        # The longer of the two is the one to change.
        longer = max("windows", "patterns", key=lambda name: len(getattr(self, name)))
        require(
            not self.scan_layers or self.num_layers % self.cycle() == 0,
            longer,
            f"windows and patterns repeat every {self.cycle()} layers, which must "
            f"divide num_layers={self.num_layers} when scan_layers is on; change one "
            "of them or set scan_layers=False",
        )


class ModelConfig:
    """Base of every family's config: a trunk, and what other parts ask of the model."""

    trunk: TransformerConfig
    # Rows of the table of parameter axes (runtime/parameters.py) that come first.
    PARAMETERS: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Fields that belong to the task: its heads.
    HEADS: ClassVar[tuple[str, ...]] = ()

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have; see data/batch.py."""
        raise NotImplementedError

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value; those that are 0 are left out."""
        raise NotImplementedError

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that the model takes; absent: no limit."""
        return {"L": self.trunk.max_len}

    def axes(self) -> dict[str, int]:
        """Axis letter -> the size that every batch must have."""
        return {}

    def trunks(self) -> dict[str, TransformerConfig]:
        """Path in this config -> trunk."""
        return {"trunk": self.trunk}

    def wraps(self) -> tuple["ModelConfig", ...]:
        """Models that this one is built around."""
        return ()

    def derive(self, shape: Mapping[str, int], classes: Mapping[str, int]) -> None:
        """Sets the fields that are left to the data.

        Args:
          shape: axis letter -> longest row of the data. A trunk whose max_len is 0 is
            made long enough for it.
          classes: name of a size -> number of classes of the data. It replaces -1.
        """
        for model in self.wraps():
            model.derive(shape, classes)
        # With a max_len of 0, `longest` is what the model adds to a row, negative.
        lengths = [
            shape[axis] - limit
            for axis, limit in self.longest().items()
            if axis in shape
        ]
        for trunk in self.trunks().values():
            if trunk.max_len == 0 and lengths:
                trunk.max_len = max(lengths)
        for name, count in classes.items():
            if getattr(self, name, 0) == -1:
                setattr(self, name, count)

    def generates(self) -> bool:
        """Whether the module has `start` and `extend`."""
        return False

    def adapt(
        self, name: str, saved: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, str] | None:
        """(values of the shape of `fresh`, how they were fitted) of a saved parameter.

        Tables over a vocabulary and of learned positions keep the entries that both
        have; the rest are those of `fresh`. None where another shape has no meaning.
        """
        axis = VOCABULARY.get(name)
        if name.endswith(POSITION_TABLE):
            axis = 0
        return None if axis is None else shared_entries(saved, fresh, axis)

    def origin(self, name: str) -> str:
        """Name of the saved parameter that initialises `name` if none has this name.

        Projections of global tokens start as those of the others (Beltagy et al. 2020,
        3.1).
        """
        return name.replace("_global/", "/")

    def require(self, ok: bool, name: str, rule: str) -> None:
        """ValueError with the value and the rule, unless ok."""
        if not ok:
            raise ValueError(f"model.{name}={getattr(self, name)!r}: {rule}")

    def require_vocabulary(self) -> None:
        """ValueError if the specials do not fit into vocab_size."""
        rule = "must be at least 4 (pad, eos, unk and a token)"
        self.require(self.vocab_size >= 4, "vocab_size", rule)


def shared_entries(
    saved: np.ndarray, fresh: np.ndarray, axis: int
) -> tuple[np.ndarray, str] | None:
    """`fresh` with the first entries along `axis` from `saved`, and how many.

    None if another axis differs too.
    """
    old, new = (x.shape[:axis] + x.shape[axis + 1 :] for x in (saved, fresh))
    if saved.ndim != fresh.ndim or old != new:
        return None
    have, want = saved.shape[axis], fresh.shape[axis]
    kept = min(have, want)
    where = (slice(None),) * axis + (slice(kept),)
    values = np.array(fresh)
    values[where] = np.asarray(saved)[where]
    unit = ("rows", "columns")[axis]
    how = f"first {kept} of {have} {unit}"
    return values, how + (f", {want - kept} new" if want > kept else "")


def nonzero(config: ModelConfig, *names: str) -> dict[str, int]:
    """Those fields of the config that are not 0."""
    return {name: getattr(config, name) for name in names if getattr(config, name)}
