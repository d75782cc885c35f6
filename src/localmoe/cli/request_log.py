"""Where the request log goes: lines of JSON on standard error."""

import logging
import queue
import sys
import threading
from typing import TextIO

import structlog
from structlog.typing import FilteringBoundLogger

_MAX_WAITING_LINES = 10_000
_STOP_S = 1.0


class RequestLogWriter:
    """Writes lines in a thread of its own. If nobody reads them, they are dropped: that must not stop the server.

    Args:
        stream: None: standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._num_dropped = 0  # so far; written by `info` alone, so that none is lost between two threads
        self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
        self._thread.start()
        self.log: FilteringBoundLogger = structlog.wrap_logger(
            self,
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        )

    def info(self, line: str) -> None:
        """Have a line written."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_dropped += 1

    def stop(self) -> None:
        """Write what waits, if that is soon done."""
        try:
            self._lines.put(None, timeout=_STOP_S)
        except queue.Full:
            return
        self._thread.join(_STOP_S)

    def _write(self) -> None:
        num_told = 0
        while (line := self._lines.get()) is not None:
            if dropped := self._num_dropped - num_told:
                num_told += dropped
                line += f'\n{{"event": "{dropped} lines were dropped, because nobody read them"}}'
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return  # nobody will ever read it
