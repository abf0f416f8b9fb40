"""Low-rank adapters beside the kernels of any model (LoRA, Hu et al. 2022)."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from triform.models.config import ModelConfig, TransformerConfig
from triform.models.language_model import LanguageModelConfig
from triform.models.layers import Dense
from triform.models.logits import Logits
from triform.models.matmul import dot_general

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class LoRAConfig(ModelConfig):
    """Adapters of the kernels whose path a pattern matches.

    Patterns are searched in paths without the number of the layer, so that they mean
    the same in looped and scanned trunks: "decoder/self_attention/query/kernel".
    """

    model: ModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
    rank: int = 8  # rank of an adapter: inner width of its two matrices
    alpha: float = 16.0  # the adapter's product is scaled by alpha / rank
    rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023)
    # Regular expressions: a parameter gets an adapter if one is found in its path.
    targets: tuple[str, ...] = (r"/(query|value)/kernel$",)
    # (pattern, rank) pairs that override `rank`; the first match is used.
    ranks: tuple[tuple[str, int], ...] = ()
    dropout: float = 0.0  # dropout rate on the inputs of adapters

    @property
    def trunk(self) -> TransformerConfig:
        """The wrapped model's."""
        return self.model.trunk

    @property
    def PARAMETERS(self) -> tuple[tuple[str, str], ...]:
        """The adapters' rows of the table of parameter axes, and the model's own."""
        return _ROWS + tuple(self.model.PARAMETERS)

    def rank_of(self, path: str) -> int:
        """Rank of the adapter of the kernel at a path; 0: it has none."""
        path = re.sub(r"(layers/)?layer_\d+/", "", path)
        if not any(re.search(pattern, path) for pattern in self.targets):
            return 0
        ranks = (rank for pattern, rank in self.ranks if re.search(pattern, path))
        return next(ranks, self.rank)

    def scale(self, rank: int) -> float:
        """Factor on an adapter's product."""
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have."""
        return self.model.reads()

    def outputs(self) -> dict[str, str]:
        """Name of an output -> name of the size of its last axis."""
        return self.model.outputs()

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value."""
        return self.model.sizes()

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that the model takes."""
        return self.model.longest()

    def axes(self) -> dict[str, int]:
        """Axis letter -> the size that every batch must have."""
        return self.model.axes()

    def trunks(self) -> dict[str, TransformerConfig]:
        """Path in this config -> trunk."""
        return {f"model.{path}": x for path, x in self.model.trunks().items()}

    def wraps(self) -> tuple[ModelConfig, ...]:
        """The model that the adapters are added to."""
        return (self.model,)

    def generates(self) -> bool:
        """Whether the wrapped module has `start` and `extend`."""
        return self.model.generates()

    def adapt(
        self, name: str, saved: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, str] | None:
        """As the wrapped model."""
        return self.model.adapt(name, saved, fresh)

    def origin(self, name: str) -> str:
        """As the wrapped model."""
        return self.model.origin(name)

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.require(self.rank >= 1, "rank", "must be at least 1")
        self.require(self.alpha > 0, "alpha", "must be positive")
        self.require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)")
        self.require(bool(self.targets), "targets", "name at least one pattern")
        ranks = all(rank >= 1 for _, rank in self.ranks)
        self.require(ranks, "ranks", "expected pairs (pattern, rank), rank at least 1")
        self.model.validate()


# Of the kernels in runtime/parameters.py that trunks and heads have.
_ROWS = (
    (r"(query|key|value)(_global)?/lora_a$", "embed > rank"),
    (r"(query|key|value)(_global)?/lora_b$", "rank > heads head"),
    (r"out/lora_a$", "heads head > rank"),
    (r"out/lora_b$", "rank > embed"),
    (r"(up|gate)/lora_a$", "embed > rank"),
    (r"(up|gate)/lora_b$", "rank > mlp"),
    (r"down/lora_a$", "mlp > rank"),
    (r"down/lora_b$", "rank > embed"),
    (r"(pooler|dense)/lora_a$", "embed > rank"),
    (r"(pooler|dense)/lora_b$", "rank > hidden"),
    (r"head/lora_a$", "embed > rank"),
    (r"head/lora_b$", "rank > vocab"),
)


class LoRA(nn.Module):
    """The wrapped model; every dense layer with an adapter adds scale * (x a) b.

    a = lora_a [input axes..., R] and b = lora_b [R, output axes...], zeros at first,
    are parameters beside the layer's kernel. The other paths are the wrapped model's.
    """

    config: LoRAConfig
    model: nn.Module

    def setup(self) -> None:
        """The parameters of the wrapped model are those of this one."""
        nn.share_scope(self, self.model)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """What the wrapped model returns."""
        with nn.intercept_methods(self._adapted):
            return self.model(batch)

    def start(self, batch: Mapping[str, Array], length: int) -> tuple[Any, ...]:
        """See the wrapped model."""
        with nn.intercept_methods(self._adapted):
            return self.model.start(batch, length)

    def extend(self, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        """See the wrapped model."""
        with nn.intercept_methods(self._adapted):
            return self.model.extend(tokens, positions, cache)

    @nn.nowrap
    def _adapted(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if (
            not isinstance(module, (nn.Dense, Dense))
            or context.method_name != "__call__"
        ):
            return call(*args, **kwargs)
        rank = self.config.rank_of("/".join((*module.path, "kernel")))
        out = call(*args, **kwargs)
        if not rank:
            return out
        low, b = self._factors(module, *args, rank)
        if isinstance(out, Logits):
            return out.plus(low, b)
        added = dot_general(low, b, (((low.ndim - 1,), (0,)), ((), ())))
        return out + added.astype(out.dtype)

    @nn.nowrap
    def _factors(self, module: nn.Module, x: Array, rank: int) -> tuple[Array, Array]:
        """(scale * x a [..., rank], b [rank, *features]): their product is added."""
        count = module.axes if isinstance(module, Dense) else 1
        axes = tuple(range(x.ndim - count, x.ndim))
        features = module.features
        shape = features if isinstance(features, tuple) else (features,)
        inputs = tuple(x.shape[a] for a in axes)

        def uniform(rng: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            # Bounds 1 / sqrt(inputs), as in the paper's code.
            bound = math.prod(shape[:-1]) ** -0.5
            return jax.random.uniform(rng, shape, dtype, -bound, bound)

        a = module.param("lora_a", uniform, (*inputs, rank), jnp.float32)
        zeros = nn.initializers.zeros
        b = module.param("lora_b", zeros, (rank, *shape), jnp.float32)
        plain = not module.has_rng("dropout")
        x = nn.Dropout(self.config.dropout, deterministic=plain, name="lora_dropout")(x)
        x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
        low = dot_general(x, a, ((axes, tuple(range(len(axes)))), ((), ())))
        return low * jnp.asarray(self.config.scale(rank), low.dtype), b


def merge(params: Any, config: LoRAConfig) -> Any:
    """Parameters of the wrapped model alone: kernel + scale * a b, in float32.

    Looped or scanned; for models.build(config.model).
    """
    if not isinstance(params, Mapping):
        return params
    rest = {k: merge(x, config) for k, x in params.items() if k[:5] != "lora_"}
    if "lora_a" not in params:
        return rest
    kernel, a, b = (
        jnp.asarray(params[k], jnp.float32) for k in ("kernel", "lora_a", "lora_b")
    )
    scale = config.scale(a.shape[-1])

    def product(a: Array, b: Array) -> Array:
        return scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)

    scanned = a.ndim + b.ndim - 2 > kernel.ndim  # all have an axis of layers in front
    return rest | {"kernel": kernel + (jax.vmap(product) if scanned else product)(a, b)}
