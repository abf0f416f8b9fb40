"""A failed read of a checkpoint: are its bytes damaged, or could they not be had?"""

import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from triform.runtime import hosts
from triform.runtime.errors import CheckpointError, reason

# Errors that say what the bytes are: they are no JSON, no array, or not there.
_OF_BYTES = (ValueError, LookupError, TypeError, NotADirectoryError, FileNotFoundError)
# Errors of tensorstore that say that the bytes could not be had: numbers of the system
# but for missing files, in two spellings, and statuses.
_MISSING = f"{errno.ENOENT}|{errno.ENOTDIR}"
_OF_READING = re.compile(
    rf"os_error_code='(?!(?:{_MISSING})')|OS error (?!(?:{_MISSING}):)|"
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|"
    "DEADLINE_EXCEEDED|ABORTED|CANCELLED|UNKNOWN"
)


# How orbax begins lines about a file of its own that nobody reads.
_UNREAD = ("Failed to json parse Metadata", "Failed to read Metadata", "Metadata file")


def _untold(record: logging.LogRecord) -> bool:
    """False for the four tracebacks that orbax logs of a failure it also raises, and
    for what is wrong with a file that nobody reads.
    """
    told = ("run() raised an exception", "Handler Commit", "Save Finalize thread")
    text = str(record.msg)
    again = record.exc_info and any(sign in text for sign in told)
    return not (again or text.startswith(_UNREAD))


logging.getLogger("absl").addFilter(_untold)


@functools.cache
def hush() -> None:
    """Lets orbax's readers of single arrays end without a traceback each.

    Once the first has failed, of which we tell, the others are left behind: their event
    loop is closed, and they fail one by one.
    """
    before = sys.unraisablehook

    def hook(failure: Any) -> None:
        code = getattr(failure.object, "cr_code", None)
        reader = code is not None and "orbax" in code.co_filename
        if not reader and str(failure.exc_value) != "Event loop is closed":
            before(failure)

    sys.unraisablehook = hook


class Corrupt(Exception):
    """What is stored for a step is not what was saved."""


def by_all(what: str, read: Callable[[], Any]) -> Any:
    """What `read` gives; Corrupt on all processes if it is on one.

    Each reads by itself, and only then do they wait for one another, with a timeout:
    computing on what not all could read would hang.
    """
    found, problem = None, None
    try:
        found = read()
    except Corrupt as error:
        problem = error
    told = hosts.here().agree(what, problem and str(problem), hosts.SLOW)
    if problem is None and any(told):
        who = next(i for i, text in enumerate(told) if text)
        problem = Corrupt(f"{told[who]}, as {hosts.here().title(who)} found")
    if problem is not None:
        raise problem
    return found


def classify(error: Exception, step: int, directory: Any) -> Exception:
    """What a failed read means: Corrupt only if the error is about the bytes.

    A disk, a network or a process without free file handles may fail while every byte
    is fine: then nothing is moved, and the next start may succeed.
    """
    chain = _chain(error)
    root = isinstance(chain[-1], _OF_BYTES)
    system = [x for x in chain if isinstance(x, OSError | MemoryError)]
    told = any(_OF_READING.search(str(x)) for x in chain)
    if root and not told and all(isinstance(x, _OF_BYTES) for x in system):
        return Corrupt(f"unreadable: {reason(error)}")
    return _unread(step, directory, error)


def check_readable(step: int, directory: Any) -> None:
    """CheckpointError if a file of a step cannot be read to its end.

    Asked before a step counts as damaged: a library may take a failed read for a file
    that is too short.
    """
    if "://" in str(directory):
        return  # an object store: its client names its errors

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise _unread(step, directory, error) from error

    for folder, _, names in os.walk(os.path.join(directory, str(step)), onerror=fail):
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as f:
                    while f.read(1 << 24):
                        pass
            except OSError as error:
                fail(error)


def _unread(step: int, directory: Any, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"step {step} in {directory} could not be read ({reason(error)}); nothing was "
        "moved: mend the disk, the network or the limits of this process and start "
        "again"
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it came from, the first of all at the end."""
    chain = [error]
    while True:
        last = chain[-1]
        before = last.__cause__
        if before is None and not last.__suppress_context__:
            before = last.__context__
        if before is None or before in chain:
            return chain
        chain.append(before)
