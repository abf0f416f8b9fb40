"""Progress of what takes long: a bar on a terminal, else a line every half minute."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SILENT = 25.0  # seconds without a line, at most, where there is no terminal


class Bar:
    """Counts up to `total` (0: unknown) of `unit`; `with` closes it.

    What took more than a moment says at the end how long it took.
    """

    def __init__(self, what: str, total: int = 0, unit: str = "examples"):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._start = self._told = time.monotonic()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            desc=what,
            total=total or None,
            unit=f" {unit}",
            unit_scale=True,
            disable=not self._terminal,
            leave=False,
        )

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        self._bar.update(count)
        if not self._terminal and time.monotonic() > self._told + SILENT:
            self._told = time.monotonic()
            self._tell(f" of {self.total:,}" if self.total else "")

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
        if time.monotonic() > self._start + 2:
            self._tell("")

    def _tell(self, total: str) -> None:
        if sys.stderr is not None:
            seconds = time.monotonic() - self._start
            text = f"{self.what}: {self.done:,}{total} {self.unit} in {seconds:.0f} s"
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def counted(items: Iterable, what: str, total: int = 0, unit: str = "examples"):
    """The items, counted by a bar."""

    def found() -> Iterator:
        with Bar(what, total, unit) as bar:
            for item in items:
                yield item
                bar.update()

    return found()
