"""Signals that ask a program to save and leave."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

INTERRUPTED = 75  # exit code EX_TEMPFAIL: try again
# From a user, a launcher, a closed terminal, a batch system before its time limit.
SAVING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
PARENT = "TRIFORM_PARENT"  # environment: the process that ours must not outlive
_SET_PDEATHSIG = 1  # linux/prctl.h


def install(handler: Callable[[int, Any], None]) -> None:
    """Calls `handler` for the signals of SAVING.

    SIGHUP stays ignored if it is: the user started the program with nohup.
    """
    for number in (getattr(signal, x) for x in SAVING if hasattr(signal, x)):
        ignored = signal.getsignal(number) == signal.SIG_IGN
        if not (ignored and name(number) == "SIGHUP"):
            signal.signal(number, handler)


def name(number: int) -> str:
    """'SIGTERM' of its number."""
    return signal.Signals(number).name


class Interrupt:
    """Turns a signal of SAVING into a request to save and leave.

    Until `listening` there is nothing to save: signals end the process at once. So does
    one more, of any kind, that comes a second after the first or later: what was saved
    before stays. Those within a second are one: launchers, timeout(1) and batch systems
    send several at once.
    """

    def __init__(self) -> None:
        self.requested = ""  # the signal's name
        self.listening = False
        # Called with the signal's name when it ends the process at once.
        self.leaving: Callable[[str], object] = lambda came: None
        self._since = 0.0
        install(self._request)
        _follow_parent()

    def __call__(self) -> str:
        """The signal's name, '' before one came."""
        return self.requested

    def _request(self, number: int, frame: Any) -> None:
        came, now = name(number), time.monotonic()
        # Not print or raise: the signal may have arrived inside one, or inside XLA.
        if not self.listening:
            with contextlib.suppress(Exception):
                self.leaving(came)
            _tell(f"\n{came} before the first step\n")
            os._exit(INTERRUPTED)
        if not self.requested:
            self.requested, self._since = came, now
            _tell(f"\n{came}: saving before leaving\n")
        elif now - self._since > 1:
            with contextlib.suppress(Exception):
                self.leaving(came)
            _tell(f"\n{came} again: leaving at once; the last checkpoint stays\n")
            os._exit(INTERRUPTED)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, text.encode())


def _follow_parent() -> None:
    """Asks the kernel for a SIGTERM when the process named by PARENT ends (Linux)."""
    parent = os.environ.pop(PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before that
        os.kill(os.getpid(), signal.SIGTERM)
