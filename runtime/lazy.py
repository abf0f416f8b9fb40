"""Slow libraries, imported when they are used first.

For those of other people that cost a start more than 20 ms and that few starts need.
Our own modules are imported at the top.
"""

import importlib
from typing import Any


class Module:
    """Stands for a module: `ocp = lazy.Module("orbax.checkpoint")`."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)
