"""What becomes of jobs when something is in their way."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import Response

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import BackendUnavailableError, EngineDiedError, RateLimitedError, StorageError
from localmoe.core.identity import Role
from localmoe.core.jobs import FileRecord, ItemResult, ItemState, LeasedItem
from localmoe.core.request import Request
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.keys import make_key
from localmoe.gateway.jobs import runner as runner_module
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.jobs.folder import FileWriter, new_file_id
from localmoe.state import job_work
from localmoe.text.text_model import TextModel
from support.stateful import StatefulGateway, stateful_gateway, upload
from support.tiny_text import encode

ASK = {"model": "tiny", "text": "hi", "mode": "async"}
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def backend(text_model: TextModel) -> ScriptedBackend:
    return ScriptedBackend(encode(text_model, "hello"))


@pytest.fixture
async def gateway(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> AsyncIterator[StatefulGateway]:
    async with stateful_gateway(text_model, backend, tmp_path, runs_jobs=False) as found:
        yield found


async def start_batch(client: httpx2.AsyncClient, number: int, **body: Any) -> dict[str, Any]:
    lines = [
        {
            "custom_id": f"request-{place}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": "hi", **body},
        }
        for place in range(number)
    ]
    contents = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = await upload(client, contents)
    asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch: dict[str, Any] = (await client.post("/v1/batches", json=asked)).json()
    return batch


async def until(
    client: httpx2.AsyncClient, path: str, wanted: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """What is there when it has ended, or is as wanted."""
    async with asyncio.timeout(30):
        while True:
            found: dict[str, Any] = (await client.get(path)).json()
            if wanted(found) if wanted else found["status"] in ENDED:
                return found
            await asyncio.sleep(0.02)


async def contents(client: httpx2.AsyncClient, file_id: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/files/{file_id}/content")
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_jobs_of_a_revoked_key_fail_and_are_not_run(text_model: TextModel, tmp_path: Path) -> None:
    asked: list[str] = []

    def script(request: Request) -> list[int]:
        asked.append(request.id)
        return encode(text_model, "hello")

    config = {"asks_for_keys": True, "runs_jobs": False}
    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path, **config) as gateway:  # type: ignore[arg-type]
        client = gateway.client
        headers, ids = {}, {}
        for name, role in (("anna", Role.USER), ("bert", Role.USER), ("root", Role.ADMIN)):
            key, record = make_key(name=name, role=role, now_s=time.time())
            await gateway.state.keys.add(record)
            headers[name], ids[name] = {"authorization": f"Bearer {key}"}, record.id
        jobs = {}
        for name in ("anna", "bert"):
            accepted = await client.post("/v1/inference", json=ASK, headers=headers[name])
            jobs[name] = f"/v1/jobs/{accepted.json()['id']}"
        client.headers.update(headers["anna"])
        batch = await start_batch(client, 2)
        assert await gateway.state.keys.revoke(ids["anna"], at_s=time.time())
        client.headers.update(headers["root"])
        gateway.state.start(gateway.app)
        failed = await until(client, jobs["anna"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_api_key")
        assert "revoked" in failed["error"]["message"]
        assert (await until(client, jobs["bert"]))["status"] == "completed"
        batch = await until(client, f"/v1/batches/{batch['id']}")
        assert (batch["status"], batch["request_counts"]["failed"]) == ("completed", 2)
        errors = await contents(client, batch["error_file_id"])
        assert [one["response"]["status_code"] for one in errors] == [401, 401]
    assert len(asked) == 1


async def test_items_that_were_leased_without_our_knowing_are_run(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks when the database has given them, and before it can say so."""
    config = GatewayConfig(jobs=JobsConfig(lease_s=1.0))
    async with stateful_gateway(text_model, backend, tmp_path, config=config, runs_jobs=False) as gateway:
        work = gateway.state.jobs.runner._work
        lease, num_lost = work.lease_items, 0

        async def lose(*args: Any, **kwargs: Any) -> list[LeasedItem]:
            nonlocal num_lost
            found = await lease(*args, **kwargs)
            if found and not num_lost:
                num_lost = len(found)
                raise StorageError("it broke")
            return found

        monkeypatch.setattr(work, "lease_items", lose)
        job = (await gateway.client.post("/v1/inference", json=ASK)).json()
        gateway.state.start(gateway.app)
        assert (await until(gateway.client, f"/v1/jobs/{job['id']}"))["status"] == "completed"
    assert num_lost == 1


