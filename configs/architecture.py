"""Architecture of a model: which settings belong to it, copying, and comparing."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from triform.models.config import ModelConfig

# How a trunk is computed or trained: other values have the same parameters.
FREE = (
    *("dropout", "attention_dropout", "init", "attention", "attention_options"),
    *("dtype", "remat", "remat_keeps", "scan_layers", "logit_chunks"),
)


def taken(model: ModelConfig, here: ModelConfig) -> ModelConfig:
    """A copy of `model` with the heads of `here`, which are the new task's.

    Where `here` wraps a model (adapters), the wrapped one is replaced.
    """
    inner = {
        f.name: getattr(here, f.name)
        for f in dataclasses.fields(here)
        if isinstance(getattr(here, f.name), ModelConfig)
    }
    if len(inner) == 1 and type(here) is not type(model):
        ((name, wrapped),) = inner.items()
        return dataclasses.replace(here, **{name: taken(model, wrapped)})
    found = copy.deepcopy(model)
    if type(found) is type(here):
        for name in found.HEADS:
            setattr(found, name, getattr(here, name))
    return found


def mismatches(there: ModelConfig, here: ModelConfig) -> list[str]:
    """'trunk.d_model is 128 there, 192 here' for all that gives other parameters."""
    there, here = _base(there), _base(here)
    if type(there) is not type(here):
        names = type(there).__name__, type(here).__name__
        return ["model is {} there, {} here".format(*names)]
    old, new = (dict(_values(model)) for model in (there, here))
    return [
        f"{name} is {value!r} there, {new[name]!r} here"
        for name, value in old.items()
        if name in new and value != new[name]
    ]


def inputs(there: Any, here: Any) -> list[str]:
    """'data.mean is (0.4,) there, (0.5,) here' for all that trained weights expect of
    two configs of data.
    """
    return [
        f"data.{name} is {getattr(there, name)!r} there, {getattr(here, name)!r} here"
        for name in here.EXPECTED
        if hasattr(there, name) and getattr(there, name) != getattr(here, name)
    ]


def _base(model: ModelConfig) -> ModelConfig:
    """The model that adapters are added to; a model without them is its own."""
    while len(model.wraps()) == 1:
        (model,) = model.wraps()
    return model


def _values(config: Any, lead: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{lead}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{name}.")
        elif field.name not in FREE:
            yield name, value
