"""Starting, failing to start, and ending."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.server import check_gone, engine_pid, running_server


def serve(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["env", f"LOCALMOE_HOME={home}", sys.executable, "-m", "localmoe", "serve"]
    options = ["--port", "0", *arguments]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def damaged_home(tiny_home: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_home / "models/distinct-experts", tmp_path / "models/distinct-experts")
    return tmp_path


@pytest.mark.parametrize("end_signal", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_never_outlives_the_gateway(tiny_home: Path, end_signal: signal.Signals) -> None:
    with running_server(tiny_home, "distinct-experts", "f32") as (_, pid):
        engine = engine_pid(pid)
        os.kill(pid, end_signal)
        check_gone(engine)


@pytest.mark.parametrize("said", ["loading", "listening"])
def test_a_server_that_is_told_to_stop_while_it_starts_ends_quietly(tiny_home: Path, said: str) -> None:
    command = [sys.executable, "-m", "localmoe", "serve", "distinct-experts", "--weights", "f32", "--port", "0"]
    environment = {**os.environ, "LOCALMOE_HOME": str(tiny_home)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as server:
        assert server.stderr is not None
        while f"localmoe: {said} " not in (line := server.stderr.readline()):
            assert line, "it ended before"
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(30) == 0
    assert "Traceback" not in rest
    with pytest.raises(ProcessLookupError):  # its engine is in the same group
        os.killpg(server.pid, 0)


def test_of_two_servers_at_one_port_one_starts(tiny_home: Path) -> None:
    """Though both may bind it as long as neither listens."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "localmoe", "serve", "distinct-experts", "--weights", "f32"]
        environment = {**os.environ, "LOCALMOE_HOME": str(tiny_home)}
        with subprocess.Popen(
            [*command, "--port", str(port)], stderr=subprocess.PIPE, text=True, env=environment
        ) as server:
            other.listen()
            assert server.stderr is not None
            said = server.stderr.read()
            assert server.wait(30) == 1
    assert "error: cannot listen" in said
    assert "Traceback" not in said


def test_a_model_that_is_not_there(tiny_home: Path) -> None:
    result = serve(tiny_home, "no-such-model")
    assert result.returncode == 1
    assert "error: model 'no-such-model' is not in" in result.stderr
    assert "available: dense, distinct-experts" in result.stderr


def test_a_damaged_store_stops_the_start_and_is_named(damaged_home: Path) -> None:
    store = damaged_home / "models/distinct-experts/stores/f32.store"
    data = bytearray(store.read_bytes())
    data[len(data) - len(data) // 4] ^= 1
    store.write_bytes(data)
    result = serve(damaged_home, "distinct-experts", "--weights", "f32")
    assert result.returncode == 1
    assert f"error: {store}: layer " in result.stderr
    assert "is damaged" in result.stderr


def test_a_truncated_store_stops_the_start_and_is_named(damaged_home: Path) -> None:
    store = damaged_home / "models/distinct-experts/stores/f32.store"
    os.truncate(store, store.stat().st_size - 4096)
    result = serve(damaged_home, "distinct-experts", "--weights", "f32")
    assert result.returncode == 1
    assert f"error: {store}: " in result.stderr


def test_a_taken_port_is_known_at_once(tiny_home: Path) -> None:
    with running_server(tiny_home, "distinct-experts", "f32") as (url, _):
        port = url.rpartition(":")[2]
        result = serve(tiny_home, "distinct-experts", "--port", port)
    assert result.returncode == 1
    assert f"error: cannot listen on 127.0.0.1 port {port}" in result.stderr
