"""The HTTP around the APIs: routes, bodies, ids, limits."""

import asyncio
import json
import re
from typing import Any

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.current import Current
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.middleware.body_limit import BodyLimitMiddleware
from localmoe.gateway.middleware.crash import CrashMiddleware
from localmoe.gateway.middleware.request_id import RequestIdMiddleware
from localmoe.text.text_model import TextModel
from support.tiny_text import scripted_app

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GOOD = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'


async def test_models(serve) -> None:
    async with serve(ScriptedBackend([5])) as client:
        card = {
            "id": "tiny",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "localmoe",
            "max_model_len": 256,
            "root": "tiny",
            "parent": None,
        }
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [card]}
        assert (await client.get("/v1/models/tiny")).json() == card
        missing = await client.get("/v1/models/org/name")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_health_follows_the_engines(serve, text_model: TextModel) -> None:
    backend = ScriptedBackend([5])
    async with serve(backend) as client:
        assert (await client.get("/health/live")).json() == {"status": "live"}
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        await backend.stop()
        assert (await client.get("/health/live")).status_code == 200
        waiting = await client.get("/health/ready")
    assert waiting.status_code == 503
    assert waiting.headers["retry-after"] == "1"
    assert waiting.json()["error"]["message"] == "not ready: tiny"


async def test_tokenize_and_back(serve, text_model: TextModel) -> None:
    ids = text_model.tokenizer.encode("hello 世", add_special_tokens=False)
    async with serve(ScriptedBackend([5])) as client:
        answer = (await client.post("/v1/tokenize", json={"model": "tiny", "prompt": "hello 世"})).json()
        assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids}
        messages = [{"role": "user", "content": "hi"}]
        chat = (await client.post("/v1/tokenize", json={"model": "tiny", "messages": messages})).json()
        back = await client.post("/v1/detokenize", json={"model": "tiny", "tokens": chat["tokens"]})
        empty = await client.post("/v1/tokenize", json={"model": "tiny", "prompt": ""})
    assert back.json() == {
        "prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    }
    assert empty.json()["tokens"] == []


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/", 404, "no such route: GET /"),
        ("POST", "/v1/nothing", 404, "no such route: POST /v1/nothing"),
        ("GET", "/v1/chat/completions/", 404, "no such route"),
        ("POST", "/V1/completions", 404, "no such route"),
        ("GET", CHAT, 405, "GET is not allowed for /v1/chat/completions; allowed: POST"),
        ("DELETE", "/v1/models", 405, "allowed: GET"),
        ("PUT", "/health/live", 405, "allowed: GET"),
        ("BREW", CHAT, 405, "BREW is not allowed"),
    ],
)
async def test_unknown_routes_and_methods(serve, method: str, path: str, status: int, words: str) -> None:
    async with serve(ScriptedBackend([5])) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", JSON, 400, "the body is missing"),
        (b"{", JSON, 400, "not valid JSON"),
        (b'{"model": }', JSON, 400, "Expecting value at 10"),
        (GOOD + b"x", JSON, 400, "not valid JSON: Extra data"),
        (b"null", JSON, 400, "must be a JSON object"),
        (b"\xff\xff", JSON, 400, "not valid UTF-8"),
        (b'{"model":"\xff"}', JSON, 400, "not valid UTF-8"),
        (b"[" * 200_000, JSON, 400, "nested too deeply"),
        (b'{"a":' * 200_000, JSON, 400, "nested too deeply"),
        (b'{"n":' + b"9" * 5000 + b"}", JSON, 400, "error parsing the body"),
        (GOOD, {}, 415, "content-type must be application/json, not ''"),
        (GOOD, {"content-type": "text/plain"}, 415, "not 'text/plain'"),
        (GOOD, {"content-type": "application/x-www-form-urlencoded"}, 415, "must be application/json"),
        (GOOD, {"content-type": "multipart/form-data; boundary=x"}, 415, "must be application/json"),
        (b" " * 5000, JSON, 413, "larger than the 4096 bytes allowed"),
    ],
)
async def test_bodies(serve, content: bytes, headers: dict[str, str], status: int, words: str) -> None:
    bound = 4096 if status == 413 else 2**24
    async with serve(ScriptedBackend([5]), config=GatewayConfig(max_body_bytes=bound)) as client:
        response = await client.post(CHAT, content=content, headers=headers)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_content_types_that_are_json(serve, content_type: str) -> None:
    async with serve(ScriptedBackend([5])) as client:
        response = await client.post(CHAT, content=GOOD, headers={"content-type": content_type})
    assert response.status_code == 200


