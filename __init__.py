"""Transformers in JAX: an architecture is a config, an application data and a task.

    triform.train.run(config, workdir) -> scores
    triform.evaluate.run(workdir, split) -> Result
    triform.Sampler(workdir)(requests) -> outputs
    triform.load(workdir) -> model, params, tokenizer, config

Nothing is imported before it is asked for. See docs/python.md.
"""

import contextlib
import importlib
import os
import tempfile
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


def _find_temporary_folder() -> None:
    """Makes `tempfile` usable in a container where only the cache can be written.

    Libraries ask for a temporary folder while they are imported, and fail without one.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        cache = os.environ.get("TRIFORM_CACHE") or "~/.cache/triform"
        folder = os.path.join(os.path.abspath(os.path.expanduser(cache)), "tmp")
        with contextlib.suppress(OSError):
            if not os.path.expanduser(cache).startswith("~"):
                os.makedirs(folder, exist_ok=True)
                tempfile.tempdir = folder


_find_temporary_folder()


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"triform has no {name!r}; it has {', '.join(_NAMES)}")
    module = importlib.import_module(_NAMES[name])
    is_module = module.__name__.rpartition(".")[2] == name
    return module if is_module else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
