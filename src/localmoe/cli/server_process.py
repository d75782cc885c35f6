"""A `localmoe serve` of one's own: started, watched until it listens, stopped."""

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from localmoe.core.errors import EngineStartError

LISTENING = re.compile(r"localmoe: listening on (http://\S+)")
POLL_S = 0.05


class ServerProcess:
    """Runs `command` as long as the `with` block does.

    The child has its own session, so that Ctrl-C in the terminal reaches only us; ending it is our business.
    One thread reads what it prints, because a full pipe would stop it.

    Args:
        command: the program and its arguments; prints `localmoe: listening on URL` once it does.
        grace_s: how long it may take to end after SIGTERM before it and all its children are killed;
            Ctrl-C cuts that short.
    """

    def __init__(self, command: Sequence[str], *, grace_s: float = 10.0) -> None:
        self._command = command
        self._grace_s = grace_s
        self._url: str | None = None
        self._last_lines: deque[str] = deque(maxlen=20)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(self._grace_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=1.0)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_listening(self, on_line: Callable[[str], None]) -> str:
        """The URL it listens on, once it does. There is no time limit: it may be building a model.

        Args:
            on_line: gets the line printed last, again and again.

        Raises:
            EngineStartError: it ended instead; the message is its own.
        """
        while self._url is None:
            self.check_alive()
            if self._last_lines:
                on_line(self._last_lines[-1])
            time.sleep(POLL_S)
        return self._url

    def check_alive(self) -> None:
        """Raises:
        EngineStartError: the process has ended; the message is its own error, or what it printed last.
        """
        status = self._process.poll()
        if status is None:
            return
        self._reader.join(timeout=1.0)
        lines = list(self._last_lines)
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = errors[-1] if errors else "\n".join([f"it ended with exit status {status}", *lines])
        raise EngineStartError(f"the server did not start: {reason}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                if match := LISTENING.search(line):
                    self._url = match[1]
                if line.strip():
                    self._last_lines.append(line.rstrip())
