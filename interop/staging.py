"""A folder that is written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from triform.runtime import paths
from triform.runtime.errors import UserError


@contextlib.contextmanager
def all_or_nothing(target: str, last: str = "config.json") -> Iterator[str]:
    """A folder whose content becomes that of `target` if all goes well.

    `target` is new or an empty folder, also a symbolic link to one or a mount point:
    what is there stays, and its content is moved into it, the file `last` at the end.
    Work is done in a folder of a name that nobody else has. UserError if `target` is
    there and not empty, or if it was filled meanwhile.
    """
    place = os.path.realpath(paths.absolute(target))
    there = os.path.exists(place)
    _require_empty(place, target)
    parent = place if there else os.path.dirname(place)
    os.makedirs(parent, exist_ok=True)
    around = tempfile.mkdtemp(prefix=".triform-", dir=parent)
    try:
        partial = os.path.join(around, "content")
        os.mkdir(partial)  # with the user's own permissions; mkdtemp's are narrower
        yield partial
        if not there:
            _require_empty(place, target)
            os.rename(partial, place)
        else:
            _require_empty(place, target, os.path.basename(around))
            _move(partial, place, last)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def _require_empty(place: str, target: str, ours: str = "") -> None:
    if not os.path.lexists(place):
        return
    if not os.path.isdir(place) or set(os.listdir(place)) - {ours}:
        raise UserError(f"{target}: is there and not empty; name a new folder")


def _move(source: str, target: str, last: str) -> None:
    """Moves all entries; takes them back if one cannot be moved."""
    moved = []
    try:
        for name in sorted(os.listdir(source), key=lambda name: (name == last, name)):
            os.rename(os.path.join(source, name), os.path.join(target, name))
            moved.append(name)
    except BaseException:
        for name in moved:
            os.rename(os.path.join(target, name), os.path.join(source, name))
        raise
