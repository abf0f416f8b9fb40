"""One run at a time in a workdir on an object store, where no file can be locked.

The objects `.lock/1`, `.lock/2`, ... are leases; the one with the highest number holds.
Whoever takes a lease creates the next number, and a store creates an object only once.
(One that ignores this condition lets two runs start that came within milliseconds; the
one whose lease was overwritten stops writing at its next beat.) The holder puts its
lease again and again. One that has not been put for STALE seconds, or whose process is
known to have ended, is passed over.
"""

import contextlib
import json
import os
import platform
import secrets
import sys
import threading
import time
from typing import Any

from triform.runtime import stores
from triform.runtime.errors import UserError

BEAT = 15.0  # seconds between two puts of a lease
STALE = 90.0  # seconds without a put after which its run counts as dead
FOLDER = ".lock"


class Lease:
    """Holds a workdir until it is closed; UserError if another run does."""

    def __init__(self, workdir: str, beat: float = BEAT, stale: float = STALE):
        self._workdir, self._beat, self._stale = workdir, beat, stale
        self._name = secrets.token_hex(8)
        self._ended = threading.Event()
        self._number = self._take()
        stores.regain(workdir)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The next run need not wait. A store that fails only costs it that wait."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError):
            if self._is_ours():
                self._put(ended=True)

    def _url(self, number: int) -> str:
        return f"{self._workdir}/{FOLDER}/{number}"

    def _numbers(self) -> list[int]:
        found = stores.names(f"{self._workdir}/{FOLDER}")
        return sorted(int(name) for name in found if name.isdigit())

    def _is_ours(self) -> bool:
        newest = self._numbers()[-1:] == [self._number]
        return newest and self._read(self._number).get("owner") == self._name

    def _put(self, new: bool = False, **more: Any) -> None:
        content = {"owner": self._name, "time": time.time(), **_process(), **more}
        stores.write(self._url(self._number), json.dumps(content).encode(), new)

    def _take(self) -> int:
        """The number of the lease, which this process has then."""
        while True:
            numbers = self._numbers()
            if numbers:
                self._wait_for(numbers[-1])
            self._number = (numbers or [0])[-1] + 1
            try:
                self._put(new=True)
            except FileExistsError:
                continue  # somebody was faster: look at that lease
            if self._is_ours():
                for number in numbers:
                    stores.remove(self._url(number))
                return self._number
            if self._read(self._number).get("owner") == self._name:
                stores.remove(self._url(self._number))  # that number was long past

    def _wait_for(self, number: int) -> None:
        """Returns once a lease is over; UserError if its run lives."""
        first = self._read(number)
        if not first or first.get("ended"):
            return
        who = f"{first.get('host')}, process {first.get('pid')}"
        lives = _lives(first)
        if lives is None:
            age = self._age(number)
            if age < self._stale:
                print(
                    f"{self._workdir}: looking whether the run of {who} lives; it was "
                    f"last heard of {age:.0f} s ago and counts as dead after "
                    f"{self._stale:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            end = time.monotonic() + self._stale - age
            while lives is None and time.monotonic() < end:
                time.sleep(min(1.0, self._beat / 4))
                now = self._read(number)
                if not now or now.get("ended"):
                    return
                lives = True if now != first else None
        if lives:
            raise UserError(
                f"workdir={self._workdir!r}: another train.py runs in it ({who}); wait "
                "for it, stop it, or name another workdir"
            )
        print(
            f"{self._workdir}: the run of {who} ended without saying so; taking over",
            file=sys.stderr,
            flush=True,
        )

    def _read(self, number: int) -> dict[str, Any]:
        """A lease; {} if it is gone."""
        return json.loads(stores.read(self._url(number)) or b"{}")

    def _age(self, number: int) -> float:
        """Seconds since a lease was put: two objects by the same clock, the store's."""
        probe = f"{self._workdir}/{FOLDER}/now-{self._name}"
        stores.write(probe, b"")
        try:
            passed = stores.modified(probe) - stores.modified(self._url(number))
        except FileNotFoundError:
            return self._stale
        finally:
            stores.remove(probe)
        return max(0.0, passed.total_seconds())

    def _keep(self) -> None:
        """Puts the lease until it is closed, or until another run has the next one."""
        while not self._ended.wait(self._beat):
            # A store that fails now may answer the next time.
            with contextlib.suppress(OSError, UserError):
                if not self._is_ours():
                    stores.lose(
                        self._workdir,
                        f"workdir={self._workdir!r}: another run has taken over, since "
                        f"this process was not heard of for {self._stale:.0f} s; this "
                        "one writes nothing more",
                    )
                    return
                self._put()


def _process() -> dict[str, Any]:
    """What names this process among those of all hosts, as far as the system tells."""
    found: dict[str, Any] = {"host": platform.node(), "pid": os.getpid()}
    with contextlib.suppress(OSError, IndexError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            boot = f.read().strip()
        found["boot"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        found["since"] = _since(os.getpid())
    return found


def _since(pid: int) -> str:
    """When a process started, in the kernel's ticks: a number may be used again.

    ProcessLookupError if it has ended.
    """
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
        state, *fields = f.read().rpartition(")")[2].split()
    if state in "ZX":  # ended; its parent has not asked how
        raise ProcessLookupError(pid)
    return fields[18]


def _lives(lease: dict[str, Any]) -> bool | None:
    """Does the process of a lease live? None if it is not one of this machine."""
    if not lease.get("boot") or lease["boot"] != _process().get("boot"):
        return None
    try:
        return _since(lease["pid"]) == lease.get("since")
    except OSError:
        return False
