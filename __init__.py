"""Transformers in JAX: an architecture is a config, an application data and a task.

    triform.train.run(config, workdir) -> scores
    triform.evaluate.run(workdir, split) -> Result
    triform.Sampler(workdir)(requests) -> outputs
    triform.load(workdir) -> model, params, tokenizer, config

Nothing is imported before it is asked for. See docs/python.md.
"""

import importlib
from typing import Any

# Name -> the module that it is, or that has it.
_NAMES = {
    "Sampler": "triform.generate",
    "configs": "triform.configs",
    "evaluate": "triform.evaluate",
    "generate": "triform.generate",
    "load": "triform.workdir",
    "plugins": "triform.configs.plugins",
    "train": "triform.train",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"triform has no {name!r}; it has {', '.join(_NAMES)}")
    module = importlib.import_module(_NAMES[name])
    is_module = module.__name__.rpartition(".")[2] == name
    return module if is_module else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
