"""Processes of this machine, by number."""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """A process and all that it started, directly or not: number to command line."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
        children[parent].append(int(stat.parent.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        number = waiting.pop()
        try:
            found[number] = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        waiting += children[number]
    return found


def alive(pids: Iterable[int]) -> list[int]:
    """Those that have not ended; a zombie has."""
    return [pid for pid in pids if _state(pid) not in ("Z", "X", None)]


def wait_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Those that have not ended in time."""
    end_s = time.monotonic() + timeout_s
    left = alive(pids)
    while left and time.monotonic() < end_s:
        time.sleep(0.05)
        left = alive(left)
    return left


def kill(pids: Iterable[int]) -> None:
    """At once. Some may have ended already."""
    for pid in alive(pids):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
