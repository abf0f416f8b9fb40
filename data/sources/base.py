"""Where corpora that are kept on disk lie."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def local_copy(folder: str) -> str:
    """Path of a corpus kept beside the checkout, or '' if it is not there.

    Looks in `$TRIFORM_DATA/<folder>`, or in `../shared/data/<folder>` relative to the
    repository root when the variable is unset.
    """
    parent = os.environ.get("TRIFORM_DATA") or ROOT.parent / "shared" / "data"
    path = pathlib.Path(parent).expanduser() / folder
    return str(path) if path.is_dir() else ""
