"""The processes of one run: what they agree on, and how they end together.

All of it goes through JAX's coordination service, a table of keys and values in process
0. No wait is a device collective: those have no timeout and name nobody. Of one process
alone everything here is the identity, so that callers need no `if`.

Every process makes the same calls in the same order; the number of the call is the key.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
from jax._src import distributed

from triform.runtime import aborts
from triform.runtime.errors import HostsError, UserError
from triform.runtime.progress import QUIET, SOON, Heartbeat
from triform.runtime.stopping import AgreedStop, Stop

TIMEOUT = 300.0  # seconds that processes wait for one another
HEARTBEAT = 60.0  # seconds without a sign of life after which a process counts as dead
LONG = 86_400.0  # seconds that the others wait while one of them prepares data
SLOW = 3600.0  # seconds that files of a checkpoint may take on one of them
GRACE = 5.0  # seconds to end by oneself after another process has failed
SLICE = 1000  # milliseconds of a blocking read: signals are handled in between


class Hosts:
    """The processes of a run, seen from one of them.

    Args:
      client: JAX's client of the coordination service; None for one process.
      index: number of this process, from 0.
      count: number of processes.
      names: the host of every process.
      timeout: seconds to wait for others.
      heartbeat: seconds without a sign of life after which a process counts as dead.
    """

    def __init__(
        self,
        client: Any = None,
        index: int = 0,
        count: int = 1,
        names: Sequence[str] = (),
        timeout: float = TIMEOUT,
        heartbeat: float = HEARTBEAT,
    ):
        self.index, self.count, self.timeout = index, count, timeout
        self.names = tuple(names) or ("",) * count
        self.is_first = index == 0
        # Called with a line when another process's end ends this one.
        self.leaving: Callable[[str], object] = lambda line: None
        self._client, self._heartbeat = client, heartbeat
        self._calls = self._uncounted = 0
        self.over = threading.Event()
        self._fault: dict[str, Any] = {}
        self._finished = False
        self._answers = 0  # how often process 0 was seen to answer
        self._threads: list[threading.Thread] = []
        self._stop = AgreedStop(self)

    def title(self, index: int) -> str:
        """'process 3 of 8 (node17)'."""
        name = f" ({self.names[index]})" if self.names[index] else ""
        return f"process {index} of {self.count}{name}"

    def titles(self, indices: Sequence[int]) -> str:
        """The same of several."""
        if len(indices) == 1:
            return self.title(indices[0])
        shown = [f"{i} ({self.names[i]})" if self.names[i] else f"{i}" for i in indices]
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        return f"processes {', '.join(shown[:8])}{more} of {self.count}"

    # Agreeing

    def agree(self, what: str, value: Any = None, timeout: float = 0) -> list[Any]:
        """The values (for a JSON) of all processes, by number; waits for them.

        HostsError on every process if one does not come within `timeout` seconds (0:
        the usual), naming it and `what` it did not come to.
        """
        if self.count == 1:
            return [value]
        self._calls += 1
        key, limit = f"triform/{self._calls}", timeout or self.timeout
        self.put(f"{key}/at/{self.index}", {"what": what, "value": value})
        gather = self._gather if self.is_first else self._receive
        with self._saying(what, f"{key}/at/"):
            found = gather(key, what, limit)
        if missing := found.get("missing"):
            raise HostsError(
                f"{self.titles(missing)} did not come to {what!r} within {limit:.0f} s;"
                " see its log, and start all processes again"
            )
        for index, name in enumerate(found["what"]):
            if name != what:
                raise HostsError(
                    f"{self.title(index)} is at {name!r}, this one at {what!r}; start "
                    "all processes with the same command"
                )
        return found["values"]

    def _gather(self, key: str, what: str, limit: float) -> dict[str, Any]:
        """As process 0: collects the values and gives them to all."""
        deadline, pause = time.monotonic() + limit, 0.001
        while True:
            there = self.read(f"{key}/at/")
            if len(there) == self.count:
                entries = [there[i] for i in range(self.count)]
                found = {
                    "what": [entry["what"] for entry in entries],
                    "values": [entry["value"] for entry in entries],
                }
                break
            if time.monotonic() > deadline:
                found = {"missing": [i for i in range(self.count) if i not in there]}
                break
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
        self.put(f"{key}/all", found)
        # All have come here, so all have read the answer to the call before.
        for done in (f"{key}/at", f"triform/{self._calls - 1}"):
            self._client.key_value_delete(done)
        return found

    def _receive(self, key: str, what: str, limit: float) -> dict[str, Any]:
        """As another process: what process 0 collected."""
        deadline = time.monotonic() + limit + GRACE  # the first one names who is late
        while (found := self.wait_for(f"{key}/all")) is None:
            if time.monotonic() > deadline:
                return {"missing": [0]}
        return found

    def broadcast(self, what: str, value: Any = None, timeout: float = 0) -> Any:
        """Process 0's value (for a JSON), on all processes."""
        mine = value if self.is_first else None
        return self.agree(what, mine, timeout)[0]

    def barrier(self, what: str, timeout: float = 0) -> None:
        """Waits until all processes are here."""
        self.agree(what, timeout=timeout)

    def same(self, what: str, values: Mapping[str, Any]) -> None:
        """UserError on every process if one of them has other values than process 0."""
        found = self.agree(what, dict(values))
        if line := difference(found, self.title):
            raise UserError(line)

    def in_turn(self, what: str, call: Callable[[], Any]) -> Any:
        """call(), first on process 0, then on one process of every other host, then on
        the rest: what the first writes into a cache the others find there.
        """
        first = [self.names.index(name) for name in self.names]
        turn = 0 if self.is_first else 1 if first[self.index] == self.index else 2
        found = None
        for number in range(3 if self.count > 1 else 1):
            if number == turn:
                found = call()
            self.barrier(what, timeout=max(self.timeout, LONG))
        return found

    def stop(self, local: Stop) -> Stop:
        """`local` of all processes: once it gives a reason on one, all stop, and at
        the same call of what is returned here.
        """
        return self._stop.watch(local) if self.count > 1 else local

    def total(self, count: int, due: bool) -> int:
        """Sum over processes and calls of `count` since the last call that was due; 0
        where none is. Of one process: the count, at once.
        """
        if self.count == 1:
            return count
        self._uncounted += count
        if not due:
            return 0
        total = sum(self.agree("counting", self._uncounted))
        self._uncounted = 0
        return total

    # The table

    def put(self, key: str, value: Any) -> None:
        """Sets a key to a value for a JSON."""
        self._client.key_value_set(key, json.dumps(value), True)

    def read(self, folder: str) -> dict[int, Any]:
        """The values of the keys FOLDER/NUMBER, by number."""
        found = self._client.key_value_dir_get(folder)
        return {int(k.rpartition("/")[2]): json.loads(x) for k, x in found}

    def wait_for(self, key: str) -> Any:
        """The value of a key; None if it is not there within SLICE."""
        try:
            return json.loads(self._client.blocking_key_value_get(key, SLICE))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    @contextlib.contextmanager
    def _saying(self, what: str, folder: str) -> Iterator[None]:
        """Says after some time for whom it waits."""
        start = time.monotonic()

        def text() -> str:
            there = self.read(folder)
            missing = [i for i in range(self.count) if i not in there]
            who = self.titles(missing) if missing else "process 0"
            return f"{what}: waiting for {who}, {time.monotonic() - start:.0f} s"

        first = SOON if self.is_first else QUIET
        heartbeat = Heartbeat(text, first, self.log())
        try:
            yield
        finally:
            heartbeat.close()

    def log(self) -> TextIO:
        """Where this process speaks of itself."""
        return sys.stdout if self.is_first else sys.stderr

    # Ending

    def start_watching(self) -> None:
        """Starts to show and to look for signs of life."""
        if self.count == 1:
            return
        for job in (self._watch_ends, self._watch_lives, self._watch_answers):
            self.in_background(self._quietly, job)
        aborts.call_instead(self._service_lost)

    def in_background(self, call: Callable[..., None], *args: Any) -> None:
        """Runs a call that ends soon after `over` is set."""
        thread = threading.Thread(target=call, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _quietly(self, job: Callable[[], None]) -> None:
        # Without the service nothing can be watched; _service_lost tells.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            job()

    def _watch_ends(self) -> None:
        """Ends this process when another one has failed."""
        while not self.over.is_set():
            if fault := self.wait_for("triform/fault"):
                if fault["process"] != self.index:
                    self._end(fault)
                return

    def _watch_lives(self) -> None:
        """Shows that this process lives; looks for those that do not: process 0 for all
        others, and they for process 0.
        """
        beats, number, start = {}, 0, time.monotonic()
        watched = range(self.count) if self.is_first else [0]
        seen = dict.fromkeys(watched, start)
        while not self.over.is_set():
            number += 1
            self.put(f"triform/beats/{self.index}", number)
            self.over.wait(self._heartbeat / 8)
            if self.is_first:
                found = self.read("triform/beats/")
            else:
                found = {0: self.wait_for("triform/beats/0")}
                self._answers += 1
            now = time.monotonic()
            for index, beat in found.items():
                if beats.get(index) != beat:
                    beats[index], seen[index] = beat, now
            silent = [i for i, when in seen.items() if now - when > self._heartbeat]
            if silent:
                self._are_silent(sorted(silent))
                return

    def _watch_answers(self) -> None:
        """Ends this process if process 0, which has the table, does not answer.

        Whoever asks it waits then, so that only another thread can tell. It counts its
        own turns: a process that was stopped itself must not blame others.
        """
        last, turns = 0, 0
        while not self.is_first and not self.over.wait(self._heartbeat / 8):
            turns = turns + 1 if self._answers == last else 0
            last = self._answers
            if turns > 8:
                self._are_silent([0])
                return

    def _are_silent(self, silent: Sequence[int]) -> None:
        seconds = f"gave no sign of life for {self._heartbeat:.0f} s"
        line = f"{self.titles(silent)} {seconds}: killed or stopped, or its host is"
        line += " gone; start all processes again to go on from the last checkpoint"
        if self.is_first:
            self.publish(line, 1, silent[0], dead=True)
        elif not self.over.is_set():
            # Each for itself: the table is process 0's.
            aborts.tell(f"error: {line}\n")
            os._exit(1)

    def put_first(self, key: str, value: Any) -> None:
        """Sets a key, unless another process was first."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(key, json.dumps(value), False)

    def publish(
        self, line: str, code: int, process: int | None = None, dead: bool = False
    ) -> None:
        """Tells the others that a process has failed; the first to be told counts."""
        if self.count == 1:
            return
        index = self.index if process is None else process
        fault = {"process": index, "line": line, "code": code, "dead": dead}
        self.put_first("triform/fault", fault)

    def leave_at_once(self, reason: str, code: int) -> None:
        """Ends the others, because this process is about to end and saves nothing."""
        if self.count > 1 and not self.over.is_set():
            self.over.set()
            line = f"{self.title(self.index)} ended: {reason}"
            self.publish(line, code, dead=True)
            self._last({"process": self.index, "dead": False})

    def _end(self, fault: dict[str, Any]) -> None:
        """Ends this process because of another's fault, if it does not end itself."""
        self._fault = fault
        # It may just have met the same error, or be writing.
        if self.over.wait(0 if fault["dead"] else GRACE):
            return
        line = fault["line"]
        if not fault["dead"]:
            line = f"{self.title(fault['process'])} ended: {line}"
        with contextlib.suppress(Exception):
            self.leaving(line)
        aborts.tell(f"error: {line}\n")
        self._last(fault)
        os._exit(fault["code"])

    def _last(self, fault: dict[str, Any]) -> None:
        """Process 0 has the table: it waits until the others have read and left."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.put(f"triform/left/{self.index}", True)
            dead = fault["process"] if fault["dead"] else -1
            wanted = set(range(self.count)) - {dead}
            deadline = time.monotonic() + 2 * GRACE
            while self.is_first and time.monotonic() < deadline:
                if wanted <= set(self.read("triform/left/")):
                    time.sleep(0.2)  # they set it just before they leave
                    return
                time.sleep(0.05)

    def _service_lost(self) -> None:
        """Called when JAX ends this process since it lost the coordination service."""
        if self.over.is_set() or self._fault:
            os._exit(1)
        if self.is_first or aborts.answers(
            distributed.global_state.coordinator_address
        ):
            line = f"{self.title(self.index)} was aborted by a fault of its own"
        else:
            line = f"{self.title(0)} died or cannot be reached any more; start all "
            line += "processes again to go on from the last checkpoint"
        aborts.tell(f"error: {line}\n")
        os._exit(1)

    def failed(self, error: Exception, one_line: Callable[[Exception], str]) -> None:
        """Tells the others of an error that ends this process.

        That of a collective may only be the echo of another process's death: then that
        one is named if it can be.
        """
        if self.count == 1:
            return
        line = one_line(error)
        if not line and _may_be_an_echo(error):
            reason = " ".join(str(error).split())[:200]
            told = f"{reason}: waiting to see which process has ended"
            heartbeat = Heartbeat(lambda: told, SOON, self.log())
            self.over.wait(1.5 * self._heartbeat)  # _end comes before
            heartbeat.close()
        self.over.set()
        line = line or f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.publish(line, 1)

    def finish(self) -> None:
        """The last call: returns when all processes have come to their end."""
        if self.count > 1 and not self.over.is_set():
            self.barrier("the end", timeout=max(self.timeout, LONG))
            self.over.set()
            self._finished = True
            for thread in self._threads:  # a call under way would crash
                thread.join(5)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.distributed.shutdown()

    def exit(self, code: int) -> None:
        """Leaves the process, if it does not end together with the others.

        Tearing JAX down would wait for those that are stuck in a collective.
        """
        if self.count == 1 or self._finished:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        self._last({"process": self.index, "dead": False})
        os._exit(code)


def _may_be_an_echo(error: Exception) -> bool:
    """Can it come from a collective whose other processes are gone?"""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def difference(found: Sequence[Mapping[str, Any]], title: Callable[[int], str]) -> str:
    """'process 3 of 8: seed is 1, 0 on process 0; ...' of values by process, or ''."""
    first = flat(found[0])
    for index, values in enumerate(found):
        other = flat(values)
        keys = [k for k in {**first, **other} if first.get(k) != other.get(k)]
        if keys:
            shown = [
                f"{k} is {other.get(k)!r:.80}, {first.get(k)!r:.80} on process 0"
                for k in keys[:3]
            ]
            more = f" and {len(keys) - 3} more differ" * (len(keys) > 3)
            return (
                f"{title(index)}: {'; '.join(shown)}{more}; start all processes with "
                "the same config, versions and data"
            )
    return ""


def flat(value: Any, lead: str = "") -> dict[str, Any]:
    """{'a.b': value} of nested mappings."""
    if not isinstance(value, Mapping):
        return {lead: value}
    return {
        k: x
        for key, part in value.items()
        for k, x in flat(part, f"{lead}.{key}" if lead else str(key)).items()
    }


_current: Hosts | None = None


def here() -> Hosts:
    """The processes of this run, also if somebody else called jax.distributed."""
    global _current
    if _current is None or (_current.count == 1 and distributed.global_state.client):
        state = distributed.global_state
        count = state.num_processes if state.client else 1
        _current = Hosts(state.client, state.process_id, count)
        _current.start_watching()
    return _current


def set_here(hosts: Hosts) -> None:
    """Makes these the processes of this run."""
    global _current
    _current = hosts


def lost() -> None:
    """What JAX calls where it can when the coordination service is lost."""
    if _current is not None and _current.count > 1:
        _current._service_lost()


@contextlib.contextmanager
def together(one_line: Callable[[Exception], str]) -> Iterator[None]:
    """The processes end what is inside together, or because one has failed."""
    try:
        yield
    except Exception as error:
        here().failed(error, one_line)
        raise
    except KeyboardInterrupt:
        here().leave_at_once("interrupted", 130)
        raise
    here().finish()
