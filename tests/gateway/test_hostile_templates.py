"""A model whose chat template never ends holds up nobody else, in the gateway's process or beside it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from localmoe.backends.scripted import ScriptedBackend
from localmoe.text.text_model import TextModel
from support.tiny_text import encode, gateway_app, served_model, write_tiny_text_model

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOLDS_THE_INTERPRETER = "{{ (messages | length + 8) ** (9 ** 9) }}"


@pytest.fixture(params=[ENDLESS, HOLDS_THE_INTERPRETER])
async def app(request: pytest.FixtureRequest, text_model: TextModel, tmp_path: Path) -> FastAPI:
    hostile = TextModel.load(write_tiny_text_model(tmp_path, chat_template=request.param))
    backend = ScriptedBackend(encode(text_model, "hi"))
    await backend.start()
    return gateway_app(
        served_model(hostile, backend, model_id="hostile"), served_model(text_model, backend, model_id="honest")
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", HELLO),
        ("/v1/messages", HELLO),
        ("/v1/messages/count_tokens", {"messages": HELLO["messages"]}),
        ("/v1/responses", {"input": "hello"}),
    ],
)
async def test_it_is_refused_and_others_are_answered(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        hostile = [asyncio.create_task(client.post(path, json={**body, "model": "hostile"})) for _ in range(3)]
        began_s, longest_s, num_answered = time.monotonic(), 0.0, 0
        while not all(task.done() for task in hostile):
            asked_s = time.monotonic()
            answer = await client.post("/v1/chat/completions", json={**HELLO, "model": "honest"})
            assert answer.status_code == 200, answer.text
            longest_s, num_answered = max(longest_s, time.monotonic() - asked_s), num_answered + 1
        took_s = time.monotonic() - began_s
        refused = [task.result() for task in hostile]
    assert [answer.status_code for answer in refused] == [400] * 3
    assert "it takes too much time or memory" in refused[0].text
    assert num_answered > 10
    assert longest_s < 0.5 * took_s
