"""Transformers in JAX: an architecture is a config, an application data and a task.

    triform.train.run(config, workdir) -> scores
    triform.evaluate.run(workdir, split) -> Result
    triform.Sampler(workdir)(requests) -> outputs
    triform.load(workdir) -> model, params, tokenizer, config

Nothing is imported before it is asked for. See docs/python.md.
"""

import importlib
from typing import Any

# Name -> the module that has it; the other names are modules of the package.
_NAMES = {"Sampler": "triform.generate", "load": "triform.workdir"}
_MODULES = ("configs", "evaluate", "generate", "plugins", "train", "workdir")

__all__ = ["Sampler", "configs", "evaluate", "generate", "load", "plugins", "train"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"triform.{name}")
    raise AttributeError(f"triform has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
