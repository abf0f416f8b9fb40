"""Settings: one table per family, read from config.json to our config and back."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from triform.data.codecs.classes import PLACEHOLDER
from triform.models.config import ROPE_SCALINGS, RopeConfig, TransformerConfig
from triform.runtime.errors import UserError

Given = Mapping[str, Any]  # a config.json with what it leaves to its class
# Their name of an activation -> ours. Of several names of one, the first is written.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}


def refused(name: str, value: Any, rule: str, advice: str) -> UserError:
    """One line: the setting, the rule and what to do."""
    return UserError(f"config.json: {name}={value!r}: {rule}; {advice}")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One fact: where our config says it, where config.json does, and both ways."""

    ours: str = ""  # path in our config, "trunk.d_model"; "": has none
    theirs: str = ""  # key of config.json; "": has none
    default: Any = None  # of their class, where a config.json leaves the key out
    read: Callable[[Given], Any] | None = None  # our value; UserError if we have none
    write: Callable[[Any], Any] | None = None  # of our config: their value
    accepted: tuple = ()  # our values that they can express; (): all


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def equal(ours: str, theirs: str, default: Any) -> Setting:
    """A value that both have."""
    return Setting(ours, theirs, default, lambda hf: hf[theirs], copied(ours))


def copied(ours: str) -> Callable[[Any], Any]:
    """Our value as it is."""
    return lambda config: _get(config, ours)


def choice(ours: str, theirs: str, default: Any, values: Mapping[Any, Any]) -> Setting:
    """A value of theirs that `values` maps to ours; the first of several is written."""
    back = {ours: theirs for theirs, ours in reversed(values.items())}

    def read(hf: Given) -> Any:
        if hf[theirs] not in values:
            rule = f"those that can be imported are {', '.join(map(str, values))}"
            raise refused(theirs, hf[theirs], rule, "import another checkpoint")
        return values[hf[theirs]]

    def write(config: Any) -> Any:
        return back[_get(config, ours)]

    return Setting(ours, theirs, default, read, write, tuple(back))


def also(theirs: str, ours: str) -> Setting:
    """A key that repeats one of our values and is not read."""
    return Setting("", theirs, write=copied(ours))


def alike(theirs: str, other: str, ours: str, default: Any = None) -> Setting:
    """A key that is null or repeats another."""

    def read(hf: Given) -> None:
        if hf[theirs] not in (None, hf[other]):
            rule = f"both stacks are alike here, {other}={hf[other]}"
            raise refused(theirs, hf[theirs], rule, "import another checkpoint")

    return Setting("", theirs, default, read, copied(ours))


def only(theirs: str, value: Any, written: bool = False) -> Setting:
    """A key that is absent or has the one value that we do."""

    def read(hf: Given) -> None:
        if hf[theirs] != value:
            rule, advice = (
                f"only {value!r} can be imported",
                "import another checkpoint",
            )
            raise refused(theirs, hf[theirs], rule, advice)

    return Setting("", theirs, value, read, (lambda config: value) if written else None)


def fixed(ours: str, value: Any, *others: Any) -> Setting:
    """Our value of what they cannot choose; `others` give the same function."""
    return Setting(ours, read=lambda hf: value, accepted=(value, *others))


def preset(ours: str, value: Any) -> Setting:
    """A value for imported models of what they say nothing about."""
    return Setting(ours, read=lambda hf: value)


# Of every family, of those with exact attention, and of those without the choice.
TRUNK = (fixed("trunk.block", "standard"), fixed("trunk.patterns", ()))
EXACT = (*TRUNK, fixed("trunk.attention", "dot", "flash"))
UNSCALED = fixed("trunk.attention_options", ())
UNGROUPED = (fixed("trunk.num_kv_heads", 0), fixed("trunk.head_dim", 0))
FULL = fixed("trunk.windows", ())


def blocks(norm: str, position: str, bias: str, positions: str) -> tuple[Setting, ...]:
    """What their class has and no key says."""
    fields = {"norm": norm, "norm_position": position, "positions": positions}
    fields |= {"bias": bias} if bias else {}
    return tuple(fixed(f"trunk.{name}", value) for name, value in fields.items())


# --- Reading and writing a table ---


def defaults(table: Iterable[Setting]) -> dict[str, Any]:
    """What a config.json may leave out."""
    return {s.theirs: s.default for s in table if s.theirs and s.read}


def imported(table: Iterable[Setting], hf: Given) -> dict[str, Any]:
    """{path in our config: value}; UserError for what we do not do."""
    found = {s.ours: s.read(hf) for s in table if s.read}
    found.pop("", None)
    return found


def build(kind: type, values: Mapping[str, Any]) -> Any:
    """Our config of {path: value}."""
    inner = {k.removeprefix("trunk."): x for k, x in values.items() if "." in k}
    outer = {k: x for k, x in values.items() if "." not in k}
    return plain(kind(TransformerConfig(**inner), **outer))


def exported(table: Iterable[Setting], config: Any) -> dict[str, Any]:
    """Keys of config.json, of a config that has no `obstacles`."""
    usual = plain(config)
    return {s.theirs: s.write(usual) for s in table if s.write}


def obstacles(table: Iterable[Setting], config: Any) -> list[str]:
    """Values that they cannot express: "model.trunk.norm='rms': expected 'layer'"."""
    usual, found = plain(config), []
    for s in table:
        if s.accepted and _get(usual, s.ours) not in s.accepted:
            choices = " or ".join(map(repr, s.accepted))
            value = _get(config, s.ours)
            found.append(f"model.{s.ours}={value!r}: expected {choices}")
    return found


