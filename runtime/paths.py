"""Names of tree leaves, and paths as users type them."""

import os

import jax

from triform.runtime import stores
from triform.runtime.errors import UserError


def path_name(path: tuple) -> str:
    """'decoder/layer_0/feed_forward/up/kernel' of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def absolute(path: str, setting: str = "HOME") -> str:
    """The absolute path, with a leading ~ as the home folder.

    UserError, naming what to set, if no home folder is known: a folder called '~' must
    not appear; and for a path on an object store, where only workdirs can be.
    """
    if stores.is_store(path):
        raise UserError(f"{path}: only a workdir can be on a store; name a local path")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{path}: no home folder of that user is known; set {setting}, or write "
            "the path in full"
        )
    return os.path.abspath(expanded)


def workdir(path: str) -> str:
    """The absolute path of a workdir: a local folder or a URL, s3://bucket/run."""
    return path.rstrip("/") if stores.is_store(path) else absolute(path)


def cache_root(given: str = "") -> str:
    """Where programs keep what can be made again: `given`, or the user's choice."""
    given = given or os.environ.get("TRIFORM_CACHE") or "~/.cache/triform"
    return absolute(given, setting="TRIFORM_CACHE")
