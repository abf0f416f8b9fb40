"""Stopping all processes of a run at the same point of the program."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from triform.runtime.errors import HostsError

Stop = Callable[[], str]  # why to save and leave, '' to go on


class AgreedStop:
    """One answer of all processes to the question whether to stop.

    The question is asked at the same points of the program everywhere. Who has a reason
    publishes it; then every process, in a thread of its own, publishes how many of its
    questions it has answered with "go on", and answers no more until it knows all these
    numbers. Everybody goes on up to the largest and stops at the next question. Until
    there is a reason nothing is sent or waited for.
    """

    # `hosts`: runtime.hosts.Hosts, which makes it.
    def __init__(self, hosts: Any):
        self._hosts, self._local = hosts, lambda: ""
        self._changed = threading.Condition()
        self._asked = 0  # questions that were answered with "go on"
        self._closing = self._told = False
        self._reason, self._last = "", -1  # -1: not known yet
        self._error: Exception | None = None
        self._watching = False

    def watch(self, local: Stop) -> "AgreedStop":
        """Asks `local` from now on."""
        self._local = local
        if not self._watching:
            self._watching = True
            self._hosts.in_background(self._watch)
        return self

    def __call__(self) -> str:
        """The reason why all processes stop now; '' to go on."""
        with self._changed:
            if not self._closing:
                self._tell()
                self._asked += 1
                return ""
            while self._last < 0 and self._error is None:
                self._changed.wait(0.1)
            if self._error is not None:
                raise self._error
            if self._asked >= self._last:
                return self._reason
            self._asked += 1
            return ""

    def _tell(self) -> None:
        reason = self._local()
        if reason and not self._told:
            self._told = True
            who = f"{reason} on process {self._hosts.index}"
            self._hosts.put_first("triform/stop", who)

    def _watch(self) -> None:
        hosts = self._hosts
        try:
            while not (reason := hosts.wait_for("triform/stop")):
                if hosts.over.is_set():
                    return
            with self._changed:
                self._closing, self._reason = True, reason
                hosts.put(f"triform/stopping/{hosts.index}", self._asked)
            deadline = time.monotonic() + hosts.timeout
            while len(found := hosts.read("triform/stopping/")) < hosts.count:
                if time.monotonic() > deadline:
                    missing = [i for i in range(hosts.count) if i not in found]
                    raise HostsError(
                        f"{reason}: {hosts.titles(missing)} did not answer within "
                        f"{hosts.timeout:.0f} s; start all processes again"
                    )
                time.sleep(0.01)
            with self._changed:
                self._last = max(found.values())
                self._changed.notify_all()
        except (HostsError, jax.errors.JaxRuntimeError) as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