def plain(config: Any) -> Any:
    """The same model, with every value that is the usual one left to be derived.

    Of the options of attention only those that change the function are kept.
    """
    trunk = config.trunk
    divides = trunk.d_model % trunk.num_heads == 0
    usual = trunk.d_model // trunk.num_heads if divides else 0
    options = {k: x for k, x in trunk.options().items() if k == "dilation" and x != 1}
    if trunk.scale() != trunk.head_width() ** -0.5:
        options["scale"] = trunk.scale()
    trunk = dataclasses.replace(
        trunk,
        num_kv_heads=trunk.num_kv_heads % trunk.num_heads,
        head_dim=0 if trunk.head_dim == usual else trunk.head_dim,
        windows=shortest_cycle(trunk.windows) if any(trunk.windows) else (),
        patterns=() if {*trunk.patterns} <= {"none"} else trunk.patterns,
        attention_options=tuple(x for pair in options.items() for x in pair),
    )
    return dataclasses.replace(config, trunk=trunk)


# --- Labels, layers, rotary positions ---


def labels(hf: Given) -> int:
    """Number of classes; UserError if they are not one among several."""
    count = len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2)
    kind, expected = hf.get("problem_type"), "single_label_classification"
    expected = "regression" if count == 1 else expected
    if kind not in (None, expected):
        rule = f"with num_labels={count} only {expected!r} can be imported"
        advice = "set it to that to fine-tune the weights so, or import others"
        raise refused("problem_type", kind, rule, advice)
    names = hf.get("id2label") or {}
    if names and {str(key) for key in names} != {str(i) for i in range(count)}:
        rule = f"expected names of the classes 0 to {count - 1}"
        advice = "use the config.json of these weights"
        raise refused("id2label", sorted(names), rule, advice)
    return count


def label_names(names: Sequence[str]) -> dict[str, Any]:
    """How a config.json names the classes."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def unnamed(count: int) -> dict[str, Any]:
    """How a config.json says the number of classes without names."""
    return label_names([PLACEHOLDER.format(i) for i in range(count)])


def shortest_cycle(values: tuple[int, ...]) -> tuple[int, ...]:
    """The shortest tuple that is repeated to all values."""
    count = len(values)
    lengths = (n for n in range(1, count + 1) if count % n == 0)
    return next(values[:n] for n in lengths if values == values[:n] * (count // n))


def windows_of(config: Any) -> list[int]:
    """The window of every layer."""
    return [config.trunk.limits_of(i)[0] for i in range(config.trunk.num_layers)]


# Field of RopeConfig -> their key.
ROPE = {
    "factor": "factor",
    "length": "original_max_position_embeddings",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "fast": "beta_fast",
    "slow": "beta_slow",
    "attention": "attention_factor",
}
# Numbers that have defaults there, too; a 0 stands for them.
_OPTIONAL = ("fast", "slow", "attention")


def rope(hf: Given) -> RopeConfig:
    """Our rotary positions, of `rope_parameters` or the older two keys."""
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    base = given.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    kind = given.get("rope_type", given.get("type", "default"))
    share = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1.0):
        rule, advice = "all channels of a head rotate", "import another checkpoint"
        raise refused("partial_rotary_factor", share, rule, advice)
    kinds = {"default": "none", **{k: k for k in ROPE_SCALINGS if k != "none"}}
    if kind not in kinds:
        rule = f"the rope types that can be imported are {', '.join(kinds)}"
        raise refused("rope_type", kind, rule, "import another checkpoint")
    given[ROPE["length"]] = hf.get(ROPE["length"]) or given.get(
        ROPE["length"], hf["max_position_embeddings"]
    )
    if kind == "yarn":
        given["attention_factor"] = _yarn_attention(given)
    numbers = {}
    for name in ROPE_SCALINGS[kinds[kind]]:
        value = given.get(ROPE[name])
        if value is None and name not in _OPTIONAL:
            rule = f"rope type {kind!r} needs it"
            raise refused(f"rope_parameters.{ROPE[name]}", None, rule, "add it")
        if value or name not in _OPTIONAL:
            numbers[name] = int(value) if name == "length" else float(value)
    return RopeConfig(float(base), kinds[kind], **numbers)


def _yarn_attention(given: Given) -> float:
    """Their factor on cosines and sines; 0: 0.1 ln(factor) + 1."""
    if given.get("truncate") is False:
        rule = "the range of channels is rounded outwards"
        raise refused("rope_parameters.truncate", False, rule, "set it to true")
    factor = float(given.get("factor") or 1)

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention = given.get("attention_factor")
    top, bottom = given.get("mscale"), given.get("mscale_all_dim")
    if attention is None and top and bottom:
        attention = growth(top) / growth(bottom)
    if attention is None and factor <= 1:
        attention = 1.0
    return attention or 0.0


def rope_parameters(config: Any) -> dict[str, Any]:
    """The inverse of `rope`, as transformers 5 writes it."""
    ours = config.trunk.rope
    numbers = {ROPE[name]: getattr(ours, name) for name in ROPE_SCALINGS[ours.scaling]}
    if not ours.attention:
        numbers.pop("attention_factor", None)
    kind = "default" if ours.scaling == "none" else ours.scaling
    return {"rope_type": kind, "rope_theta": ours.base, **numbers}
