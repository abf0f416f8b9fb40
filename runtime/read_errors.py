"""A failed read of a checkpoint: are its bytes damaged, or could they not be had?"""

import re
from typing import Any

from triform.runtime.errors import CheckpointError

# Errors that say what the bytes are: they are no JSON, no array, or not there.
_OF_BYTES = (ValueError, LookupError, TypeError, NotADirectoryError, FileNotFoundError)
# Errors of tensorstore that say that the bytes could not be had. It names the system's
# errors ('[OS error 5: EIO Input/output error]'), and statuses.
_OF_READING = re.compile(
    r"OS error \d+: (?!ENOENT|ENOTDIR)|RESOURCE_EXHAUSTED|PERMISSION_DENIED|"
    r"UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|UNKNOWN"
)


class Corrupt(Exception):
    """What is stored for a step is not what was saved."""


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


def reason(error: BaseException) -> str:
    """What first went wrong, in one line, without tensorstore's specification."""
    error = _chain(error)[-1]
    line = " ".join(f"{type(error).__name__}: {error}".split())
    line = line.partition(" [tensorstore_spec=")[0]
    return line if len(line) < 500 else f"{line[:290]} ... {line[-200:]}"
