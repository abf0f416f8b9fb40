"""Standard streams that may be closed, full, or read by nobody any more."""

import contextlib
import io
import os
import sys
import time
from typing import Any

OUTPUT = "standard output"


class _Output(io.FileIO):
    """Standard output or standard error, which may fail while a program works.

    What cannot be written is left out and the program goes on, or, where the output is
    what the program is for (`needed`), the first failure raises an OSError.
    """

    def __init__(self, number: int, name: str, needed: bool):
        super().__init__(number, "w", closefd=False)
        self._title, self._needed, self._failed = name, needed, False

    def write(self, data: Any) -> int:
        if self._needed and self._failed:
            return len(data)  # told already; buffers must become empty at the end
        try:
            while (count := super().write(data)) is None:
                time.sleep(0.05)  # somebody made the pipe non-blocking
            return count
        except OSError as error:
            first, self._failed = not self._failed, True
            if self._needed:
                raise OSError(error.errno, error.strerror, self._title) from error
            if first and self._title == OUTPUT:
                reason = f"{self._title}: {error.strerror}; going on without it"
                print(reason, file=sys.stderr, flush=True)
            return len(data)


def prepare(needed: bool = False) -> None:
    """Makes the streams of this process ones that a program can rely on.

    A closed one is opened: no other file gets its number and, with it, what libraries
    print. Characters that an encoding lacks are escaped. `needed`: standard output is
    what the program is for, and its loss an OSError whose filename is OUTPUT.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # For reading only: what is written to it fails, as to a closed one.
            number = os.open(os.devnull, os.O_RDONLY)
        if name == "stdin":
            sys.stdin = stream or os.fdopen(number)
            continue
        encoding = stream.encoding if stream else "utf-8"
        if stream:
            with contextlib.suppress(OSError):
                stream.flush()
        title = OUTPUT if name == "stdout" else "standard error"
        raw = _Output(number, title, needed and name == "stdout")
        # A log file shows the plan while the run compiles, not afterwards.
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=encoding,
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, text)
