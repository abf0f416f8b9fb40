"""The lock of a workdir: one run at a time, of however many processes."""

import contextlib
import fcntl
import os
import secrets
import time
from typing import Any

from triform.runtime import files, hosts, stores
from triform.runtime.errors import UserError
from triform.runtime.lease import Lease


def lock(workdir: str) -> Any:
    """A file that is locked until it is closed: one run at a time per workdir.

    Of several processes the first holds it; the others see by it that they have the
    same folder. On an object store it is a lease.
    """
    path = os.path.join(workdir, ".lock")
    token = hosts.here().broadcast("the lock of the workdir", secrets.token_hex(8))
    if not hosts.here().is_first:
        hosts.here().barrier("locking the workdir")
        if not stores.is_store(workdir):
            _require_shared(workdir, path, token)
        return contextlib.nullcontext()
    if stores.is_store(workdir):
        held = Lease(workdir)
        hosts.here().barrier("locking the workdir")
        return held
    # Tokens are of one length: none is cut off, while others may be reading it.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")  # kept open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"workdir={workdir!r}: another train.py runs in it; wait for it, stop it, "
            "or name another workdir"
        ) from error
    file.write(token)
    file.flush()
    hosts.here().barrier("locking the workdir")
    return file


def _require_shared(workdir: str, path: str, token: str) -> None:
    """UserError if the first process did not write this token to the path."""
    for _ in range(20):  # a network's file system may be late
        if files.read_text(path) == token:
            return
        time.sleep(0.5)
    raise UserError(
        f"workdir={workdir!r}: on this host it is another folder than on process 0; "
        "name one on a file system that all hosts share"
    )
