"""Two hundred reloads while streams are answered: none of them notices."""

import asyncio
import json
from pathlib import Path

import pytest

from localmoe.text.text_model import TextModel
from support.configured import ConfiguredServer, configured_server

NUM_STREAMS = 32
NUM_RELOADS = 200
ANSWER = "the quick brown fox jumps over the lazy dog"
INVALID = ("gateway: [", "gatway: {max_choices: 5}", "gateway: {max_choices: 0}", "models: [{model: broken}]", "")


def file_text(number: int) -> str:
    """A valid file, other than the one before; every fortieth has another model, or another engine of it."""
    others = ("", "  - model: b\n", "  - {model: b, weights: int8}\n")
    return (
        f"# number {number}\n"
        f"gateway: {{max_choices: {number + 1}, keepalive_s: {5 + number % 3}}}\n"
        f"dispatch: {{max_queued: {1000 + number}, policy: {('auto', 'round_robin')[number % 2]}}}\n"
        f"models:\n  - model: tiny\n{others[number // 40 % 3]}"
    )


async def stream(server: ConfiguredServer, done: asyncio.Event) -> int:
    """Asks again and again; every answer must be whole."""
    count = 0
    while not done.is_set():
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        response = await server.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        *events, last, end = response.text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event[0] != ":"]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == ANSWER
        assert choices[-1]["finish_reason"] == "stop"
        count += 1
    return count


def write(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.mark.slow
async def test_no_stream_notices_and_the_history_has_every_version(tmp_path: Path, text_model: TextModel) -> None:
    file = tmp_path / "site.yaml"
    write(file, file_text(0))
    async with configured_server(file, text_model, text=ANSWER, delay_s=0.002) as server:
        done = asyncio.Event()
        streams = [asyncio.create_task(stream(server, done)) for _ in range(NUM_STREAMS)]
        applied = [server.file.read_bytes()]
        for number in range(1, NUM_RELOADS + 1):
            is_valid = number % 4 != 0
            server.file.write_text(file_text(number) if is_valid else INVALID[number // 4 % len(INVALID)])
            response = await server.client.post("/v1/config/reload", json={"reason": f"reload {number}"})
            assert response.status_code == (200 if is_valid else 422), response.text
            if is_valid:
                applied.append(server.file.read_bytes())
            assert server.manager.running.gateway.max_choices == (number if not is_valid else number + 1)
        done.set()
        counts = await asyncio.gather(*streams)
        assert min(counts) > 0

        versions = (await server.client.get("/v1/config/history", params={"limit": 1000})).json()["data"]
        assert [version["number"] for version in versions] == list(range(len(applied), 0, -1))
        for version, data in zip(reversed(versions), applied, strict=True):
            assert server.manager._history.contents(version["number"]) == {file: data}
        for number in (1, 77, 150):
            await server.client.post("/v1/config/rollback", json={"version": number})
            assert server.file.read_bytes() == applied[number - 1]
        metrics = (await server.client.get("/metrics")).text
        assert 'localmoe_config_changes_total{outcome="failed"} 50.0' in metrics
