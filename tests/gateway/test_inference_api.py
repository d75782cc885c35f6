"""`/v1/inference` and `/v1/jobs`."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import EngineFaultError
from localmoe.core.identity import Role
from localmoe.core.request import Request
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.keys import make_key
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.text.text_model import TextModel
from support.stateful import StatefulGateway, stateful_gateway
from support.tiny_text import encode


class Listening:
    """Recites, and remembers what it was asked."""

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self.prompts: list[str] = []
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> list[int]:
        self.requests.append(request)
        self.prompts.append(self._text.tokenizer.decode(request.prompt_ids, skip_special_tokens=False))
        return encode(self._text, "hello world")


@pytest.fixture
def script(text_model: TextModel) -> Listening:
    return Listening(text_model)


@pytest.fixture
async def gateway(text_model: TextModel, script: Listening, tmp_path: Path) -> AsyncIterator[StatefulGateway]:
    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as found:
        yield found


async def ask(client: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await client.post("/v1/inference", json={"model": "tiny", **body})


async def ended(client: httpx2.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            job = (await client.get(f"/v1/jobs/{job_id}")).json()
            if job["status"] not in ("queued", "running"):
                return job
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": "hi"}, "hi"),
        ({"code": "x = 1"}, "```\nx = 1\n```"),
        ({"code": "x = 1\n", "language": "python"}, "```python\nx = 1\n```"),
        ({"text": "what?", "code": "x"}, "what?\n\n```\nx\n```"),
        ({"code": "a ```` b"}, "`````\na ```` b\n`````"),
    ],
)
async def test_text_and_code_reach_the_model(
    gateway: StatefulGateway, script: Listening, body: dict[str, Any], message: str
) -> None:
    answer = await ask(gateway.client, **body)
    assert answer.status_code == 200, answer.text
    data = answer.json()
    assert (data["text"], data["finish_reason"], data["object"]) == ("hello world", "stop", "inference")
    assert data["usage"]["total_tokens"] == data["usage"]["prompt_tokens"] + data["usage"]["completion_tokens"]
    assert f"user\n{message}<|im_end|>" in script.prompts[0]


@pytest.mark.parametrize("wish", [{"stream": True}, {"mode": "stream"}, {"mode": "stream", "stream": True}])
async def test_a_stream(gateway: StatefulGateway, wish: dict[str, Any]) -> None:
    answer = await ask(gateway.client, text="hi", **wish)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [one.removeprefix("data: ") for one in answer.text.split("\n\n") if one]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(one) for one in events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == "hello world"
    assert [chunk["finish_reason"] for chunk in chunks][-1] == "stop"
    assert {chunk["finish_reason"] for chunk in chunks[:-1]} <= {None}


async def test_a_streams_usage(gateway: StatefulGateway) -> None:
    answer = await ask(gateway.client, text="hi", stream=True, stream_options={"include_usage": True})
    last = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("wish", [{"async": True}, {"mode": "async"}])
async def test_a_job(gateway: StatefulGateway, script: Listening, wish: dict[str, Any]) -> None:
    accepted = await ask(gateway.client, text="hi", code="x", temperature=0.5, seed=7, max_tokens=100, **wish)
    assert accepted.status_code == 202
    job_id = accepted.json()["id"]
    assert accepted.headers["location"] == f"/v1/jobs/{job_id}"
    job = await ended(gateway.client, job_id)
    assert (job["status"], job["error"]) == ("completed", None)
    assert job["result"]["text"] == "hello world"
    assert job["progress"] == {"total": 1, "completed": 1, "failed": 0}
    sampling = script.requests[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.5, 7, 100)
    assert "user\nhi\n\n```\nx\n```" in script.prompts[0]
    deleted = await gateway.client.delete(f"/v1/jobs/{job_id}")
    assert deleted.json() == {"id": job_id, "object": "job", "deleted": True}
    assert (await gateway.client.get(f"/v1/jobs/{job_id}")).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": "x", "language": "python"}, "language"),
        ({"code": "x", "language": "a b"}, "language"),
        ({"text": "x", "stream": True, "async": True}, "async"),
        ({"text": "x", "mode": "sync", "async": True}, "mode"),
        ({"text": "x", "mode": "stream", "stream": False}, "mode"),
        ({"text": "x", "mode": "batch"}, "mode"),
        ({"text": "x", "async": "yes"}, "async"),
        ({"text": "x", "run_later": True}, "run_later"),
        ({"text": "x", "n": 2}, "n"),
        ({"text": "x", "max_tokens": 10**9}, "max_tokens"),
        ({"text": "x", "unknown": 1}, "unknown"),
        ({"text": "x" * 10_000}, "text"),
        ({"text": "x", "model": "nobody"}, "model"),
        ({"text": "x", "model": "nobody", "async": True}, "model"),
    ],
)
async def test_bad_requests_are_refused_by_name(
    gateway: StatefulGateway, body: dict[str, Any], param: str
) -> None:
    refused = await ask(gateway.client, **body)
    assert refused.status_code in (400, 404), refused.text
    assert refused.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "header", [{"x-localmoe-engine": "native"}, {"x-localmoe-timeout-s": "5"}, {"x-localmoe-cache": "bypass"}]
)
async def test_headers_that_jobs_do_not_keep_are_refused(gateway: StatefulGateway, header: dict[str, str]) -> None:
    body = {"model": "tiny", "text": "hi", "mode": "async"}
    refused = await gateway.client.post("/v1/inference", json=body, headers=header)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(header)))


async def test_a_job_that_fails_says_why(gateway: StatefulGateway) -> None:
    accepted = await ask(gateway.client, text="x" * 10_000, mode="async")
    job = await ended(gateway.client, accepted.json()["id"])
    assert (job["status"], job["result"]) == ("failed", None)
    assert job["error"]["param"] == "text"
    assert job["progress"]["failed"] == 1


async def test_an_engine_that_fails_fails_the_job(text_model: TextModel, tmp_path: Path) -> None:
    backend = ScriptedBackend(
        encode(text_model, "hello"), failure=ScriptedFailure(error=EngineFaultError("broken"), after_tokens=1)
    )
    async with stateful_gateway(text_model, backend, tmp_path) as gateway:
        accepted = await ask(gateway.client, text="hi", mode="async")
        job = await ended(gateway.client, accepted.json()["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "engine_fault")


async def test_a_running_job_is_cancelled_and_frees_its_engine(text_model: TextModel, tmp_path: Path) -> None:
    backend = ScriptedBackend(encode(text_model, "x" * 200), delay_s=0.02)
    async with stateful_gateway(text_model, backend, tmp_path) as gateway:
        job_id = (await ask(gateway.client, text="hi", mode="async")).json()["id"]
        async with asyncio.timeout(10):
            while (await gateway.client.get(f"/v1/jobs/{job_id}")).json()["status"] != "running":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        cancelled = (await gateway.client.delete(f"/v1/jobs/{job_id}")).json()
        assert (cancelled["status"], cancelled["result"]) == ("cancelled", None)
        async with asyncio.timeout(5):
            while backend.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_queued_job_is_cancelled(text_model: TextModel, script: Listening, tmp_path: Path) -> None:
    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path, runs_jobs=False) as gateway:
        job_id = (await ask(gateway.client, text="hi", mode="async")).json()["id"]
        assert (await gateway.client.get(f"/v1/jobs/{job_id}")).json()["status"] == "queued"
        assert (await gateway.client.delete(f"/v1/jobs/{job_id}")).json()["status"] == "cancelled"
        gateway.state.start(gateway.app)
        other = (await ask(gateway.client, text="hi", mode="async")).json()["id"]
        await ended(gateway.client, other)
    assert len(script.requests) == 1


async def test_open_jobs_are_bounded(text_model: TextModel, script: Listening, tmp_path: Path) -> None:
    config = GatewayConfig(jobs=JobsConfig(max_open_per_owner=2))
    backend = ScriptedBackend(script)
    async with stateful_gateway(text_model, backend, tmp_path, config=config, runs_jobs=False) as gateway:
        answers = [await ask(gateway.client, text="hi", mode="async") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 413]


async def test_jobs_are_their_owners(text_model: TextModel, script: Listening, tmp_path: Path) -> None:
    backend = ScriptedBackend(script)
    async with stateful_gateway(text_model, backend, tmp_path, asks_for_keys=True) as gateway:
        headers = {}
        for name, role in (("anna", Role.USER), ("bert", Role.USER), ("root", Role.ADMIN)):
            key, record = make_key(name=name, role=role, now_s=time.time())
            await gateway.state.keys.add(record)
            headers[name] = {"authorization": f"Bearer {key}"}
        body = {"model": "tiny", "text": "hi", "mode": "async"}
        accepted = await gateway.client.post("/v1/inference", json=body, headers=headers["anna"])
        path = f"/v1/jobs/{accepted.json()['id']}"
        for name, status in (("anna", 200), ("bert", 404), ("root", 200)):
            assert (await gateway.client.get(path, headers=headers[name])).status_code == status
        assert (await gateway.client.delete(path, headers=headers["bert"])).status_code == 404
        assert (await gateway.client.get(path)).status_code == 401
        gateway.client.headers.update(headers["anna"])
        assert (await ended(gateway.client, accepted.json()["id"]))["status"] == "completed"


async def test_jobs_outlive_their_server(text_model: TextModel, script: Listening, tmp_path: Path) -> None:
    slow = ScriptedBackend(encode(text_model, "x" * 200), delay_s=0.05)
    async with stateful_gateway(text_model, slow, tmp_path) as gateway:
        ids = [(await ask(gateway.client, text="hi", mode="async")).json()["id"] for _ in range(20)]
    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as gateway:
        for job_id in ids:
            job = await ended(gateway.client, job_id)
            assert (job["status"], job["result"]["text"]) == ("completed", "hello world")
    assert len(script.requests) == 20


async def test_jobs_wait_while_the_database_is_full(
    gateway: StatefulGateway, script: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localmoe.core.errors import StorageFullError
    from localmoe.gateway.jobs import runner

    monkeypatch.setattr(runner, "_POLL_S", 0.01)
    work = gateway.state.jobs.runner._work
    finish, failures = work.finish, 3

    async def fail(*args: Any, **kwargs: Any) -> bool:
        nonlocal failures
        if failures:
            failures -= 1
            raise StorageFullError("full")
        return await finish(*args, **kwargs)

    monkeypatch.setattr(work, "finish", fail)
    job_id = (await ask(gateway.client, text="hi", mode="async")).json()["id"]
    assert (await ended(gateway.client, job_id))["status"] == "completed"
    assert failures == 0
    assert len(script.requests) == 1  # its answer was kept meanwhile
