"""`/v1/files`, by OpenAI's own client and by hand."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import update

from localmoe.backends.scripted import ScriptedBackend
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.jobs import file_routes
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.state.schema import files as files_table
from localmoe.text.text_model import TextModel
from support.stateful import StatefulGateway, stateful_gateway, upload
from support.tiny_text import encode


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
def sdk(gateway: StatefulGateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=gateway.client, max_retries=0)


async def test_the_official_client_keeps_files(sdk: openai.AsyncOpenAI) -> None:
    data = b"a\n" * 100_000
    file = await sdk.files.create(file=("notes.txt", data), purpose="user_data")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        200_000,
        "notes.txt",
        "user_data",
        "processed",
    )
    assert (await sdk.files.retrieve(file.id)) == file
    assert (await sdk.files.content(file.id)).content == data
    assert [one.id async for one in sdk.files.list()] == [file.id]
    assert [one.id async for one in sdk.files.list(purpose="batch")] == []
    assert (await sdk.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await sdk.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.files.content(file.id)


async def test_files_are_bounded_while_they_come(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    config = GatewayConfig(jobs=JobsConfig(max_file_bytes=200_000, max_owner_file_bytes=300_000))

    async def endless() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(100_000):
            yield b"x" * 10_000
            nonlocal sent
            sent += 10_000

    sent = 0
    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        form = {"content-type": "multipart/form-data; boundary=b"}
        refused = await gateway.client.post("/v1/files", content=endless(), headers=form)
        assert refused.status_code == 413
        assert sent < 1_000_000
        assert (await upload(gateway.client, b"x" * 300_000)).status_code == 413  # by its length
        assert (await upload(gateway.client, b"x" * 190_000)).status_code == 200
        over = await upload(gateway.client, b"x" * 190_000)
        assert (over.status_code, over.json()["error"]["code"]) == (413, "quota_exceeded")
        assert len(list((tmp_path / "files").iterdir())) == 1


async def test_uploads_at_the_same_time_are_bounded_together(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    config = GatewayConfig(jobs=JobsConfig(max_file_bytes=200_000, max_owner_file_bytes=300_000))
    num_ended = 0

    async def held() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"x" * 190_000
        while not num_ended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield b"\r\n--b--\r\n"

    async with stateful_gateway(text_model, backend, tmp_path, config=config) as gateway:
        form = {"content-type": "multipart/form-data; boundary=b"}

        async def send() -> int:
            nonlocal num_ended
            status = (await gateway.client.post("/v1/files", content=held(), headers=form)).status_code
            num_ended += 1
            return status

        async with asyncio.timeout(20):
            assert sorted(await asyncio.gather(send(), send())) == [200, 413]
        assert (await upload(gateway.client, b"x" * 50_000)).status_code == 200  # what was refused takes nothing


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"other": "1"}, "other"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"}, "expires_after[seconds]"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "9" * 30}, "expires_after[seconds]"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "000003600" + "9" * 400},
            "expires_after[seconds]",
        ),
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"long": "x" * 5000}, "long"),
    ],
)
async def test_bad_forms_are_refused_by_name(
    gateway: StatefulGateway, tmp_path: Path, fields: dict[str, str], param: str
) -> None:
    refused = await upload(gateway.client, b"x", **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert list((tmp_path / "files").iterdir()) == []


_PURPOSE = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
_FILE = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\ndata\r\n'


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", _PURPOSE + _FILE + b"--b--\r\n"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"rubbish"),
        ("multipart/form-data; boundary=b", _PURPOSE + b"--b--\r\n"),
        ("multipart/form-data; boundary=b", _PURPOSE + _FILE),
        ("multipart/form-data; boundary=b", _PURPOSE + _FILE + _FILE + b"--b--\r\n"),
        ("multipart/form-data; boundary=b", _PURPOSE + _PURPOSE + _FILE + b"--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x: " + b"y" * 20_000 + b"\r\n\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nno name\r\n" + _FILE + b"--b--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"x"),
    ],
)
async def test_broken_forms_are_refused(
    gateway: StatefulGateway, tmp_path: Path, content_type: str, body: bytes
) -> None:
    refused = await gateway.client.post("/v1/files", content=body, headers={"content-type": content_type})
    assert refused.status_code == 400, refused.text
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\dir\\x.jsonl", "x.jsonl"),
        ("a\x00b\x7f", "ab"),
        ("", "file"),
        ("ä" * 300, "ä" * 255),
    ],
)
async def test_file_names_are_only_shown(gateway: StatefulGateway, tmp_path: Path, name: str, shown: str) -> None:
    disposition = f'form-data; name="file"; filename="{name}"'.encode()
    body = _PURPOSE + b"--b\r\ncontent-disposition: " + disposition + b"\r\n\r\ndata\r\n--b--\r\n"
    form = {"content-type": "multipart/form-data; boundary=b"}
    file = (await gateway.client.post("/v1/files", content=body, headers=form)).json()
    assert file["filename"] == shown
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file["id"]]
    answer = await gateway.client.get(f"/v1/files/{file['id']}/content")
    assert answer.content == b"data"
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("file_id", ["..%2F..%2Fstate.db", "file-none", "x" * 3000, "%00", "' OR 1=1 --"])
async def test_ids_of_nothing_are_not_found(gateway: StatefulGateway, file_id: str) -> None:
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{file_id}"):
        assert (await gateway.client.get(path)).status_code == 404


async def test_lists_come_in_pages(gateway: StatefulGateway) -> None:
    ids = [(await upload(gateway.client, b"x")).json()["id"] for _ in range(5)]
    first = (await gateway.client.get("/v1/files", params={"limit": 2})).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:2:-1], True)
    rest = (await gateway.client.get("/v1/files", params={"limit": 3, "after": first["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
    oldest = (await gateway.client.get("/v1/files", params={"order": "asc", "limit": 1})).json()
    assert oldest["first_id"] == ids[0]
    for params in ({"limit": 0}, {"limit": 10**9}, {"order": "up"}, {"after": "x" * 100}):
        assert (await gateway.client.get("/v1/files", params=params)).status_code == 400


async def test_long_lists_come_in_pieces(
    gateway: StatefulGateway, sdk: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_routes, "_MAX_PAGE", 2)
    ids = [(await upload(gateway.client, b"x")).json()["id"] for _ in range(5)]
    assert len((await gateway.client.get("/v1/files")).json()["data"]) == 2
    assert [one.id async for one in sdk.files.list()] == ids[::-1]


async def test_expired_files_go(gateway: StatefulGateway, tmp_path: Path) -> None:
    file = (await upload(gateway.client, b"x")).json()
    async with gateway.state._database.write() as connection:
        await connection.execute(update(files_table).values(expires_at=1.0))
    assert (await gateway.client.get(f"/v1/files/{file['id']}")).status_code == 404
    await gateway.state.jobs.folder.sweep()
    assert list((tmp_path / "files").iterdir()) == []


async def test_a_client_that_leaves_leaves_nothing(gateway: StatefulGateway, tmp_path: Path) -> None:
    messages = [
        {"type": "http.request", "body": _PURPOSE + _FILE[:-6], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "raw_path": b"/v1/files",
        "query_string": b"",
        "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        "http_version": "1.1",
    }
    await gateway.app(scope, receive, send)
    assert list((tmp_path / "files").iterdir()) == []


async def test_a_list_whose_files_are_deleted_meanwhile_does_not_end_as_if_complete(
    gateway: StatefulGateway, sdk: openai.AsyncOpenAI
) -> None:
    for _ in range(5):
        await upload(gateway.client, b"x")

    async def delete_all() -> None:
        async for file in sdk.files.list(limit=2):
            await sdk.files.delete(file.id)

    with pytest.raises(openai.BadRequestError, match="not in the list") as failed:
        await delete_all()
    assert failed.value.param == "after"
