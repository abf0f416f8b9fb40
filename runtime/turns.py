"""Functions that take turns: each runs in a thread, one at a time, until it asks.

As generators, but for code that knows nothing of it: whatever a function calls may ask.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Abandoned(BaseException):
    """Raised in a function that is not gone on with, so that it lets go of all."""


class Turns(Generic[T]):
    """One function. It runs while `go_on` waits, and waits otherwise."""

    def __init__(self, name: str, work: Callable[[], T]):
        self.name = name
        self.result: T | None = None
        self.error: BaseException | None = None
        self.over = False
        self._work = work
        # SimpleQueue: waiting for it lets signal handlers run.
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._questions: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            self._wait()
            self.result = self._work()
        except BaseException as error:  # handed to whoever goes on with it
            self.error = error
        self.over = True
        self._questions.put(None)

    def _wait(self) -> Any:
        answer, error = self._answers.get()
        if error is not None:
            raise error
        return answer

    def ask(self, question: Any) -> Any:
        """From within: the answer, once it is there."""
        self._questions.put(question)
        return self._wait()

    def go_on(self, answer: Any = None, error: BaseException | None = None) -> Any:
        """Its next question, None once it is over (see `result` and `error`).

        `error` is raised in it, in place of an answer.
        """
        if self._thread.ident is None:
            self._thread.start()
        self._answers.put((answer, error))
        return self._questions.get()

    def end(self) -> None:
        """Ends it if it is not over."""
        while not self.over and self._thread.ident is not None:
            self.go_on(error=Abandoned())
