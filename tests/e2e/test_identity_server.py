"""A real server that asks for keys, and the official SDK."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
import pytest

from localmoe.cli.server_process import ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of this test's own, beside models that others use."""
    monkeypatch.setenv("LOCALMOE_HOME", str(tiny_home))
    monkeypatch.setenv("LOCALMOE_STATE__DATABASE_URL", f"sqlite:///{tmp_path}/state.db")


def keys(*arguments: str) -> str:
    command = [sys.executable, "-m", "localmoe", "keys", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def again_and_again(call: Callable[[], object]) -> None:
    """Until it raises, for ten seconds."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        call()
        time.sleep(0.05)


def test_from_refusal_to_revocation(environment: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "localmoe", "serve", "dense", "--weights", "f32", "--host", "0.0.0.0"]
    with (
        ServerProcess([*command, "--port", "0"]) as process,
        pytest.raises(Exception, match="localmoe keys create"),
    ):
        process.wait_listening(lambda line: None)
    key = keys("create", "alice", "--requests-per-minute", "4")
    with ServerProcess([*command, "--port", "0"]) as process:
        url = process.wait_listening(lambda line: None).replace("0.0.0.0", "127.0.0.1")
        headers = {"x-api-key": key}
        while httpx2.get(f"{url}/health/ready", headers=headers).status_code != 200:
            process.check_alive()
            time.sleep(0.05)
        assert httpx2.get(f"{url}/health/live").status_code == 200
        assert httpx2.get(f"{url}/metrics").status_code == 401
        assert httpx2.post(f"{url}/v1/models/unload", json={"model": "dense"}, headers=headers).status_code == 403
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            request = {"model": "dense", "prompt": "hello", "max_tokens": 3}
            assert client.completions.create(**request).usage.completion_tokens == 3
            assert len(list(client.completions.create(**request, stream=True))) > 1
            with pytest.raises(openai.RateLimitError) as refused:
                again_and_again(lambda: client.completions.create(**request))
            assert int(refused.value.response.headers["retry-after"]) > 0
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="sk-else").models.list()
            (row,) = json.loads(keys("list", "--json"))
            assert row["last_used"] is not None
            keys("revoke", row["id"])
            with pytest.raises(openai.AuthenticationError, match="was revoked"):
                again_and_again(client.models.list)
