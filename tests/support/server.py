"""A real `localmoe serve` in a process of its own, and a look at its processes."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from localmoe.cli.server_process import ServerProcess


@contextmanager
def running_server(
    home: Path,
    model: str | None,
    weights: str | None,
    *,
    engines: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, int]]:
    """Yields (URL, process id) of a server that is ready.

    Args:
        model: None: what the settings say.
        weights: likewise.
        engines: likewise, where there are none.
        settings: environment variables, without `LOCALMOE_`.
    """
    variables = {"LOCALMOE_HOME": str(home), **{f"LOCALMOE_{k}": v for k, v in (settings or {}).items()}}
    command = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command += [sys.executable, "-m", "localmoe", "serve", "--port", "0"]
    command += [] if model is None else [model]
    command += [] if weights is None else ["--weights", weights]
    for engine in engines:
        command += ["--engine", engine]
    with ServerProcess(command) as process:
        url = process.wait_listening(lambda line: None)
        wait_ready(url, process.check_alive)
        yield url, process.pid


def wait_ready(url: str, check_alive: object = None) -> None:
    while httpx2.get(f"{url}/health/ready").status_code != 200:
        if callable(check_alive):
            check_alive()
        time.sleep(0.05)


def engine_pid(server_pid: int) -> int:
    """The server's engine process."""
    pids = engine_pids(server_pid)
    if not pids:
        raise AssertionError(f"process {server_pid} has no engine")
    return pids[0]


def engine_pids(server_pid: int) -> list[int]:
    """The server's native engines, the oldest first."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it ended while we looked
        if parent == server_pid and b"localmoe.engine.process" in command:
            pids.append(int(stat.parent.name))
    return sorted(pids)


def check_gone(pid: int) -> None:
    """Wait until a process has ended."""
    deadline = time.monotonic() + 15
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def resident_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def metric(url: str, name: str) -> float:
    """The one sample of this metric that has no label but the model's."""
    for line in httpx2.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name + "{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"/metrics has no {name}")
