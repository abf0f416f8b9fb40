"""Scalars as TensorBoard event files."""

import contextlib
import logging
import os
import sys
import time
from typing import Any

# tensorboardX imports these where they are installed, seconds that writing numbers does
# not need: with None in their place it finds none.
_blocked = {"torch", "boto3", "google.cloud.storage"} - set(sys.modules)
sys.modules.update(dict.fromkeys(_blocked))
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    for _name in _blocked:
        del sys.modules[_name]

# An infinite perplexity is in metrics.jsonl, too, and no reason for a line each time.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


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
        try:
            self._writer.close()
        except OSError:
            # It is open still, and would be flushed again, with a traceback, at exit.
            with contextlib.suppress(OSError):
                self._writer._py_recordio_writer.close()
            raise
