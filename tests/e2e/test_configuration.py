"""A real `localmoe serve` whose configuration changes under it: by an editor, over HTTP, and back."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest

from localmoe.cli.server_process import ServerProcess
from support.fake_openai import FakeOpenAI, chunk, counts
from support.server import wait_ready

KEY = "s3cr3t-key"
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def elsewhere() -> AsyncIterator[FakeOpenAI]:
    fake = FakeOpenAI([chunk("hello"), chunk(finish="stop"), counts(1, 1), b"data: [DONE]\n\n"])
    async with fake.running():
        yield fake


def file_text(url: str, *, max_queued: int, second: bool = False) -> str:
    engine = f"{{engine: remote, settings: {{url: '{url}', model: there, api_key: 'env:ELSEWHERE_KEY'}}}}"
    more = f"  - {{model: second, engines: [{engine}]}}\n" if second else ""
    return (
        f"config_version: 2\nmodels:\n  - model: there\n    served_model_name: chat\n    engines: [{engine}]\n{more}"
        f"dispatch:\n  max_queued: {max_queued}  # seats\n"
    )


def wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def change_and_look(url: str, file: Path, elsewhere_url: str) -> None:
    def value(key: str) -> object:
        return httpx2.get(f"{url}/v1/config/{key}").json()["value"]

    def models() -> list[str]:
        return [model["id"] for model in httpx2.get(f"{url}/v1/models").json()["data"]]

    answer = httpx2.post(f"{url}/v1/chat/completions", json=CHAT).json()
    assert answer["choices"][0]["message"]["content"] == "hello"
    first = file.read_bytes()
    assert httpx2.patch(f"{url}/v1/config/dispatch.max_queued", json={"value": 6}).status_code == 200
    assert file.read_bytes() == first.replace(b"max_queued: 5", b"max_queued: 6")
    file.write_text(file_text(elsewhere_url, max_queued=7, second=True))
    wait(lambda: "second" in models())
    assert value("dispatch.max_queued") == 7
    file.write_text("dispatch: [")
    wait(lambda: 'localmoe_config_changes_total{outcome="failed"} 1.0' in httpx2.get(f"{url}/metrics").text)
    assert value("dispatch.max_queued") == 7
    assert httpx2.post(f"{url}/v1/config/rollback", json={"version": 1}, timeout=60).status_code == 200
    assert file.read_bytes() == first
    assert models() == ["chat"]
    history = httpx2.get(f"{url}/v1/config/history").json()["data"]
    assert [version["author"] for version in history] == ["anybody", "file watch", "anybody", "localmoe serve"]
    assert KEY not in httpx2.get(f"{url}/v1/config").text
    assert KEY not in httpx2.get(f"{url}/v1/config/history").text


async def test_a_server_follows_its_file(tmp_path: Path, elsewhere: FakeOpenAI) -> None:
    file = tmp_path / "site.yaml"
    text = file_text(elsewhere.url, max_queued=5)
    command = ["env", f"LOCALMOE_HOME={tmp_path / 'home'}", f"ELSEWHERE_KEY={KEY}"]
    command += [sys.executable, "-m", "localmoe", "serve", "--port", "0", "--config", str(file)]

    def serve() -> None:
        file.write_text(text)
        with ServerProcess(command) as process:
            url = process.wait_listening(lambda line: None)
            wait_ready(url, process.check_alive)
            change_and_look(url, file, elsewhere.url)

    await asyncio.to_thread(serve)
    assert elsewhere.headers[0]["Authorization"] == f"Bearer {KEY}"
