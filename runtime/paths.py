"""Names of tree leaves, and paths as users type them."""

import os

import jax


def path_name(path: tuple) -> str:
    """'decoder/layer_0/feed_forward/up/kernel' of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def absolute(path: str) -> str:
    """The absolute path, with a leading ~ as the home folder."""
    return os.path.abspath(os.path.expanduser(path))
