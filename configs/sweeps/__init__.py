"""Sweeps by name: files whose get_sweep() says which runs (see sweeps/values.py)."""

import os

FOLDER = os.path.dirname(os.path.abspath(__file__))


def names() -> list[str]:
    """What --sweep_file=NAME may name."""
    files = sorted(os.listdir(FOLDER))
    return [x.removesuffix(".py") for x in files if x.endswith(".py") and x[0] != "_"]
