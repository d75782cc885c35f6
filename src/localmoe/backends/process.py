"""Processes of engines: what they print, and how they end.

A worker of ours watches its standard input and ends with it (see `worker`). Somebody else's server does not, so it is
started through `guard.py`, which does so in its place and takes everything that the server started along.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

BELOW_US = ("nice", "-n", "5")
"""Before an engine's command: where they share processors, the little that the gateway has to do goes first."""
_GUARD = Path(__file__).with_name("guard.py")
_NUM_LAST_LINES = 20
_MAX_LINE_BYTES = 1 << 16
_NUM_FIRST_ERRORS = 5
_NAMES_AN_ERROR = re.compile(r"\b\w+(Error|Exception): ")
_STOP_GRACE_S = 10.0


class OutputTail:
    """Passes on what a process prints, line by line, and keeps the last lines for messages.

    It keeps the first lines that name an exception, too: a server of several processes says the cause once, and then
    prints a hundred lines of what came of it.

    Args:
        stream: its output; read to the end, since a full pipe would stop the process.
        name: put before each line.
    """

    def __init__(self, stream: asyncio.StreamReader, name: str) -> None:
        self._lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._first_errors: list[str] = []
        self._task = asyncio.create_task(self._pass_on(stream, name))

    async def last_lines(self) -> str:
        """The end of what came before the process ended, if it has; before it, the first errors."""
        await asyncio.wait({self._task}, timeout=0.5)
        return "\n".join(dict.fromkeys([*self._first_errors, *self._lines]))

    async def _pass_on(self, stream: asyncio.StreamReader, name: str) -> None:
        while True:
            try:
                data = await stream.readuntil(b"\n")
            except asyncio.IncompleteReadError as end:
                data = end.partial
                if not data:
                    return
            except asyncio.LimitOverrunError as error:
                data = await stream.readexactly(error.consumed)
            line = data.decode(errors="replace").rstrip()
            if line:
                self._lines.append(line)
                if len(self._first_errors) < _NUM_FIRST_ERRORS and _NAMES_AN_ERROR.search(line):
                    self._first_errors.append(line)
                with contextlib.suppress(OSError, ValueError):  # nobody may read ours any more
                    print(f"{name}: {line}", file=sys.stderr, flush=True)


class GuardedProcess:
    """A server of somebody else's, in a session of its own. It and all it starts end with `stop`, and with us.

    Make one with `start`.
    """

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, output: OutputTail) -> None:
        self._process = process
        self._lifeline = lifeline
        self.output = output

    @classmethod
    async def start(
        cls, command: Sequence[str], *, name: str, environment: Mapping[str, str] | None = None
    ) -> "GuardedProcess":
        """Run a command.

        Args:
            name: put before each line of its output.
            environment: added to ours.

        Raises:
            OSError: there can be no process more.
        """
        theirs, ours = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                # Isolated and without site: it starts at once, and the environment is the engine's, not its own.
                *(sys.executable, "-I", "-S", str(_GUARD), str(theirs)),
                *BELOW_US,
                *("env", *(f"{key}={value}" for key, value in (environment or {}).items()), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs,),
                start_new_session=True,
                limit=_MAX_LINE_BYTES,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        assert process.stdout is not None
        return cls(process, ours, OutputTail(process.stdout, name))

    @property
    def pid(self) -> int:
        """The guard's."""
        return self._process.pid

    async def wait(self) -> str:
        """Returns, when the server has ended, how."""
        return how_it_ended(await self._process.wait())

    async def stop(self) -> None:
        """Ask it to end, then make it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)  # the guard passes it on
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_GRACE_S)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End it and all that it started, now."""
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    return f"signal {-code}" if code < 0 else f"exit status {code}"
