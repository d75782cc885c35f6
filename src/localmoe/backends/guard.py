"""Runs a command that must not outlive the process that started us: `python guard.py FD COMMAND...`.

FD is the reading end of a pipe whose other end only that process holds. When it goes, however it goes, the pipe
closes, and everything that the command has started is killed. Descendants whose parents end become our children
(`PR_SET_CHILD_SUBREAPER`, prctl(2)), so that none is lost by changing its session or by being orphaned. Should we be
killed ourselves, the kernel kills the command.

Standard library only, and no import of ours: it is run by path, and has to start at once.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_AWAITED = (*_PASSED_ON, signal.SIGCHLD, signal.SIGIO)
"""The last two: a process has ended; the lifeline has."""


def main() -> int:
    """Returns the command's exit status; 128 and its number for a signal, as shells do."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Waited for instead of handled: handlers of Python's are interrupted by one another, a thousand deep if need be.
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever started us may have ignored it
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    guard, child = os.getpid(), os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        os.set_inheritable(lifeline, False)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:  # it died before that
            os._exit(128 + signal.SIGKILL)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    while not select.select([lifeline], [], [], 0)[0]:
        status = _reap(child)
        if status is not None:
            _kill_descendants()
            return status
        if (number := signal.sigwait(_AWAITED)) in _PASSED_ON:
            _pass_on(child, number)
    _kill_descendants()
    return 128 + signal.SIGKILL


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(child, number)


def _reap(child: int) -> int | None:
    """Bury who has ended; the command's exit status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    """Children first; theirs become ours and are next."""
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for pid in children:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap(0)
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
