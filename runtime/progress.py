"""The live progress line of a training run, and the numbers behind it."""

import contextlib
import datetime
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from triform.runtime import metrics


class Progress:
    """Sums metrics between reports; one live line on a terminal, else plain lines.

    `window` is what `saved_window` gave when the run was saved: sums since the last
    report, so that a resumed run reports what an uninterrupted one would.
    """

    def __init__(
        self,
        step: int,
        total: int,
        every: int,
        rate: Callable[[int], Any],
        window: dict[str, list],
        unit: str = "tokens",
    ):
        self.total, self.every, self.rate, self.unit = total, every, rate, unit
        self.live = sys.stdout.isatty()
        self.first = self.step = step
        self.started = time.perf_counter()
        self.idle = 0.0  # seconds spent on evaluation and saving, all in all
        self._reset()
        self.window = window

    def saved_window(self) -> dict[str, list]:
        """{name: [total, weight]} since the last report, for a checkpoint's JSON."""
        sums = self.sums or {}
        return {k: [m.total.tolist(), m.weight.tolist()] for k, m in sums.items()}

    def _reset(self) -> None:
        self.sums: metrics.Metrics | None = None
        self.real, self.waited, self.away = 0, 0.0, 0.0
        self.since, self.steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the speed."""
        if self.live:
            print()
        start = time.perf_counter()
        yield
        self.away += time.perf_counter() - start
        self.idle += time.perf_counter() - start

    def update(
        self, step: int, measured: metrics.Metrics, real: int
    ) -> dict[str, float] | None:
        """Takes in a step, measured on the host, of `real` units of data.

        Returns the scalars of a report, if one is due.
        """
        self.step = step
        scalars = metrics.values(measured, "train")
        for name, (total, weight) in self.window.items():
            m = measured[name]
            measured[name] = m.replace(total=m.total + total, weight=m.weight + weight)
        self.window = {}
        self.sums = metrics.add(self.sums, measured)
        self.real += real
        self.steps += 1
        if self.live:
            self._show(scalars, end="\r")
        if step % self.every:
            return None
        seconds = max(time.perf_counter() - self.since - self.away, 1e-9)
        line = metrics.values(self.sums, "train")
        line |= {
            "train/learning_rate": float(self.rate(step - 1)),
            f"train/{self.unit}_per_second": self.real / seconds,
            "train/steps_per_second": self.steps / seconds,
            "train/data_wait": self.waited / seconds,
        }
        if not self.live:
            self._show(line, end="\n")
        self._reset()
        return line

    def _show(self, scalars: dict, end: str) -> None:
        now = time.perf_counter()
        seconds = max(now - self.since - self.away, 1e-9)
        pace = (now - self.started - self.idle) / max(1, self.step - self.first)
        left = datetime.timedelta(seconds=int(pace * (self.total - self.step)))
        text = (
            f"step {self.step}/{self.total}  loss {scalars['train/loss']:.4f}  "
            f"lr {float(self.rate(self.step - 1)):.2e}  "
            f"grad {scalars['train/grad_norm']:.3f}  "
            f"{self.real / seconds:,.0f} {self.unit}/s  "
            f"data {self.waited / seconds:.0%}  left {left}"
        )
        if self.live:
            # A wrapped line could not be overwritten; \x1b[K clears what was longer.
            text = text[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        print(text, end=end, flush=True)

    def close(self) -> None:
        """Ends the live line."""
        if self.live:
            print()