async def test_nothing_ends_the_leader_for_good(gateway: StatefulGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_MAX_PAUSE_S", 0.05)
    work = gateway.state.jobs.runner._work
    release, num_failures = work.release, 0

    async def fail_once(*args: Any, **kwargs: Any) -> None:
        nonlocal num_failures
        num_failures += 1
        if num_failures == 1:
            raise TypeError
        await release(*args, **kwargs)

    monkeypatch.setattr(work, "release", fail_once)
    job = (await gateway.client.post("/v1/inference", json=ASK)).json()
    gateway.state.start(gateway.app)
    assert (await until(gateway.client, f"/v1/jobs/{job['id']}"))["status"] == "completed"
    assert num_failures == 2


async def test_cancelling_twice_breaks_off_no_cleaning_up(gateway: StatefulGateway) -> None:
    steps: list[str] = []

    async def app(*_: Any) -> None:
        steps.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            steps.append("cleaned up")

    runner = gateway.state.jobs.runner
    job = (await gateway.client.post("/v1/inference", json=ASK)).json()
    runner.start(app)
    async with asyncio.timeout(20):
        while not steps:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(2):
            runner.cancelled(job["id"])
            await asyncio.sleep(0.01)
        while len(steps) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert steps[:2] == ["begun", "cleaned up"]


async def test_a_request_that_crashes_everything_has_an_error_in_its_batch(
    gateway: StatefulGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    gateway.state.start(gateway.app)
    monkeypatch.setattr(gateway.state.jobs.runner._client, "post", crash)
    batch = await until(gateway.client, f"/v1/batches/{(await start_batch(gateway.client, 2))['id']}")
    assert (batch["status"], batch["request_counts"]["failed"]) == ("completed", 2)
    for one in await contents(gateway.client, batch["error_file_id"]):
        assert one["response"]["status_code"] == 500
        assert one["response"]["body"]["error"]["code"] == "internal_error"


@pytest.mark.parametrize("body", [b"", b'{"logprob":NaN}', b'{"text":"\\ud800"}', b'{"text":"'])
async def test_an_answer_that_is_no_json_is_an_error(gateway: StatefulGateway, body: bytes) -> None:
    """And holds up no batch whose file it would be in."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Response(body)(scope, receive, send)

    batch, job = (
        await start_batch(gateway.client, 2),
        (await gateway.client.post("/v1/inference", json=ASK)).json(),
    )
    gateway.state.jobs.runner.start(app)
    batch = await until(gateway.client, f"/v1/batches/{batch['id']}")
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
    for one in await contents(gateway.client, batch["error_file_id"]):
        assert one["response"]["body"]["error"]["code"] == "invalid_answer"
    failed = await until(gateway.client, f"/v1/jobs/{job['id']}")
    assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_answer")


async def test_a_file_that_is_deleted_while_it_is_read_is_gone(
    gateway: StatefulGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await start_batch(gateway.client, 2)
    files = gateway.state.jobs.runner._files
    check = files._check

    def check_and_delete(path: Path, *bounds: Any) -> Any:
        found = check(path, *bounds)
        path.unlink()
        return found

    monkeypatch.setattr(files, "_check", check_and_delete)
    gateway.state.start(gateway.app)
    batch = await until(gateway.client, f"/v1/batches/{batch['id']}")
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "file_not_found")


async def test_a_batch_ends_though_another_takes_all_places(text_model: TextModel, tmp_path: Path) -> None:
    backend = ScriptedBackend(
        lambda request: encode(text_model, "x" * (50 if request.sampling.seed == 1 else 1)), delay_s=0.01
    )
    config = GatewayConfig(jobs=JobsConfig(max_running=2))
    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        slow = await start_batch(gateway.client, 1, seed=1)
        many = await start_batch(gateway.client, 400, seed=2)
        assert (await until(gateway.client, f"/v1/batches/{slow['id']}"))["status"] == "completed"
        counts = (await gateway.client.get(f"/v1/batches/{many['id']}")).json()["request_counts"]
    assert 0 < counts["completed"] < 400


async def test_a_batch_that_cannot_be_written_holds_up_no_other(
    gateway: StatefulGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_BATCH_RETRY_S", 0.05)
    files = gateway.state.jobs.runner._files
    write, is_broken, num_failures = files.write, True, 0
    first = await start_batch(gateway.client, 1)

    async def fail(job: Any, **kwargs: Any) -> None:
        nonlocal num_failures
        if job.id == first["id"] and is_broken:
            num_failures += 1
            raise RuntimeError
        await write(job, **kwargs)

    monkeypatch.setattr(files, "write", fail)
    second = await start_batch(gateway.client, 1)
    gateway.state.start(gateway.app)
    assert (await until(gateway.client, f"/v1/batches/{second['id']}"))["status"] == "completed"
    path = f"/v1/batches/{first['id']}"
    assert (await gateway.client.get(path)).json()["status"] in ("in_progress", "finalizing")
    await until(gateway.client, path, lambda batch: batch["status"] == "finalizing" and num_failures > 1)
    is_broken = False
    assert (await until(gateway.client, path))["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


async def test_an_engine_that_is_away_is_not_asked_all_the_time(text_model: TextModel, tmp_path: Path) -> None:
    num_asked = 0

    def script(request: Request) -> list[int]:
        nonlocal num_asked
        num_asked += 1
        raise BackendUnavailableError("starting", retry_after_s=0.001)

    config = GatewayConfig(jobs=JobsConfig(max_running=4))
    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path, config=config) as gateway:
        await start_batch(gateway.client, 300)
        async with asyncio.timeout(20):
            while not num_asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(1)
    assert 4 <= num_asked <= 12


async def test_what_another_gateway_serves_is_left_to_it(text_model: TextModel, tmp_path: Path) -> None:
    """Though that one is busy all the time, and this one takes whatever waits."""
    config = GatewayConfig(jobs=JobsConfig(max_running=1))
    slow, other = ScriptedBackend(encode(text_model, "hello"), delay_s=0.02), ScriptedBackend([])
    async with (
        stateful_gateway(text_model, slow, tmp_path, config=config, runs_jobs=False) as serving,
        stateful_gateway(text_model, other, tmp_path, name="other") as beside,
    ):
        batch = await start_batch(serving.client, 20)
        await until(beside.client, f"/v1/batches/{batch['id']}", lambda found: found["request_counts"]["total"])
        await asyncio.sleep(0.1)
        serving.state.start(serving.app)
        batch = await until(serving.client, f"/v1/batches/{batch['id']}")
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}


async def test_what_is_served_nowhere_is_an_error_in_the_end(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_MAX_RETRY_S", 0.05)
    monkeypatch.setattr(job_work, "_GRACE_S", 0.05)
    num_put_back = 0
    async with stateful_gateway(text_model, backend, tmp_path) as gateway:
        work = gateway.state.jobs.runner._work
        put_back = work.put_back

        async def count(*args: Any, **kwargs: Any) -> None:
            nonlocal num_put_back
            num_put_back += 1
            await put_back(*args, **kwargs)

        monkeypatch.setattr(work, "put_back", count)
        batch = await start_batch(gateway.client, 1, model="huge")
        batch = await until(gateway.client, f"/v1/batches/{batch['id']}")
        (failed,) = await contents(gateway.client, batch["error_file_id"])
    assert (failed["response"]["status_code"], num_put_back) == (404, 5)
    assert failed["response"]["body"]["error"]["code"] == "model_not_found"


async def test_a_request_that_kills_its_engine_is_not_tried_for_ever(
    text_model: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_MAX_RETRY_S", 0.02)
    num_deaths = 0

    def script(request: Request) -> list[int]:
        nonlocal num_deaths
        num_deaths += 1
        raise EngineDiedError("the engine ended with signal 11")

    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as gateway:
        job = (await gateway.client.post("/v1/inference", json=ASK)).json()
        failed = await until(gateway.client, f"/v1/jobs/{job['id']}")
    assert (failed["status"], failed["error"]["code"], num_deaths) == ("failed", "interrupted", 5)


async def test_what_can_never_be_admitted_is_not_tried_again(text_model: TextModel, tmp_path: Path) -> None:
    """A prompt of more tokens than its owner may ask for in a minute."""

    def script(request: Request) -> list[int]:
        raise RateLimitedError("it never fits", kind="tokens", retry_after_s=None)

    async with stateful_gateway(text_model, ScriptedBackend(script), tmp_path) as gateway:
        job = (await gateway.client.post("/v1/inference", json=ASK)).json()
        failed = await until(gateway.client, f"/v1/jobs/{job['id']}")
    assert (failed["status"], failed["error"]["code"]) == ("failed", "rate_limit_exceeded")


async def test_whoever_is_late_replaces_no_answers(gateway: StatefulGateway, tmp_path: Path) -> None:
    """A runner that was taken for gone goes on writing while another writes, and when that has ended the batch."""
    batch = await start_batch(gateway.client, 3)
    work, files = gateway.state.jobs.runner._work, gateway.state.jobs.runner._files
    job = await work.lease_job("reader", lease_s=30)
    assert job is not None
    await files.read(job, runner="reader")
    for item in await work.lease_items("reader", limit=3, lease_s=30):
        answer = ItemResult(
            position=item.position, custom_id=None, state=ItemState.SUCCEEDED, status_code=200, body=b"{}"
        )
        assert await work.finish(item, answer, runner="reader")
    late = await work.lease_job("late", lease_s=-1)
    assert late is not None
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    taken = await work.lease_job("other", lease_s=30)
    assert taken is not None
    await files.write(late, runner="late")
    assert [path.name for path in (tmp_path / "files").iterdir()] == [batch["input_file_id"]]
    await files.write(taken, runner="other")
    await files.write(late, runner="late")
    batch = (await gateway.client.get(f"/v1/batches/{batch['id']}")).json()
    assert len(await contents(gateway.client, batch["output_file_id"])) == 3
    names = {path.name for path in (tmp_path / "files").iterdir()}
    assert names == {batch["input_file_id"], batch["output_file_id"]}


async def test_a_line_that_is_too_long_is_one_error(text_model: TextModel, tmp_path: Path) -> None:
    config = GatewayConfig(max_body_bytes=1000)
    backend = ScriptedBackend(encode(text_model, "hello"))
    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        file = await upload(gateway.client, b"x" * 5000 + b"\nno json\n")
        asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await gateway.client.post("/v1/batches", json=asked)).json()
        batch = await until(gateway.client, f"/v1/batches/{batch['id']}")
    errors = [(error["code"], error["line"]) for error in batch["errors"]["data"]]
    assert errors == [("line_too_long", 1), ("invalid_json_line", 2)]


async def test_only_our_own_old_files_are_tidied_up(gateway: StatefulGateway, tmp_path: Path) -> None:
    folder = gateway.state.jobs.folder
    known, unknown, fresh = (new_file_id() for _ in range(3))
    for file_id in (known, unknown, fresh):
        async with folder.write(file_id) as writer:
            await writer.write(b"x")
    record = FileRecord(
        id=known, owner_id="anna", filename="x", purpose="batch", num_bytes=1, created_at=time.time()
    )
    await folder.add(record)
    directory = tmp_path / "files"
    unfinished = f"{new_file_id()}-{'0' * 32}.part"
    for name in (unfinished, "thesis.tex", "file-of-mine.part"):
        (directory / name).write_bytes(b"x")
    for name in (known, unknown, unfinished, "thesis.tex", "file-of-mine.part"):
        os.utime(directory / name, (1, 1))
    await folder.sweep()
    assert {path.name for path in directory.iterdir()} == {known, fresh, "thesis.tex", "file-of-mine.part"}


async def test_what_is_written_in_part_is_written_to_the_end() -> None:
    """As a disk does that is nearly full."""

    class Reluctant:
        written = b""

        def write(self, data: memoryview) -> int:
            self.written += data[:7]
            return min(7, len(data))

    file = Reluctant()
    writer = FileWriter(file, lambda num_bytes: None)  # type: ignore[arg-type]
    data = os.urandom((1 << 20) + 3)
    await writer.write(data)
    assert file.written == data
