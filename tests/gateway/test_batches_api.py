"""`/v1/batches`, by OpenAI's own client and by hand."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import update

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import BackendUnavailableError, OverloadedError
from localmoe.core.identity import Role
from localmoe.core.request import Request
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.keys import make_key
from localmoe.gateway.jobs import runner
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.state import job_work
from localmoe.state.schema import jobs as jobs_table
from localmoe.text.text_model import TextModel
from support.stateful import StatefulGateway, stateful_gateway, upload
from support.tiny_text import encode

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def backend(text_model: TextModel) -> ScriptedBackend:
    return ScriptedBackend(encode(text_model, "hello world"))


@pytest.fixture
async def gateway(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> AsyncIterator[StatefulGateway]:
    async with stateful_gateway(text_model, backend, tmp_path) as found:
        yield found


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served nowhere fails soon."""
    monkeypatch.setattr(runner, "_MAX_RETRY_S", 0.1)
    monkeypatch.setattr(job_work, "_GRACE_S", 0.1)


@pytest.fixture
def sdk(gateway: StatefulGateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=gateway.client, max_retries=0)


def line(number: int, *, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": f"request-{number}",
        "method": "POST",
        "url": url,
        "body": {"model": "tiny", "prompt": "hi", **body},
    }


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


async def start(client: httpx2.AsyncClient, contents: bytes, **fields: Any) -> dict[str, Any]:
    file = (await upload(client, contents)).json()
    body = {
        "input_file_id": file["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        **fields,
    }
    created = await client.post("/v1/batches", json=body)
    assert created.status_code == 200, created.text
    return created.json()


async def until(
    client: httpx2.AsyncClient, batch: dict[str, Any], wanted: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while not wanted(batch):
            await asyncio.sleep(0.02)
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
    return batch


async def ended(client: httpx2.AsyncClient, batch: dict[str, Any]) -> dict[str, Any]:
    return await until(client, batch, lambda now: now["status"] in ENDED)


async def contents(client: httpx2.AsyncClient, file_id: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 200
    return [json.loads(one) for one in answer.text.splitlines()]


async def test_the_official_client_runs_a_batch(sdk: openai.AsyncOpenAI) -> None:
    lines = jsonl(line(1), line(2, max_tokens=1), line(3, temperature=9))
    file = await sdk.files.create(
        file=("in.jsonl", lines),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at is not None
    assert 3590 < file.expires_at - time.time() <= 3600
    batch = await sdk.batches.create(
        input_file_id=file.id,
        endpoint="/v1/completions",
        completion_window="24h",
        metadata={"why": "to see"},
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert batch.status == "validating"
    async with asyncio.timeout(60):
        while batch.status not in ENDED:
            await asyncio.sleep(0.02)
            batch = await sdk.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
    assert batch.metadata == {"why": "to see"}
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert [one.id async for one in sdk.batches.list()] == [batch.id]
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    output = [json.loads(one) for one in (await sdk.files.content(batch.output_file_id)).text.splitlines()]
    by_id = {one["custom_id"]: one for one in output}
    assert by_id.keys() == {"request-1", "request-2"}
    first = by_id["request-1"]["response"]
    assert (first["status_code"], first["body"]["choices"][0]["text"]) == (200, "hello world")
    assert first["request_id"]
    assert by_id["request-1"]["error"] is None
    errors = [json.loads(one) for one in (await sdk.files.content(batch.error_file_id)).text.splitlines()]
    assert [one["custom_id"] for one in errors] == ["request-3"]
    assert errors[0]["response"]["status_code"] == 400
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    output_file = await sdk.files.retrieve(batch.output_file_id)
    assert output_file.purpose == "batch_output"
    assert output_file.expires_at is not None
    assert output_file.expires_at - output_file.created_at == 7200


@pytest.mark.parametrize(
    ("contents_", "code", "where"),
    [
        (b"", "empty_file", None),
        (b"\n\n", "empty_file", None),
        (b"no json\n", "invalid_json_line", 1),
        (b"[" * 5000 + b"\n", "invalid_json_line", 1),
        (jsonl(line(1)) + b'{"custom_id": "x"}\n', "invalid_json_line", 2),
        (jsonl(line(1), line(1)), "duplicate_custom_id", 2),
        (jsonl({**line(1), "custom_id": "a\x00b"}), "invalid_custom_id", 1),
        (jsonl({**line(1), "custom_id": "\ud800"}), "invalid_json_line", 1),
        (jsonl({**line(1), "custom_id": ""}), "invalid_json_line", 1),
        (jsonl({**line(1), "custom_id": "x" * 513}), "invalid_json_line", 1),
        (jsonl({**line(1), "method": "GET"}), "invalid_method", 1),
        (jsonl(line(1, url="/v1/chat/completions")), "url_mismatch", 1),
        (jsonl(line(1, url="/v1/models/unload")), "url_mismatch", 1),
        (jsonl(line(1, stream=True)), "invalid_request", 1),
        (jsonl({**line(1), "body": 3}), "invalid_request", 1),
        (b"\xff\xfe\n", "invalid_json_line", 1),
        (b"\n" * 1_000_000, "invalid_json_line", 10_001),
    ],
)
async def test_a_bad_file_fails_its_batch_and_says_where(
    gateway: StatefulGateway, contents_: bytes, code: str, where: int | None
) -> None:
    batch = await ended(gateway.client, await start(gateway.client, contents_))
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["code"] == code
    assert batch["errors"]["data"][0]["line"] == where
    assert batch["failed_at"]
    assert batch["output_file_id"] is None


async def test_too_many_requests_fail_a_batch(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    config = GatewayConfig(jobs=JobsConfig(max_batch_requests=3))
    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        batch = await ended(gateway.client, await start(gateway.client, jsonl(*map(line, range(4)))))
        assert batch["errors"]["data"][0]["code"] == "too_many_requests"
        batch = await ended(gateway.client, await start(gateway.client, jsonl(*map(line, range(3)))))
        assert batch["status"] == "completed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/models/unload"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"unknown": 1}, "unknown"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
async def test_bad_batches_are_refused_by_name(
    gateway: StatefulGateway, change: dict[str, Any], param: str
) -> None:
    file = (await upload(gateway.client, jsonl(line(1)))).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h", **change}
    refused = await gateway.client.post("/v1/batches", json=body)
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == param


async def test_only_files_for_batches_make_one(gateway: StatefulGateway) -> None:
    file = (await upload(gateway.client, jsonl(line(1)), purpose="user_data")).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    refused = await gateway.client.post("/v1/batches", json=body)
    assert refused.status_code == 400
    assert "must be 'batch'" in refused.json()["error"]["message"]


async def test_a_large_batch_has_every_request_answered_once(text_model: TextModel, tmp_path: Path) -> None:
    seen: list[str] = []

    def script(request: Request) -> list[int]:
        seen.append(request.id)
        return encode(text_model, "ok")

    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as gateway:
        batch = await ended(gateway.client, await start(gateway.client, jsonl(*map(line, range(250)))))
        output = await contents(gateway.client, batch["output_file_id"])
    assert batch["request_counts"] == {"total": 250, "completed": 250, "failed": 0}
    assert [one["custom_id"] for one in output] == [f"request-{number}" for number in range(250)]
    assert len(seen) == 250


async def test_no_more_than_allowed_run_at_once(text_model: TextModel, tmp_path: Path) -> None:
    most = 0

    def script(request: Request) -> list[int]:
        nonlocal most
        most = max(most, backend.num_running)
        return encode(text_model, "ok")

    backend = ScriptedBackend(script, delay_s=0.005)
    config = GatewayConfig(jobs=JobsConfig(max_running=3))
    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        await ended(gateway.client, await start(gateway.client, jsonl(*map(line, range(30)))))
    assert most == 3


async def test_a_cancelled_batch_frees_its_engines_and_keeps_answers(
    text_model: TextModel, tmp_path: Path
) -> None:
    backend = ScriptedBackend(
        lambda request: encode(text_model, "x" * (1 if request.sampling.max_tokens == 1 else 200)), delay_s=0.02
    )
    lines = [line(1, max_tokens=1), *(line(number) for number in range(2, 40))]
    config = GatewayConfig(jobs=JobsConfig(max_running=4))
    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        batch = await start(gateway.client, jsonl(*lines))
        await until(gateway.client, batch, lambda now: now["request_counts"]["completed"])
        cancelling = await gateway.client.post(f"/v1/batches/{batch['id']}/cancel")
        assert cancelling.json()["status"] in ("cancelling", "cancelled")
        batch = await ended(gateway.client, batch)
        assert batch["status"] == "cancelled"
        assert None not in (batch["cancelling_at"], batch["cancelled_at"])
        assert backend.num_running == 0
        assert backend.num_cancelled >= 4
        output = await contents(gateway.client, batch["output_file_id"])
        errors = await contents(gateway.client, batch["error_file_id"])
        assert "request-1" in [one["custom_id"] for one in output]
        assert len(output) + len(errors) == 39
        assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
        again = await gateway.client.post(f"/v1/batches/{batch['id']}/cancel")
        assert again.status_code == 400


async def test_an_expired_batch_says_so_for_each_request(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with stateful_gateway(text_model, backend, tmp_path, runs_jobs=False) as gateway:
        batch = await start(gateway.client, jsonl(line(1)))
        work = gateway.state.jobs.runner._work
        files = gateway.state.jobs.runner._files
        job = await work.lease_job("by hand", lease_s=60)
        assert job is not None
        await files.read(job, runner="by hand")
        async with gateway.state._database.write() as connection:
            await connection.execute(update(jobs_table).values(expires_at=1.0))
        gateway.state.start(gateway.app)
        batch = await ended(gateway.client, batch)
        assert batch["status"] == "expired"
        (error,) = await contents(gateway.client, batch["error_file_id"])
        assert error["error"]["code"] == "batch_expired"
        assert error["response"] is None


async def test_what_is_refused_for_want_of_room_is_tried_again(text_model: TextModel, tmp_path: Path) -> None:
    num_refused = 0

    def script(request: Request) -> list[int]:
        nonlocal num_refused
        if num_refused < 3:
            num_refused += 1
            raise OverloadedError("full", retry_after_s=0.01)
        return encode(text_model, "ok")

    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as gateway:
        batch = await ended(gateway.client, await start(gateway.client, jsonl(line(1))))
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert num_refused == 3


async def test_a_deleted_input_file_fails_the_batch(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with stateful_gateway(text_model, backend, tmp_path, runs_jobs=False) as gateway:
        batch = await start(gateway.client, jsonl(line(1)))
        await gateway.client.delete(f"/v1/files/{batch['input_file_id']}")
        gateway.state.start(gateway.app)
        batch = await ended(gateway.client, batch)
    assert batch["errors"]["data"][0]["code"] == "file_not_found"


@pytest.mark.usefixtures("hurried")
async def test_owners_see_what_is_theirs_and_admins_everything(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with stateful_gateway(text_model, backend, tmp_path, asks_for_keys=True) as gateway:
        headers = {}
        for name, role in (("anna", Role.USER), ("bert", Role.USER), ("root", Role.ADMIN), ("vera", Role.VIEWER)):
            key, record = make_key(name=name, role=role, now_s=time.time())
            await gateway.state.keys.add(record)
            headers[name] = {"authorization": f"Bearer {key}"}
        client = gateway.client
        client.headers.update(headers["anna"])
        batch = await ended(client, await start(client, jsonl(line(1), line(2, model="nobody"))))
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        paths = [
            f"/v1/files/{batch['input_file_id']}",
            f"/v1/files/{batch['output_file_id']}/content",
            f"/v1/batches/{batch['id']}",
        ]
        for name, status in (("anna", 200), ("bert", 404), ("root", 200), ("vera", 403)):
            assert [(await client.get(path, headers=headers[name])).status_code for path in paths] == [status] * 3
        body = {"input_file_id": batch["input_file_id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        assert (await client.post("/v1/batches", json=body, headers=headers["bert"])).status_code == 404
        cancel = f"/v1/batches/{batch['id']}/cancel"
        assert (await client.post(cancel, headers=headers["bert"])).status_code == 404
        assert (await client.delete(paths[0], headers=headers["bert"])).status_code == 404
        for name, number in (("anna", 1), ("bert", 0), ("root", 1)):
            assert len((await client.get("/v1/batches", headers=headers[name])).json()["data"]) == number
        assert len((await client.get("/v1/files", headers=headers["anna"])).json()["data"]) == 3


@pytest.mark.usefixtures("hurried")
async def test_a_batch_may_do_what_its_owner_may(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with stateful_gateway(text_model, backend, tmp_path, asks_for_keys=True) as gateway:
        key, record = make_key(name="limited", role=Role.USER, now_s=time.time(), models=("other",))
        await gateway.state.keys.add(record)
        gateway.client.headers.update({"authorization": f"Bearer {key}"})
        batch = await ended(gateway.client, await start(gateway.client, jsonl(line(1))))
        (error,) = await contents(gateway.client, batch["error_file_id"])
        assert error["response"]["status_code"] == 404


async def test_engines_that_are_away_are_waited_for(text_model: TextModel, tmp_path: Path) -> None:
    away = True

    def script(request: Request) -> list[int]:
        if away:
            raise BackendUnavailableError("starting", retry_after_s=0.01)
        return encode(text_model, "ok")

    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as gateway:
        batch = await start(gateway.client, jsonl(line(1)))
        await until(gateway.client, batch, lambda now: now["status"] == "in_progress")
        away = False
        assert (await ended(gateway.client, batch))["status"] == "completed"


async def test_a_line_may_be_as_long_as_a_request_may_be_now(gateway: StatefulGateway) -> None:
    lines = jsonl(line(1, prompt="a" * 2000))
    gateway.config.replace(GatewayConfig(max_body_bytes=1000))
    refused = await ended(gateway.client, await start(gateway.client, lines))
    assert [error["code"] for error in refused["errors"]["data"]] == ["line_too_long"]
    gateway.config.replace(GatewayConfig(max_body_bytes=3000))
    assert (await ended(gateway.client, await start(gateway.client, lines)))["errors"] is None
