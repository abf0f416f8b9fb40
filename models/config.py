"""TransformerConfig: the trunk and nothing else."""

import dataclasses
from collections.abc import Mapping
from typing import Any

NORMS = ("layer", "rms")
NORM_POSITIONS = ("pre", "post")
POSITIONS = ("sinusoidal", "learned", "rotary", "relative", "none")
BIASES = ("all", "qkv", "none")
# Scaling of rotary positions: name and how many numbers follow it.
ROPE_SCALINGS = {"linear": 1, "llama3": 4, "yarn": 5}
DTYPES = ("float32", "bfloat16")
POOLS = ("token", "mean")  # what stands for a row: its first place, or all of them


@dataclasses.dataclass(unsafe_hash=True)
class TransformerConfig:
    """Settings that `Stack` and its parts read, the same for every family.

    A value of 0 in `num_kv_heads`, `head_dim` and `attention_scale` means the usual
    choice (num_heads, d_model // num_heads, 1 / sqrt(head_dim)): a number, not None,
    so that it can be set from the command line.
    """

    # Sizes
    num_layers: int = 6
    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int = 0  # fewer than num_heads: grouped-query attention
    head_dim: int = 0
    d_ff: int = 2048
    max_len: int = 512  # longest sequence, in tokens
    # Parts
    attention: str = "dot"  # a name in models.algorithms.ALGORITHMS, or such a function
    # Names and values of the algorithm's own keyword arguments, in turn:
    # ("features", 128, "kernel", "relu").
    attention_options: tuple[str | float, ...] = ()
    attention_scale: float = 0.0
    windows: tuple[int, ...] = ()  # cycled over layers; 0: unlimited, w: |i - j| < w
    positions: str = "sinusoidal"
    rope_base: float = 10_000.0  # slowest wavelength of rotary positions / 2 pi
    # How rotary positions reach beyond the length they were trained on: a name and its
    # numbers, see models.positions.rotary_frequencies; (): not at all.
    rope_scaling: tuple[str | float, ...] = ()
    norm: str = "layer"
    norm_position: str = "post"
    norm_eps: float = 1e-6
    ffn: str = "relu"  # a name in models.transformer.FFNS
    bias: str = "all"  # of kernels and norms; "qkv": queries, keys and values only
    init: str = "xavier"  # a name in models.attention.INITS, of every kernel
    dropout: float = 0.1  # embeddings and sublayer outputs (Vaswani et al. 2017, 5.4)
    attention_dropout: float = 0.0  # attention weights
    # Numerics: activations; parameters, norms' statistics and softmax stay float32
    dtype: str = "float32"
    # Execution
    remat: bool = False  # recompute each block's activations in the backward pass
    scan_layers: bool = False  # compile one block instead of num_layers of them

    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.num_kv_heads or self.num_heads

    def head_width(self) -> int:
        """Width E of a head."""
        return self.head_dim or self.d_model // self.num_heads

    def options(self) -> dict[str, Any]:
        """The options of the attention algorithm by name."""
        flat = self.attention_options
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def reach(self, window: int) -> int:
        """How many positions back, its own included, a causal window sees."""
        return (window - 1) * self.options().get("dilation", 1) + 1

    def scale(self) -> float:
        """Factor on the query-key products."""
        return self.attention_scale or self.head_width() ** -0.5

    def validate(self, where: str = "model.trunk") -> None:
        """Raises ValueError with the value, the rule and the fix."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{where}.{name}={getattr(self, name)!r}: {rule}")

        for name in ("num_layers", "d_model", "num_heads", "d_ff", "max_len"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
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
        names = self.attention_options[::2]
        require(
            len(self.attention_options) % 2 == 0
            and all(isinstance(name, str) for name in names)
            and len(set(names)) == len(names),
            "attention_options",
            "expected names and values in turn, each name once: ('block', 128)",
        )
        require(
            all(isinstance(w, int) and w >= 0 for w in self.windows),
            "windows",
            "must be a tuple of window sizes, 0 for unlimited",
        )
        require(
            not (self.scan_layers and self.windows)
            or self.num_layers % len(self.windows) == 0,
            "windows",
            f"its length must divide num_layers={self.num_layers} when scan_layers is "
            "on; change one of them or set scan_layers=False",
        )
        for name, choices in (
            ("positions", POSITIONS),
            ("bias", BIASES),
            ("norm", NORMS),
            ("norm_position", NORM_POSITIONS),
            ("dtype", DTYPES),
        ):
            require(
                getattr(self, name) in choices,
                name,
                f"expected one of {', '.join(choices)}",
            )
        require(
            self.positions != "sinusoidal" or self.d_model % 2 == 0,
            "d_model",
            "must be even with positions='sinusoidal' (sine and cosine halves)",
        )
        require(
            self.positions != "rotary" or self.head_width() % 2 == 0,
            "head_dim",
            f"the width of a head, {self.head_width()}, must be even with "
            "positions='rotary', which turns pairs of channels",
        )
        require(self.rope_base > 1, "rope_base", "must be above 1")
        require(
            not self.rope_scaling
            or len(self.rope_scaling) - 1 == ROPE_SCALINGS.get(self.rope_scaling[0]),
            "rope_scaling",
            "expected () or a name and its numbers: "
            + ", ".join(f"{k} and {n}" for k, n in ROPE_SCALINGS.items()),
        )
        require(self.norm_eps > 0, "norm_eps", "must be positive")
        for name in ("dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")


class ModelConfig:
    """Base of every family's config: a trunk, and what others ask of the model."""

    trunk: TransformerConfig
    reads: tuple[str, ...] = ("inputs",)  # keys that a batch must have

    def limits(self) -> Mapping[str, int]:
        """How many ids each key of a batch may hold, those of predictions included."""
        raise NotImplementedError

    def longest(self) -> int:
        """Tokens that a row may have."""
        return self.trunk.max_len

    def adapt(self, name: str, saved: Any, shape: tuple[int, ...]) -> Any | None:
        """A parameter of another shape, from a model of this family, made to fit.

        None if that has no meaning: then it is initialised.
        """
        return None

    def origin(self, name: str) -> str:
        """Whose saved values a parameter starts from that has none of its own.

        The projections of global tokens start as those of the others (Beltagy et al.
        2020, 3.1). The name itself: of nobody else.
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
