"""Scalars as TensorBoard event files. Imports torch where that is installed: slow."""

import os
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """Event files in a folder; what was written for `step` and later is hidden."""

    def __init__(self, folder: str, step: int):
        # Not SummaryWriter: its thread dies of a full disk, and the next call to it
        # waits for that thread for ever.
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        self._add(step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def add(self, step: int, name: str, value: float) -> None:
        """One scalar."""
        self._add(step, summary=scalar(name, value))

    def flush(self) -> None:
        """Everything that was added is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
