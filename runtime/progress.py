"""What a program says while it works, and the numbers of a training run.

Nobody should wonder whether a program still works: after QUIET seconds without a line
it says what it is doing, on a terminal and in a log file alike.
"""

import contextlib
import datetime
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from triform.runtime import metrics
from triform.runtime.units import scaled

SOON = 2.0  # seconds after which a stage says that it has begun
WIDE = 109  # characters of a progress line, at most
QUIET = 20.0  # seconds between lines, at most
# Lines of a run that are shown where several run at a time.
NEWS = re.compile(r"(step|test|error|resuming|finished)\b")
# Made now: tqdm imports for it, and in a thread that may meet TFDS's lazy imports,
# which replace those of all threads for a while.
tqdm.get_lock()


class Heartbeat:
    """A thread that prints `text()` whenever no line was printed for some time."""

    def __init__(
        self, text: Callable[[], str], first: float, file: TextIO | None = None
    ):
        self._text, self._file = text, file
        self._due = time.monotonic() + first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def said(self) -> None:
        """Something else was printed just now."""
        # A little more than the owner's own pace, so that one of them speaks.
        self._due = time.monotonic() + 1.2 * QUIET

    def _run(self) -> None:
        while not self._over.wait(max(0.01, self._due - time.monotonic())):
            if time.monotonic() >= self._due:
                self.said()
                # Whoever reads it may be gone: the main thread finds that out, too.
                with contextlib.suppress(OSError, ValueError):
                    say(self._text(), self._file)

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join()


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line at once, above progress bars; nothing without an output."""
    file = file or sys.stdout
    if file is not None:
        # \x1b[K clears what a live line had there.
        tqdm.write(f"{text}\x1b[K" if file.isatty() else text, file)
        file.flush()


@contextlib.contextmanager
def stage(
    what: str, *, least: float = 0.0, file: TextIO | None = None
) -> Iterator[Callable[[str], None]]:
    """Says what is being done while it lasts, and how long it took.

    Yields a function that notes how far it is. Nothing is said at the end of what took
    less than `least` seconds, and nothing in between of what takes less than SOON.
    """
    start, far = time.perf_counter(), [""]

    def text() -> str:
        return f"{what} ... {time.perf_counter() - start:.0f} s{far[0]}"

    def note(text: str) -> None:
        far[0] = f", {text}"

    heartbeat = Heartbeat(text, SOON, file)
    try:
        yield note
    finally:
        heartbeat.close()
    seconds = time.perf_counter() - start
    if seconds >= least:
        say(f"{what}: {seconds:.1f} s", file)


class Progress:
    """Sums metrics between reports; one live line on a terminal, else plain lines.

    `window` is what `saved_window` gave when the run was saved: sums since the last
    report, so that a resumed run reports what an uninterrupted one would. `seen` is the
    number of real units (tokens, images) that the run has trained on.
    """

    def __init__(
        self,
        step: int,
        total: int,
        every: int,
        rate: Callable[[int], Any],
        window: dict[str, list],
        unit: str = "tokens",
        seen: int = 0,
    ):
        self.total, self.every, self.rate, self.unit = total, every, rate, unit
        self.seen = seen
        self.peak = 0.0  # FLOP/s of all devices together; 0: unknown
        self.waited_in_all = 0.0  # seconds
        self.live = sys.stdout is not None and sys.stdout.isatty()
        self.first = self.step = step
        self.started = time.perf_counter()
        self.idle = 0.0  # seconds of compiling, evaluation and saving, all in all
        self._reset()
        self.window = window
        self.said = self.stepped = time.perf_counter()
        self.heartbeat = Heartbeat(self._slow, 1.2 * QUIET)

    def _slow(self) -> str:
        seconds = time.perf_counter() - self.stepped
        return f"step {self.step + 1}/{self.total} ... {seconds:.0f} s"

    def saved_window(self) -> dict[str, list]:
        """{name: [total, weight]} since the last report, for a checkpoint's JSON."""
        sums = self.sums or {}
        return {k: [m.total.tolist(), m.weight.tolist()] for k, m in sums.items()}

    def _reset(self) -> None:
        self.sums: metrics.Metrics | None = None
        self.real, self.waited, self.away = 0, 0.0, 0.0
        self.flops: float | None = 0  # None: unknown of some step
        self.since, self.steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.waited += seconds
        self.waited_in_all += seconds

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Leaves the time inside out of the speed, as that of compiling a step."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.away += seconds
        self.idle += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the speed; what is done there speaks itself."""
        self.heartbeat.close()
        if self.live:
            print()
        with self.preparing():
            yield
        self.said = self.stepped = time.perf_counter()
        self.heartbeat = Heartbeat(self._slow, 1.2 * QUIET)

    def update(
        self, step: int, measured: metrics.Metrics, real: int, flops: int = 0
    ) -> dict[str, float] | None:
        """Takes in a step, measured on the host, of `real` units of data.

        `flops` are those of the step, 0 if they are not known.

        Returns the scalars of a report, if one is due.
        """
        self.step, self.stepped = step, time.perf_counter()
        scalars = metrics.values(measured, "train")
        for name, (total, weight) in self.window.items():
            m = measured[name]
            measured[name] = m.replace(total=m.total + total, weight=m.weight + weight)
        self.window = {}
        self.sums = metrics.add(self.sums, measured)
        self.real += real
        self.seen += real
        self.steps += 1
        self.flops = self.flops + flops if flops and self.flops is not None else None
        if self.live:
            self._show(scalars, end="\r")
        elif step % self.every and self.stepped - self.said >= QUIET:
            self._show(scalars, end="\n")
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
        if self.flops:
            line["train/flops_per_second"] = self.flops / seconds
            if self.peak:
                line["train/mfu"] = self.flops / seconds / self.peak
        if not self.live:
            self._show(line, end="\n")
        self._reset()
        return line

    def _show(self, scalars: dict, end: str) -> None:
        now = time.perf_counter()
        seconds = max(now - self.since - self.away, 1e-9)
        left = datetime.timedelta(seconds=int(self.pace() * (self.total - self.step)))
        parts = [
            f"step {self.step}/{self.total}",
            f"loss {scalars['train/loss']:.4f}",
            f"lr {float(self.rate(self.step - 1)):.2e}",
            f"grad {scalars['train/grad_norm']:.3f}",
            f"{self.real / seconds:,.0f} {self.unit}/s{self._flops(seconds)}",
            f"data {self.waited / seconds:.0%}",
            f"left {left}",
        ]
        while len(text := "  ".join(parts)) > WIDE:
            parts.pop(2)  # the rate, then the gradient's norm: metrics.jsonl has them
        if self.live:
            # A wrapped line could not be overwritten; \x1b[K clears what was longer.
            text = text[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        print(text, end=end, flush=True)
        self.said = now
        self.heartbeat.said()

    def pace(self) -> float:
        """Seconds a step since the start, without compiling, evaluation and saving."""
        return (time.perf_counter() - self.started - self.idle) / max(
            1, self.step - self.first
        )

    def _flops(self, seconds: float) -> str:
        """'  12.3 TFLOP/s 41%', the share of the peak; '' where they are unknown."""
        if not self.flops:
            return ""
        rate = self.flops / seconds
        share = f" {rate / self.peak:.0%}" if self.peak else ""
        return f"  {scaled(rate)}FLOP/s{share}"

    def close(self) -> None:
        """Ends the live line."""
        self.heartbeat.close()
        if self.live:
            print()
