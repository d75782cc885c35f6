"""`/v1/config`: settings seen, changed, reloaded and put back over HTTP, and what that does to the server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.serving import ModelSpec
from localmoe.text.text_model import TextModel
from support.configured import ConfiguredServer, configured_server

TEXT = """\
# ours
gateway:
  max_choices: 5  # few
models:
  - model: tiny
"""
NESTED = json.loads("[" * 200 + "]" * 200)
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOME_KEY", "s3cr3t")
    path = tmp_path / "site.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
async def server(file: Path, text_model: TextModel) -> AsyncIterator[ConfiguredServer]:
    async with configured_server(file, text_model) as server:
        yield server


def write(file: Path, text: str) -> None:
    file.write_text(text)


def error_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_all_settings_are_there_with_where_they_are_from(server: ConfiguredServer, file: Path) -> None:
    state = (await server.client.get("/v1/config")).json()
    assert (state["version"], state["files"], state["restart"]) == (1, [str(file)], [])
    assert state["settings"]["gateway"]["max_choices"] == 5
    assert state["origins"]["gateway.max_choices"] == f"file {file}"
    assert state["origins"]["port"] == "default"
    assert state["origins"]["home"] == "--home"


async def test_one_setting_and_a_block(server: ConfiguredServer, file: Path) -> None:
    response = await server.client.get("/v1/config/gateway.max_choices")
    assert response.json() == {
        "key": "gateway.max_choices",
        "value": 5,
        "origins": {"gateway.max_choices": f"file {file}"},
        "effects": {"gateway.max_choices": "live"},
        "etag": response.headers["etag"],
    }
    block = (await server.client.get("/v1/config/gateway")).json()
    assert block["value"]["max_choices"] == 5
    missing = await server.client.get("/v1/config/gateway.max_choice")
    assert error_of(missing) == (404, "not_found")
    assert "did you mean 'gateway.max_choices'" in missing.json()["error"]["message"]


async def test_a_change_is_in_effect_and_in_the_file(server: ConfiguredServer, file: Path) -> None:
    body = {"model": "tiny", "prompt": "a", "n": 6}
    assert (await server.client.post("/v1/completions", json=body)).status_code == 400
    tag = (await server.client.get("/v1/config/gateway.max_choices")).headers["etag"]
    changed = await server.client.patch(
        "/v1/config/gateway.max_choices", json={"value": 6, "reason": "more"}, headers={"if-match": tag}
    )
    assert changed.status_code == 200
    assert changed.json()["changes"] == [{"key": "gateway.max_choices", "before": 5, "after": 6}]
    assert (await server.client.post("/v1/completions", json=body)).status_code == 200
    assert server.file.read_text() == TEXT.replace("5", "6")
    again = await server.client.patch(
        "/v1/config/gateway.max_choices", json={"value": 7}, headers={"if-match": tag}
    )
    assert error_of(again) == (412, "precondition_failed")
    tag = changed.headers["etag"]
    third = await server.client.patch(
        "/v1/config/gateway.max_choices", json={"value": 7}, headers={"if-match": tag}
    )
    assert third.status_code == 200


async def test_bounds_of_bodies_are_live(server: ConfiguredServer) -> None:
    assert (await server.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    await server.client.patch("/v1/config/gateway.max_body_bytes", json={"value": 40})
    assert (await server.client.post("/v1/chat/completions", json=CHAT)).status_code == 413
    await server.client.post("/v1/config/rollback", json={"version": 1})
    assert (await server.client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_dispatch_is_live(server: ConfiguredServer) -> None:
    (dispatcher,) = server.fleet.dispatchers
    await server.client.patch("/v1/config/dispatch", json={"value": {"max_queued": 3, "policy": "round_robin"}})
    assert dispatcher._room.max_queued == 3
    assert server.builder.settings.dispatch.max_queued == 3


async def test_dispatch_reaches_a_model_that_is_being_loaded(
    server: ConfiguredServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, real = asyncio.Event(), ScriptedBackend.start

    async def slow(backend: ScriptedBackend) -> None:
        await release.wait()
        await real(backend)

    monkeypatch.setattr(ScriptedBackend, "start", slow)
    loading = asyncio.create_task(server.fleet.load(ModelSpec(model="b")))
    async with asyncio.timeout(10):
        while len(server.fleet.dispatchers) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await server.client.patch("/v1/config/dispatch", json={"value": {"max_queued": 3}})
    release.set()
    await loading
    assert [dispatcher._room.max_queued for dispatcher in server.fleet.dispatchers] == [3, 3]


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("PATCH", "gateway.max_choices", {"value": 0}, (422, "invalid_configuration")),
        ("PATCH", "gateway.max_choices", {"value": "many"}, (422, "invalid_configuration")),
        ("PATCH", "gateway.max_choices", {}, (400, "missing_required_parameter")),
        ("PATCH", "gateway.max_choices", {"value": 1, "force": True}, (400, "unknown_parameter")),
        ("PATCH", "gateway.max_choices", {"value": 1, "reason": "a\nb"}, (400, "invalid_value")),
        ("PATCH", "models", {"value": NESTED}, (422, "invalid_configuration")),
        ("PATCH", "dispatch.max_queued", {"value": 10**30}, (422, "invalid_configuration")),
        ("PATCH", "no.such", {"value": 1}, (404, "not_found")),
        ("PATCH", "config", {"value": "/etc/passwd"}, (422, "invalid_configuration")),
        ("PATCH", "home", {"value": "/tmp"}, (422, "invalid_configuration")),
        ("PATCH", "models", {"value": [{"model": "broken"}]}, (422, "model_load_failed")),
        ("POST", "rollback", {"version": 99}, (404, "not_found")),
        ("POST", "rollback", {"version": 0}, (400, "invalid_value")),
        ("POST", "rollback", {"version": "1"}, (400, "invalid_type")),
        ("GET", "history?limit=0", None, (400, "invalid_value")),
    ],
)
async def test_what_cannot_be_is_named_and_changes_nothing(
    server: ConfiguredServer, file: Path, method: str, path: str, body: Any, expected: tuple[int, str]
) -> None:
    response = await server.client.request(method, f"/v1/config/{path}", json=body)
    assert error_of(response) == expected
    assert server.file.read_text() == TEXT
    assert (await server.client.get("/v1/config")).json()["version"] == 1
    assert (await server.client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_reload_reads_the_file_again(server: ConfiguredServer, file: Path) -> None:
    server.file.write_text(TEXT.replace("5", "9") + "port: 1234\n")
    outcome = (await server.client.post("/v1/config/reload", json={"reason": "by hand"})).json()
    assert (outcome["version"], outcome["restart"]) == (2, ["port"])
    assert (await server.client.post("/v1/config/reload")).json()["version"] == 2
    server.file.write_text("gateway: {max_choices: 0}")
    failed = await server.client.post("/v1/config/reload")
    assert error_of(failed) == (422, "invalid_configuration")
    assert "gateway.max_choices" in failed.json()["error"]["message"]
    metrics = (await server.client.get("/metrics")).text
    assert 'localmoe_config_changes_total{outcome="failed"} 1.0' in metrics
    assert "localmoe_config_version 2.0" in metrics


async def test_models_come_go_and_fall_back(server: ConfiguredServer, file: Path) -> None:
    tiny = server.builder.backends[0]
    server.file.write_text(TEXT.replace("model: tiny", "model: tiny\n    fallbacks: [b]") + "  - model: b\n")
    assert (await server.client.post("/v1/config/reload")).status_code == 200
    assert (await server.client.post("/v1/chat/completions", json={**CHAT, "model": "b"})).status_code == 200
    assert server.fleet.models["tiny"].fallbacks == ("b",)
    assert tiny.is_ready
    assert len(server.builder.backends) == 2
    server.file.write_text(TEXT)
    assert (await server.client.post("/v1/config/reload")).status_code == 200
    assert (await server.client.post("/v1/chat/completions", json={**CHAT, "model": "b"})).status_code == 404
    server.file.write_text(TEXT + "engine: {max_num_seqs: 3}\n")
    assert (await server.client.post("/v1/config/reload")).status_code == 200
    assert not tiny.is_ready
    assert (await server.client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_history_and_rollback(server: ConfiguredServer, file: Path) -> None:
    for value in (6, 7):
        await server.client.patch("/v1/config/gateway.max_choices", json={"value": value, "reason": f"to {value}"})
    versions = (await server.client.get("/v1/config/history")).json()["data"]
    assert [(version["number"], version["reason"], version["author"]) for version in versions] == [
        (3, "to 7", "anybody"),
        (2, "to 6", "anybody"),
        (1, "start", "test"),
    ]
    assert len((await server.client.get("/v1/config/history", params={"limit": 1})).json()["data"]) == 1
    outcome = (await server.client.post("/v1/config/rollback", json={"version": 1, "reason": "no"})).json()
    assert outcome["changes"] == [{"key": "gateway.max_choices", "before": 7, "after": 5}]
    assert server.file.read_bytes() == TEXT.encode()


async def test_no_answer_shows_a_secret(file: Path, text_model: TextModel) -> None:
    write(file, TEXT + "vllm: {url: 'http://a:1', api_key: 'env:SOME_KEY'}\n")
    async with configured_server(file, text_model) as server:
        await server.client.patch("/v1/config/gateway.max_choices", json={"value": 6})
        for path in ("", "/vllm", "/vllm.api_key", "/history"):
            text = (await server.client.get(f"/v1/config{path}")).text
            assert "s3cr3t" not in text
            assert "env:SOME_KEY" in text or path == "/history"
        stolen = await server.client.patch("/v1/config/vllm.api_key", json={"value": "file:/etc/shadow"})
        assert error_of(stolen) == (422, "invalid_configuration")


async def test_a_client_that_leaves_leaves_no_half(server: ConfiguredServer, file: Path) -> None:
    server.file.write_text(TEXT.replace("5", "8"))
    task = asyncio.create_task(server.client.post("/v1/config/reload"))
    while not server.manager._changing.locked():  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(10):
        while (await server.client.get("/v1/config")).json()["version"] != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert server.manager.running.gateway.max_choices == 8