async def test_a_nested_field_without_effect_is_no_trouble(serve) -> None:
    nested = b'{"a":' * 200 + b"1" + b"}" * 200
    async with serve(ScriptedBackend([5])) as client:
        content = GOOD[:-1] + b',"metadata":' + nested + b"}"
        response = await client.post(CHAT, content=content, headers=JSON)
    assert response.status_code == 200


async def test_a_chunked_body_is_cut_off_at_the_bound(serve) -> None:
    taken = 0

    async def chunks():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield b" " * 1000

    async with serve(ScriptedBackend([5]), config=GatewayConfig(max_body_bytes=4096)) as client:
        response = await client.post(CHAT, content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert taken == 5


@pytest.mark.parametrize("dribbles", [False, True])
async def test_a_body_that_does_not_come_is_given_up(text_model: TextModel, dribbles: bool) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01 if dribbles else 30)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = scripted_app(text_model, ScriptedBackend([5]), config=GatewayConfig(body_timeout_s=0.1))
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": []}
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"] == {
        "message": "the body did not come whole within 0.1 s",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_timeout",
    }


@pytest.mark.parametrize("declared", ["-5", "x", "٤", "9" * 30])
async def test_a_senseless_content_length_is_refused(declared: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the app")

    async def receive() -> dict[str, Any]:
        raise AssertionError("read the body")

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": [(b"content-length", declared.encode("utf-8"))]}
    await BodyLimitMiddleware(app, config=Current(GatewayConfig(max_body_bytes=4096)))(scope, receive, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("a b", False),
        ("\x01", False),
        ("é", False),
        ("", False),
    ],
)
async def test_request_ids(serve, given: str, kept: bool) -> None:
    async with serve(ScriptedBackend([5])) as client:
        for path in ("/v1/models", "/nothing"):
            response = await client.get(path, headers=[(b"x-request-id", given.encode("latin-1"))])
            assert (response.headers["x-request-id"] == given) == kept
            assert len(response.headers["x-request-id"]) >= 8 or kept
        first, second = [(await client.get("/v1/models")).headers["x-request-id"] for _ in range(2)]
    assert first != second


async def test_a_path_in_the_host_header_changes_nothing(serve) -> None:
    async with serve(ScriptedBackend([5])) as client:
        response = await client.get("/nothing", headers={"host": "test/v1/models?"})
        assert response.status_code == 404
        response = await client.get("/v1/models", headers={"host": "evil.example/health/live"})
    assert response.json()["object"] == "list"


async def test_a_crash_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("a secret of the house")

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await RequestIdMiddleware(CrashMiddleware(crash))(scope, receive, send)
    assert sent[0]["status"] == 500
    assert dict(sent[0]["headers"])[b"x-request-id"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
    assert b"secret" not in sent[1]["body"]
    assert "a secret of the house" in caplog.text


async def test_metrics_are_served(serve) -> None:
    async with serve(ScriptedBackend([5])) as client:
        await client.post(CHAT, content=GOOD, headers=JSON)
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in response.text


def test_the_configuration_refuses_senseless_values() -> None:
    for name in ("max_body_bytes", "keepalive_s", "max_choices", "max_logprobs", "body_timeout_s"):
        with pytest.raises(ValueError, match="must be positive"):
            GatewayConfig(**{name: 0})


def test_the_documentation_shows_the_real_fields(text_model: TextModel) -> None:
    document = scripted_app(text_model, ScriptedBackend([5])).openapi()
    schemas = document["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert {"messages", "temperature", "top_k", "stop", "logit_bias", "user"} <= set(chat["properties"])
    assert chat["properties"]["user"] == {"description": "Accepted without effect."}
    assert chat["additionalProperties"] is False
    assert chat["required"] == ["model", "messages"]
    assert chat["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 64}
    for name in ("ChatCompletionRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert schemas[name]["examples"]
    for path in (CHAT, "/v1/completions", "/v1/tokenize", "/v1/detokenize"):
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(
            "/ErrorResponse"
        )
        assert "422" not in operation["responses"]
    stream = document["paths"][CHAT]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert stream["schema"]["$ref"] == "#/components/schemas/ChatCompletionChunk"
    # No reference leads nowhere.
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)):
        assert name in schemas
