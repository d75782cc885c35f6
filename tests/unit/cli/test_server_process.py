import subprocess
import sys
import time

import pytest

from localmoe.cli.server_process import ServerProcess
from localmoe.core.errors import EngineStartError


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


LISTEN = "print('localmoe: listening on http://127.0.0.1:12345')"


def test_url_is_read_and_the_process_is_stopped() -> None:
    code = f"import sys, time; print('building'); time.sleep(.2); {LISTEN}; time.sleep(60)"
    seen = []
    with ServerProcess(python(code)) as server:
        assert server.wait_listening(seen.append) == "http://127.0.0.1:12345"
        server.check_alive()
    assert "building" in seen
    assert server._process.returncode == -15


def test_its_own_error_is_the_message() -> None:
    code = "import sys; print('noise'); sys.exit('error: /m/config.json: not a model')"
    with (
        ServerProcess(python(code)) as server,
        pytest.raises(EngineStartError, match=r"^the server did not start: /m/config\.json: not a model$"),
    ):
        server.wait_listening(lambda line: None)


def test_last_lines_tell_when_there_is_no_error() -> None:
    code = "import os; print('loading layer 3'); os._exit(7)"
    with (
        ServerProcess(python(code)) as server,
        pytest.raises(EngineStartError, match="exit status 7\nloading layer 3"),
    ):
        server.wait_listening(lambda line: None)


def test_death_after_listening_is_noticed() -> None:
    with ServerProcess(python(LISTEN)) as server:
        server.wait_listening(lambda line: None)
        server._process.wait()
        with pytest.raises(EngineStartError, match="exit status 0"):
            server.check_alive()


def test_much_output_does_not_block_it() -> None:
    code = f"print('x' * 1_000_000); {LISTEN}; import time; time.sleep(60)"
    with ServerProcess(python(code)) as server:
        assert server.wait_listening(lambda line: None) == "http://127.0.0.1:12345"


def test_what_ignores_sigterm_is_killed_with_its_children() -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '60']); print(child.pid);"
        f"{LISTEN}; time.sleep(60)"
    )
    seen: list[str] = []
    with ServerProcess(python(code), grace_s=0.2) as server:
        while not seen:
            server.wait_listening(seen.append)
            seen.extend(server._last_lines)
    assert server._process.returncode == -9
    child = seen[0]
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.02)
    pytest.fail(f"child {child} lives on: {state}")
