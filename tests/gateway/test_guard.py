"""What stands before every route: who asks, how much they may, what is logged and counted, and in which order."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import structlog
from structlog.testing import capture_logs

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.current import Current
from localmoe.core.errors import IssuerUnavailableError, StorageError
from localmoe.core.events import EventBus, HttpAnswered
from localmoe.core.identity import Principal, RateLimits, Role
from localmoe.core.keys import KeyRecord
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.authenticator import Authenticator
from localmoe.gateway.identity.open import OpenToAll
from localmoe.gateway.identity.principal import set_principal
from localmoe.gateway.limits.config import LimitsConfig
from localmoe.gateway.limits.limiter import Limiter
from localmoe.gateway.middleware.cors_config import CorsConfig
from localmoe.gateway.middleware.security import SecurityMiddleware
from localmoe.gateway.middleware.stack import Guard
from localmoe.text.text_model import TextModel
from support.identity import MemoryKeyStore, bearer
from support.tiny_text import encode, gateway_app, served_model

CHAT = "/v1/chat/completions"
PAGE = {"origin": "https://chat.example"}
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Site:
    """A gateway that asks everybody, and what it says of itself."""

    def __init__(self, client: httpx2.AsyncClient, store: MemoryKeyStore, app: Any, limiter: Limiter) -> None:
        self.client = client
        self.store = store
        self.app = app
        self.limiter = limiter
        self.answered: list[HttpAnswered] = []
        self.lines: list[dict[str, Any]] = []


@pytest.fixture
def site(text_model: TextModel):
    @asynccontextmanager
    async def make(
        backend: ScriptedBackend | None = None, *, store: MemoryKeyStore | None = None, **config: Any
    ) -> AsyncIterator[Site]:
        backend = backend or ScriptedBackend(encode(text_model, "hello fox"))
        await backend.start()
        store = store or MemoryKeyStore()
        config = {
            "limits": LimitsConfig(requests_per_minute=0),
            "cors": CorsConfig(origins=(PAGE["origin"],)),
            **config,
        }
        settings = GatewayConfig(**config)
        limiter = Limiter(Current(settings))
        bus = EventBus()
        guard = Guard(identity=Authenticator(store, None), limiter=limiter, log=structlog.get_logger())
        models = (served_model(text_model, backend), served_model(text_model, backend, model_id="other"))
        app = gateway_app(*models, config=settings, bus=bus, guard=guard)
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        with capture_logs() as lines:
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                made = Site(client, store, app, limiter)
                made.lines = lines
                bus.subscribe(
                    lambda event: made.answered.append(event) if isinstance(event, HttpAnswered) else None
                )
                yield made

    return make


async def test_a_refusal_is_logged_counted_readable_and_secured(site) -> None:
    async with site(limits=LimitsConfig(requests_per_minute=1)) as one:
        user, viewer = bearer(one.store.make(Role.USER)), bearer(one.store.make(Role.VIEWER))
        answers = [
            await one.client.post(CHAT, json=BODY, headers=PAGE),
            await one.client.post(CHAT, json=BODY, headers={**PAGE, **viewer}),
            await one.client.post(CHAT, json=BODY, headers={**PAGE, **user}),
            await one.client.post(CHAT, json=BODY, headers={**PAGE, **user}),
            await one.client.post(CHAT, json={**BODY, "n": 0}, headers={**PAGE, **bearer(one.store.make())}),
        ]
        statuses = [401, 403, 200, 429, 400]
        assert [answer.status_code for answer in answers] == statuses
        assert [event.status for event in one.answered] == statuses
        assert [line["status"] for line in one.lines] == statuses
        assert {event.route for event in one.answered} == {CHAT}
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
            assert answer.headers["x-request-id"]
            for name, value in SECURITY_HEADERS.items():
                assert answer.headers[name] == value
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_preflight_is_answered_before_anybody_is_asked(site) -> None:
    async with site() as one:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        answer = await one.client.options(CHAT, headers={**PAGE, **asked})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization"
        assert "access-control-allow-credentials" not in answer.headers
        evil = await one.client.options(CHAT, headers={"origin": "https://evil.example", **asked})
        assert evil.status_code == 400
        assert "access-control-allow-origin" not in evil.headers


async def test_pages_are_not_let_in_unless_named(site) -> None:
    async with site(cors=CorsConfig()) as one:
        headers = {**PAGE, **bearer(one.store.make())}
        assert (
            "access-control-allow-origin" not in (await one.client.post(CHAT, json=BODY, headers=headers)).headers
        )
        asked = {"access-control-request-method": "POST"}
        assert (await one.client.options(CHAT, headers={**PAGE, **asked})).status_code == 401


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"origins": ("*",), "credentials": True}, "credentials is true for all origins"),
        ({"origins": ("chat.example",)}, "must be like https://"),
        ({"origins": ("https://chat.example/",)}, "must be like https://"),
        ({"origins": ("https://Chat.example",)}, "must be like https://"),
        ({"origins": ("null",)}, "must be like https://"),
        ({"origins": ("https://*.example:x",)}, "must be like https://"),
    ],
)
def test_origins_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CorsConfig(**config)


async def test_the_log_has_what_is_needed_and_nothing_of_what_was_said(site) -> None:
    async with site() as one:
        key = one.store.make()
        private = {
            **BODY,
            "messages": [{"role": "user", "content": "a private matter"}],
            "user": "someone-private",
        }
        answer = await one.client.post(f"{CHAT}?private=query", json=private, headers=bearer(key))
        (line,) = one.lines
        assert {name: value for name, value in line.items() if name not in ("duration_ms",)} == {
            "event": "request",
            "log_level": "info",
            "id": answer.headers["x-request-id"],
            "principal": next(iter(one.store.records)),
            "client": "127.0.0.1",
            "method": "POST",
            "route": CHAT,
            "status": 200,
            "bytes": len(answer.content),
            "model": "tiny",
            "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
            "completion_tokens": answer.json()["usage"]["completion_tokens"],
        }
        assert 0 < line["duration_ms"] < 5000
        for text in ("private", key, key[20:], "hello fox"):
            assert text not in json.dumps(line)


async def test_several_choices_and_streams_are_logged_with_their_tokens(site) -> None:
    async with site() as one:
        headers = bearer(one.store.make())
        whole = (await one.client.post(CHAT, json={**BODY, "n": 3}, headers=headers)).json()["usage"]
        await one.client.post(CHAT, json={**BODY, "stream": True}, headers=headers)
        first, second = one.lines
        assert first["completion_tokens"] == whole["completion_tokens"] == 3 * second["completion_tokens"]
        assert first["prompt_tokens"] == whole["prompt_tokens"] == second["prompt_tokens"]
        assert second["bytes"] > 300


async def test_paths_that_there_are_not_are_cut_and_counted_as_one(site) -> None:
    async with site() as one:
        admin = bearer(one.store.make(Role.ADMIN))
        for path in ("/a", "/b/" + "x" * 1000, "/%0D%0Aforged: line"):
            await one.client.get(path, headers=admin)
        await one.client.request("BREW", "/v1/models", headers=admin)
        assert {(event.method, event.route) for event in one.answered} == {("GET", "other"), ("other", "other")}
        assert [len(line["path"]) <= 200 for line in one.lines] == [True] * 4
        assert all("\n" not in json.dumps(line) for line in one.lines)


async def test_crashes_are_logged_counted_and_readable(site, caplog: pytest.LogCaptureFixture) -> None:
    class Crashing(MemoryKeyStore):
        async def find(self, digest: bytes) -> KeyRecord | None:
            raise ZeroDivisionError("a secret of the house")

    async with site(store=Crashing()) as one:
        answer = await one.client.post(CHAT, json=BODY, headers={**PAGE, **bearer(one.store.make())})
        assert answer.status_code == 500
        assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
        assert "secret" not in answer.text
        assert [event.status for event in one.answered] == [line["status"] for line in one.lines] == [500]


async def test_without_the_store_nobody_gets_in(site) -> None:
    class Away(MemoryKeyStore):
        async def find(self, digest: bytes) -> KeyRecord | None:
            raise StorageError("the database is away")

    async with site(store=Away()) as one:
        answer = await one.client.post(CHAT, json=BODY, headers=bearer(one.store.make(Role.ADMIN)))
        assert answer.status_code == 503
        assert "the database is away" in answer.text
        assert (await one.client.get("/health/live")).status_code == 200


async def test_while_tokens_cannot_be_verified_they_may_be_good(text_model: TextModel) -> None:
    class Away:
        async def identify(self, headers: object) -> Principal:
            raise IssuerUnavailableError("the issuer is away")

    app = gateway_app(served_model(text_model, ScriptedBackend([5])), guard=Guard(identity=Away()))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        answer = await client.post(CHAT, json=BODY)
    assert answer.status_code == 503  # of a 401, clients throw their tokens away
    assert answer.json()["error"]["code"] == "issuer_unavailable"
    assert int(answer.headers["retry-after"]) > 0


async def test_a_request_that_nobody_has_named_reaches_nothing() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("reached the app")

    with pytest.raises(AssertionError, match="RequestIdMiddleware"):
        await SecurityMiddleware(app, identity=OpenToAll())({"type": "http"}, app, app)  # type: ignore[arg-type]


async def test_streams_are_not_held_back(site) -> None:
    """Every piece is on its way before the next one is made."""
    go_on = asyncio.Event()

    class Waiting(ScriptedBackend):
        async def generate(self, request: Any) -> AsyncIterator[Any]:
            async for chunk in super().generate(request):
                yield chunk
                await go_on.wait()

    async with site(Waiting([60, 61, 62])) as one:
        sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        body = json.dumps({**BODY, "stream": True}).encode()
        headers = [(b"content-type", b"application/json"), (b"x-api-key", one.store.make().encode())]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return incoming.pop() if incoming else await asyncio.Event().wait()  # type: ignore[return-value]

        task = asyncio.create_task(one.app(scope, receive, sent.put))
        async with asyncio.timeout(5):
            assert (await sent.get())["status"] == 200
            assert b'"role":"assistant"' in (await sent.get())["body"]
            go_on.set()
            await task
        assert one.lines[0]["status"] == 200


async def test_limits_are_told_with_every_answer(site) -> None:
    limits = LimitsConfig(requests_per_minute=10, tokens_per_minute=1000)
    async with site(limits=limits) as one:
        headers = bearer(one.store.make())
        answer = await one.client.post(CHAT, json=BODY, headers=headers)
        prompt_tokens = answer.json()["usage"]["prompt_tokens"]
        assert answer.headers["x-ratelimit-limit-requests"] == "10"
        assert answer.headers["x-ratelimit-remaining-requests"] == "9"
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 1000 - prompt_tokens
        assert 60 <= int(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 120
        await one.limiter.drain()
        again = await one.client.post(CHAT, json=BODY, headers=headers)
        usage = answer.json()["usage"]["total_tokens"]
        assert int(again.headers["x-ratelimit-remaining-tokens"]) <= 1000 - usage - prompt_tokens
        models = await one.client.get("/v1/models", headers=headers)
        assert not [name for name in models.headers if name.startswith("x-ratelimit")]
        assert not [name for name in again.headers if name.startswith("anthropic")]


async def test_limits_in_the_words_of_anthropic(site) -> None:
    async with site(limits=LimitsConfig(requests_per_minute=1, tokens_per_minute=1000)) as one:
        headers = {"x-api-key": one.store.make(), "anthropic-version": "2023-06-01"}
        message = {**BODY, "max_tokens": 5}
        answer = await one.client.post("/v1/messages", json=message, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert answer.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        assert answer.headers["anthropic-ratelimit-tokens-limit"] == "1000"
        refused = await one.client.post("/v1/messages", json=message, headers=headers)
        assert refused.status_code == 429
        assert refused.json()["type"] == "error"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        unknown = await one.client.post("/v1/messages", json=message, headers={"x-api-key": "sk-ant-1"})
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (401, "authentication_error")


async def test_too_many_requests_and_tokens(site) -> None:
    async with site(limits=LimitsConfig(requests_per_minute=2, tokens_per_minute=60)) as one:
        headers = bearer(one.store.make())
        for _ in range(2):
            assert (await one.client.post(CHAT, json=BODY, headers=headers)).status_code == 200
        refused = await one.client.post(CHAT, json=BODY, headers=headers)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "requests"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 0 < int(refused.headers["retry-after"]) <= 120
        assert 0 < int(refused.headers["retry-after-ms"]) <= 120_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-should-retry" not in refused.headers
        unlimited = bearer(one.store.make(limits=RateLimits(requests_per_minute=0)))
        statuses = []
        for stream in (False, True, False, True, False, True):
            answer = await one.client.post(CHAT, json={**BODY, "stream": stream}, headers=unlimited)
            statuses.append(answer.status_code)
            await one.limiter.drain()
        assert statuses[0] == 200
        assert statuses[-2:] == [429, 429]  # before the stream has begun, as a status
        assert answer.json()["error"]["type"] == "tokens"


async def test_what_never_fits_is_not_to_be_tried_again(site) -> None:
    async with site(limits=LimitsConfig(requests_per_minute=10, tokens_per_minute=2)) as one:
        refused = await one.client.post(CHAT, json=BODY, headers=bearer(one.store.make()))
        assert refused.status_code == 429
        assert "never fits" in refused.text
        assert "retry-after" not in refused.headers
        assert refused.headers["x-should-retry"] == "false"


async def test_requests_at_a_time(site) -> None:
    backend = ScriptedBackend([60] * 100, delay_s=0.01)
    async with site(backend, limits=LimitsConfig(requests_per_minute=0, concurrent_requests=2)) as one:
        headers = bearer(one.store.make())
        answers = await asyncio.gather(
            *(one.client.post(CHAT, json={**BODY, "stream": n % 2 == 0}, headers=headers) for n in range(6))
        )
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 4
        assert {a.json()["error"]["type"] for a in answers if a.status_code == 429} == {"concurrent_requests"}
        assert (await one.client.post(CHAT, json=BODY, headers=headers)).status_code == 200


async def test_what_is_made_in_the_background_is_being_answered(site) -> None:
    backend = ScriptedBackend([60] * 20, delay_s=0.01)
    async with site(backend, limits=LimitsConfig(requests_per_minute=0, concurrent_requests=1)) as one:
        headers = bearer(one.store.make())
        body = {"model": "tiny", "input": "hello", "background": True}
        made = await one.client.post("/v1/responses", json=body, headers=headers)
        assert made.status_code == 200, made.text
        assert (await one.client.post("/v1/responses", json=body, headers=headers)).status_code == 429
        async with asyncio.timeout(20):
            while (await one.client.post("/v1/responses", json=body, headers=headers)).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_requests_of_our_own_need_no_key_and_have_their_owners_rights(site) -> None:
    async with site(limits=LimitsConfig(requests_per_minute=1, tokens_per_minute=1000)) as one:
        one.store.make(Role.USER)
        (record,) = one.store.records.values()

        async def post(path: str) -> int:
            scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": None}
            scope["headers"] = [(b"content-type", b"application/json")]
            set_principal(scope, record.principal)
            incoming = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
            sent: list[dict[str, Any]] = []

            async def receive() -> dict[str, Any]:
                return incoming.pop() if incoming else await asyncio.Event().wait()  # type: ignore[return-value]

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            await one.app(scope, receive, send)
            status: int = sent[0]["status"]
            return status

        assert [await post(CHAT) for _ in range(3)] == [200] * 3  # not counted as requests
        assert await post("/v1/models/load") == 403
        assert {line["principal"] for line in one.lines} == {record.id}
        await one.limiter.drain()
        headers = await one.limiter.headers(record.principal)
        assert headers["x-ratelimit-remaining-requests"] == "1"
        assert int(headers["x-ratelimit-remaining-tokens"]) < 1000


async def test_a_key_for_some_models_sees_no_others(site) -> None:
    async with site() as one:
        narrow, wide = bearer(one.store.make(models=("tiny",))), bearer(one.store.make())
        for headers, names in ((narrow, ["tiny"]), (wide, ["tiny", "other"])):
            listed = (await one.client.get("/v1/models", headers=headers)).json()["data"]
            assert [model["id"] for model in listed] == names
        for path, more in ((CHAT, {}), ("/v1/tokenize", {})):
            body = {**BODY, **more, "model": "other"}
            refused = await one.client.post(path, json=body, headers=narrow)
            assert refused.status_code == 404
            assert refused.json()["error"]["message"].endswith("served models: tiny")
            assert (await one.client.post(path, json=body, headers=wide)).status_code == 200
        assert (await one.client.get("/v1/models/other", headers=narrow)).status_code == 404


async def test_a_websocket_is_not_let_in(site) -> None:
    async with site() as one:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b""}
        await one.app(scope, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_heads_are_bounded(site) -> None:
    async with site() as one:
        headers = bearer(one.store.make())
        many = {f"x-{n}": "1" for n in range(101)}
        for answer in (
            await one.client.get("/v1/models", headers={**headers, **many}),
            await one.client.get("/v1/models", headers={**headers, "x-long": "a" * 33_000}),
            await one.client.get("/v1/models?" + "a" * 33_000, headers=headers),
        ):
            assert answer.status_code == 431
            assert answer.json()["error"]["code"] == "headers_too_large"
        assert [line["status"] for line in one.lines] == [431] * 3
        fits = {f"x-{n}": "1" for n in range(80)}
        assert (await one.client.get("/v1/models", headers={**headers, **fits})).status_code == 200


async def test_a_body_is_not_read_before_it_is_known_whose_it_is(site) -> None:
    async with site() as one:

        async def receive() -> dict[str, Any]:
            raise AssertionError("read the body")

        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": []}
        await one.app(scope, receive, send)
        assert sent[0]["status"] == 401


async def test_answers_of_the_route_keep_their_own_cache_control(site) -> None:
    async with site() as one:
        stream = await one.client.post(CHAT, json={**BODY, "stream": True}, headers=bearer(one.store.make()))
        assert stream.headers["cache-control"] == "no-cache"
        assert stream.headers["x-content-type-options"] == "nosniff"
