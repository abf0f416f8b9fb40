"""Settings of a config.json: what is read, what is refused, and rotary scaling."""

import math
from collections.abc import Mapping
from typing import Any

from triform.runtime.errors import UserError

# Their name of an activation -> ours; several of theirs are the same function.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
GATED = {"silu": "swiglu", "gelu_tanh": "geglu"}
# Ours -> the name that is written.
THEIR_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "swiglu": "silu",
    "geglu": "gelu_pytorch_tanh",
}
UNGATED = ("relu", "gelu", "gelu_tanh", "silu")
# Algorithms that compute what is called attention there.
EXACT = ("dot", "flash")


def refused(name: str, value: Any, rule: str, advice: str) -> UserError:
    """One line: the setting, the rule and what to do."""
    return UserError(f"config.json: {name}={value!r}: {rule}; {advice}")


def need(
    hf: Mapping[str, Any],
    name: str,
    accepted: Any,
    advice: str = "import a checkpoint without it",
) -> None:
    """UserError unless a setting is absent or has the one value that we do."""
    if name in hf and hf[name] != accepted:
        raise refused(name, hf[name], f"only {accepted!r} can be imported", advice)


def activation(hf: Mapping[str, Any], name: str, gated: bool = False) -> str:
    """Our `ffn` of a setting that holds an activation's name."""
    table = {k: GATED[v] for k, v in ACTIVATIONS.items() if v in GATED}
    table = table if gated else ACTIVATIONS
    if hf[name] not in table:
        what = "gated activations" if gated else "activations"
        rule = f"the {what} that can be imported are {', '.join(table)}"
        raise refused(name, hf[name], rule, "add it to models.transformer.FFNS")
    return table[hf[name]]


def labels(hf: Mapping[str, Any]) -> int:
    """Number of classes."""
    if hf.get("id2label"):
        return len(hf["id2label"])
    return hf.get("num_labels", 2)


def label_names(count: int) -> dict[str, Any]:
    """How a config.json says the number of classes."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our rope_base and rope_scaling, of `rope_parameters` or the older two keys."""
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    base = given.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    kind = given.get("rope_type", given.get("type", "default"))
    share = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1.0):
        rule, advice = "all channels of a head are turned", "import another checkpoint"
        raise refused("partial_rotary_factor", share, rule, advice)
    if kind not in _SCALINGS:
        rule = f"the rope types that can be imported are {', '.join(_SCALINGS)}"
        raise refused("rope_type", kind, rule, "import another checkpoint")
    length = hf.get("original_max_position_embeddings") or given.get(
        "original_max_position_embeddings", hf["max_position_embeddings"]
    )
    given["original_max_position_embeddings"] = length
    if missing := [name for name in _NEEDED[kind] if given.get(name) is None]:
        rule = f"rope type {kind!r} needs it"
        raise refused(f"rope_parameters.{missing[0]}", None, rule, "mend config.json")
    scaling = _SCALINGS[kind](given)
    return {"rope_base": float(base), "rope_scaling": scaling}


def _yarn(given: Mapping[str, Any]) -> tuple:
    if given.get("truncate") is False:
        rule = "the range of channels is rounded outwards"
        raise refused("rope_parameters.truncate", False, rule, "set it to true")
    factor = float(given["factor"])

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention = given.get("attention_factor")
    top, bottom = given.get("mscale"), given.get("mscale_all_dim")
    if attention is None and top and bottom:
        attention = growth(top) / growth(bottom)
    if attention is None and factor <= 1:
        attention = 1.0
    return (
        "yarn",
        factor,
        float(given.get("beta_fast") or 32),
        float(given.get("beta_slow") or 1),
        float(given["original_max_position_embeddings"]),
        float(attention or 0),
    )


def _llama3(given: Mapping[str, Any]) -> tuple:
    return "llama3", *(float(given[name]) for name in _NEEDED["llama3"])


_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
}
_SCALINGS = {
    "default": lambda given: (),
    "linear": lambda given: ("linear", float(given["factor"])),
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_parameters(trunk: Any) -> dict[str, Any]:
    """The inverse of `rope`, as transformers 5 writes it."""
    base = {"rope_theta": trunk.rope_base}
    if not trunk.rope_scaling:
        return {"rope_type": "default", **base}
    kind, *numbers = trunk.rope_scaling
    names = _NEEDED[kind]
    if kind == "yarn":
        names = (
            *("factor", "beta_fast", "beta_slow"),
            *("original_max_position_embeddings", "attention_factor"),
        )
        if not numbers[-1]:
            names, numbers = names[:-1], numbers[:-1]
    values = dict(zip(names, numbers, strict=True))
    if (length := "original_max_position_embeddings") in values:
        values[length] = int(values[length])
    return {"rope_type": kind, **base, **values}


def shortest_cycle(values: tuple[int, ...]) -> tuple[int, ...]:
    """The shortest tuple that is repeated to all values."""
    count = len(values)
    lengths = (n for n in range(1, count + 1) if count % n == 0)
    return next(values[:n] for n in lengths if values == values[:n] * (count // n))


def unmet(config: Any, wanted: Mapping[str, tuple]) -> list[str]:
    """'model.trunk.norm='rms': expected 'layer'' for every field with another value."""
    found = []
    for name, accepted in wanted.items():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if value not in accepted:
            choices = " or ".join(map(repr, accepted))
            found.append(f"model.{name}={value!r}: expected {choices}")
    return found


def plain_heads(config: Any) -> dict[str, tuple]:
    """What `unmet` asks of ungrouped heads that divide the width."""
    trunk = config.trunk
    width = trunk.d_model // trunk.num_heads
    return {
        "trunk.attention": EXACT,
        "trunk.windows": ((), *[(0,) * n for n in range(1, len(trunk.windows) + 1)]),
        "trunk.num_kv_heads": (0, trunk.num_heads),
        "trunk.head_dim": (0, width) if trunk.d_model % trunk.num_heads == 0 else (),
        "trunk.attention_scale": (0.0, width**-0.5),
    }
