"""The families that are read and written, by transformers' name of them."""

from collections.abc import Mapping
from typing import Any

from triform.interop import settings
from triform.interop.bert import BERT, LONGFORMER, ROBERTA
from triform.interop.esm import ESM
from triform.interop.gpt2 import GPT2
from triform.interop.llama import LLAMA, MISTRAL, QWEN2
from triform.interop.mapping import Family
from triform.interop.marian import MARIAN
from triform.interop.t5 import T5
from triform.interop.vit import VIT
from triform.runtime.errors import UserError

# The first that fits is what a model of ours becomes.
_ORDER = (
    *(BERT, ROBERTA, LONGFORMER, ESM, GPT2, LLAMA, MISTRAL, QWEN2, T5, MARIAN),
    VIT,
)
FAMILIES = {family.model_type: family for family in _ORDER}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json; UserError if it is none of ours."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={kind!r}: those that can be imported are "
            f"{', '.join(FAMILIES)}; import one of them"
        )
    return FAMILIES[kind]


def complete(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with everything it leaves to its class; UserError if it is not for
    us.
    """
    family = family_of(hf)
    found = {**settings.defaults(family.settings), **family.defaults, **hf}
    found["architectures"] = hf.get("architectures") or [family.architectures[0]]
    kind = found["architectures"][0]
    if kind not in family.architectures:
        raise UserError(
            f"config.json: architectures={kind!r}: those that can be imported are "
            f"{', '.join(family.architectures)}; save the model as one of them"
        )
    if hf.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config: quantised weights cannot be imported; "
            "use the unquantised ones"
        )
    return found


def model_config(hf: Mapping[str, Any], weights: Any = None) -> Any:
    """Our model config of a config.json; `weights`, if given, says what is stored.

    UserError, in one line, for every setting that our model does not have.
    """
    family, hf = family_of(hf), complete(hf)
    values = settings.imported(family.settings, hf) | family.read(hf, weights)
    config = settings.build(family.config_type, values)
    try:
        config.validate()
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error
    return config


def family_for(config: Any) -> Family:
    """The first family that expresses a config; UserError that says why none does."""
    reasons = []
    for family in FAMILIES.values():
        if family.config_type is not type(config):
            continue
        found = family.obstacles(config)
        if not found:
            return family
        reasons.append((len(found), f"{family.model_type}: {'; '.join(found)}"))
    if not reasons:
        raise UserError(f"transformers has no model like {type(config).__name__}")
    nearest = min(reasons)[1]
    raise UserError(
        f"transformers has no such model; the nearest is {nearest}; it can be exported "
        "after training with these settings"
    )


def hf_config(config: Any, family: Family | None = None) -> dict[str, Any]:
    """The config.json of a config; UserError if transformers cannot express it."""
    family = family or family_for(config)
    if found := family.obstacles(config):
        raise UserError(
            f"transformers' {family.model_type} cannot express {'; '.join(found)}; it "
            "can be exported after training with these settings"
        )
    return {
        "model_type": family.model_type,
        "architectures": [family.architectures[0]],
        **settings.exported(family.settings, config),
        **family.write(config),
    }
