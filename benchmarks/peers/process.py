"""Running programs, and environments of their own for them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAST_LINES = 15

Command = Sequence[str | Path]


class PeerError(Exception):
    """A peer could not be installed or measured; the message says why."""


def say(message: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def run(command: Command, log: Path, *, variables: Mapping[str, str] | None = None) -> str:
    """Run to the end; returns what it printed. Everything it said goes to `log`, too.

    Raises:
        PeerError: it cannot be started or has failed.
    """
    words = ["env", *(f"{name}={value}" for name, value in (variables or {}).items()), *map(str, command)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+") as errors:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
        errors.write(done.stdout)
        errors.seek(0)
        if done.returncode != 0:
            tail = "".join(errors.readlines()[-LAST_LINES:])
            raise PeerError(f"{words[-1]!r} ended with {done.returncode}; the end of {log}:\n{tail}")
    return done.stdout


def json_lines(text: str) -> list[Any]:
    """The JSON objects among lines of other output."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class OtherWork:
    """How many cores other programs, or other guests of the host, have kept busy since this was made."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._others_s = self._busy_s() - self._own_s()

    def cores(self) -> float:
        """Mean number; what our programs used counts once they have ended."""
        others_s = self._busy_s() - self._own_s() - self._others_s
        return max(others_s, 0.0) / (time.monotonic() - self._started_s)

    @staticmethod
    def _busy_s() -> float:
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own_s() -> float:
        return sum(os.times()[:4])


class Environment:
    """A virtual environment, made when first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"

    def has(self, distribution: str, version: str) -> bool:
        """Whether this very version is installed."""
        if not self.python.exists():
            return False
        code = f"from importlib.metadata import version; assert version({distribution!r}) == {version!r}"
        return subprocess.run([self.python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0

    def pip(self, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        """Run pip at low priority. Raises PeerError."""
        if not self.python.exists():
            say(f"making {self.path}")
            run([sys.executable, "-m", "venv", self.path], self.path.with_suffix(".log"))
        say(f"pip {' '.join(arguments)}, which can take minutes; log in {self.path}.log")
        run(
            ["nice", "-n", "19", self.python, "-m", "pip", *arguments],
            self.path.with_suffix(".log"),
            variables=variables,
        )
