"""What the members of a pack print: news of each, all of it into its own file."""

import contextlib
import io
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import TextIO

from triform.runtime.progress import NEWS


class Lines(io.TextIOBase):
    """Standard output of several threads: lines with news, with the thread's name.

    `files`: thread -> a file that gets all of its lines, without the name.
    """

    def __init__(self, out: TextIO, files: Mapping[str, TextIO]):
        self._out, self._files = out, files
        self._begun: dict[str, str] = {}

    def isatty(self) -> bool:
        """False: a line that is written over would be everybody's."""
        return False

    def write(self, text: str) -> int:
        """See TextIOBase."""
        name = threading.current_thread().name
        if name not in self._files:
            return self._out.write(text)
        *lines, self._begun[name] = (self._begun.get(name, "") + text).split("\n")
        for line in lines:
            self._files[name].write(f"{line}\n")
            if NEWS.match(line):
                self._out.write(f"{name} | {line}\n")
        return len(text)

    def flush(self) -> None:
        """See TextIOBase."""
        self._out.flush()
        if file := self._files.get(threading.current_thread().name):
            file.flush()


@contextlib.contextmanager
def printed(paths: Mapping[str, str]) -> Iterator[None]:
    """Standard output meanwhile: thread -> a file that its lines are appended to."""
    out = sys.stdout
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(open(path, "a", encoding="utf-8"))
            for name, path in paths.items()
        }
        if out is not None:
            stack.enter_context(contextlib.redirect_stdout(Lines(out, files)))
        yield
