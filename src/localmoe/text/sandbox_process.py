"""Work that may take any time or memory, done in a process that may be lost.

Both sides are here. The process answers one question after the other over the socket that is its standard input, and
ends with it. Each answer may take so much of the processor's time, after which the kernel ends the process, whatever
it is doing; and all of it so much memory. The next question then gets another process.

A message is its length, in 8 bytes, and as many bytes.
"""

import contextlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from localmoe.core.errors import BackendUnavailableError, OverloadedError

_START_S = 30.0
_TURN_S = 10.0
_LENGTH_BYTES = 8
DONE, REFUSED = b"+", b"-"
"""What answers may begin with: a result follows, or a complaint."""
_PIECE_BYTES = 1 << 20


class SandboxProcess:
    """One such process, started when it is needed. May be asked from any thread; answers one question at a time.
    Once it is closed, questions raise `BackendUnavailableError`.

    Args:
        module: what it runs; calls `serve`.
        opening: what each process is asked first.
        timeout_s: of real time, for an answer. What counts is the processor's, which the process itself bounds.
        max_answer_bytes: more is not taken from it.
    """

    def __init__(self, module: str, *, opening: bytes, timeout_s: float, max_answer_bytes: int) -> None:
        # -P: a file of that name in the directory that we were started in is not what is meant.
        self._command = [sys.executable, "-P", "-m", module]
        self._opening = opening
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._turn = threading.Lock()
        self._is_closed = False
        self._running: _Running | None = None
        self._finalizer: weakref.finalize[[], SandboxProcess] | None = None

    def open(self) -> bytes | None:
        """What it answers to the opening; None: that took more than it may. It is there from then on.

        Raises:
            OverloadedError: it cannot be started.
        """
        with self._in_turn():
            self._end()
            return self._start()

    def ask(self, question: bytes) -> bytes | None:
        """What it answers; None: that took more than it may.

        Raises:
            OverloadedError: it cannot be started, or is busy with others for too long.
        """
        with self._in_turn():
            if self._running is None or self._running.has_ended:
                self._end()
                if self._start() is None:
                    return None
            return self._exchange(question, self._timeout_s)

    def close(self) -> None:
        """End it for good, whatever it is doing; may wait for one that is being started."""
        self._is_closed = True
        running = self._running
        if running is not None:
            running.kill()  # whoever waits for an answer is let go
        with self._turn:
            self._end()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._turn.acquire(timeout=_TURN_S):
            raise OverloadedError("too many wait for the process that does this; try again later")
        try:
            if self._is_closed:
                raise BackendUnavailableError("what is asked for is served no more")
            yield
        finally:
            self._turn.release()

    def _start(self) -> bytes | None:
        try:
            self._running = _Running(self._command)
        except OSError as error:
            raise OverloadedError(f"a process that is needed cannot be started: {error.strerror}") from error
        self._finalizer = weakref.finalize(self, self._running.end)
        return self._exchange(self._opening, _START_S)

    def _exchange(self, question: bytes, timeout_s: float) -> bytes | None:
        assert self._running is not None
        try:
            return self._running.exchange(question, timeout_s, self._max_answer_bytes)
        except OSError:  # it has ended, or is to
            self._end()
            return None

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._running = self._finalizer = None


class _Running:
    """The process, from its start to its end."""

    def __init__(self, command: list[str]) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            try:
                # In a session of its own, where a terminal's Ctrl-C does not reach it: it ends with the connection.
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True
                )
            except OSError:
                self._connection.close()
                raise

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def exchange(self, question: bytes, timeout_s: float, max_answer_bytes: int) -> bytes:
        """Raises OSError where there is no answer in time, or one that is too long."""
        deadline_s = time.monotonic() + timeout_s
        _send(self._connection, question, deadline_s)
        return _receive(self._connection, max_answer_bytes, deadline_s)

    def kill(self) -> None:
        """Let it end at once. From any thread, also while another one waits for its answer."""
        self._process.kill()

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def serve(answer: Callable[[bytes], bytes], *, cpu_s: float, memory_bytes: int) -> None:
    """Answer what comes by the standard input, a socket, until its other side is closed.

    Args:
        answer: makes an answer of a question.
        cpu_s: of the processor's time, for each.
        memory_bytes: of address space, for all that this process is.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with socket.socket(fileno=sys.stdin.fileno()) as connection, contextlib.suppress(ConnectionError):
        while True:
            question = _receive(connection, memory_bytes, None)
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends the process
            said = answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(connection, said, None)


def _send(connection: socket.socket, message: bytes, deadline_s: float | None) -> None:
    _bound(connection, deadline_s)
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "little") + message)


def _receive(connection: socket.socket, max_bytes: int, deadline_s: float | None) -> bytes:
    num_bytes = int.from_bytes(_read(connection, _LENGTH_BYTES, deadline_s), "little")
    if num_bytes > max_bytes:
        raise ConnectionAbortedError(f"a message of {num_bytes} bytes is too long")
    return _read(connection, num_bytes, deadline_s)


def _read(connection: socket.socket, num_bytes: int, deadline_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        _bound(connection, deadline_s)
        piece = connection.recv(min(_PIECE_BYTES, num_bytes - len(data)))
        if not piece:
            raise ConnectionResetError("the other side has ended")
        data += piece
    return bytes(data)


def _bound(connection: socket.socket, deadline_s: float | None) -> None:
    """Let what comes next take until then; None: any time. For the time that is left, TimeoutError is raised."""
    connection.settimeout(None if deadline_s is None else max(1e-3, deadline_s - time.monotonic()))
