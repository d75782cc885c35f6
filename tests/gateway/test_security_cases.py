"""What went wrong in other servers, each as a test of this one. docs/security.md says which tests are whose."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.identity import Role
from localmoe.core.request import Request, TokenChunk
from localmoe.core.serving import ModelSpec
from localmoe.gateway.cache.scoped import ScopedGenerator
from localmoe.gateway.identity import keys as keys_module
from localmoe.gateway.identity.authenticator import Authenticator
from localmoe.gateway.identity.config import TokenConfig
from localmoe.gateway.identity.keys import make_key
from localmoe.gateway.identity.open import OpenToOwnPages
from localmoe.gateway.identity.tokens import TokenVerifier
from localmoe.gateway.middleware.stack import Guard
from localmoe.state.config import StateConfig
from localmoe.state.database import Database
from localmoe.state.keys import SqlKeyStore
from localmoe.text.text_model import TextModel
from support.held_up import longest_gap_s, longest_gap_share
from support.identity import MemoryKeyStore, bearer
from support.models import greedy
from support.tiny_text import scripted_app, write_tiny_text_model

SECRET = "s" * 32
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SQL = (
    "' OR '1'='1",
    "'; DROP TABLE api_keys; --",
    '" OR ""="',
    "lm-abcdefghjk-' UNION SELECT * FROM api_keys --",
    "%",
    "_",
    "\\",
    "\x00",
    "lm-%-%",
    "' OR digest LIKE '%",
)


@pytest.fixture
def store() -> MemoryKeyStore:
    return MemoryKeyStore()


@pytest.fixture
def app(text_model: TextModel, store: MemoryKeyStore) -> FastAPI:
    authenticator = Authenticator(store, TokenVerifier(TokenConfig(secret=SECRET), None))
    return scripted_app(text_model, ScriptedBackend([5]), guard=Guard(identity=authenticator))


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        yield client


async def status(app: FastAPI, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> int:
    """Of a request as it comes off the wire, whatever a client library would make of it."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": headers,
        "root_path": "",
    }
    await app({**scope, "raw_path": path.encode(), "scheme": "http", "server": ("test", 80)}, receive, send)
    result: int = sent[0]["status"]
    return result


class TestHostHeader:
    """vLLM CVE-2026-48746, Starlette CVE-2026-48710: a path in `Host` changed which route was authorised."""

    HOSTS = (
        b"test/health/live",
        b"test/health/live?",
        b"test/health/live#",
        b"test:80/health/live",
        b"@/health/live",
        b"",
        b"a b",
        b"[::1]/health/live",
        b"test\\health\\live",
    )

    @pytest.mark.parametrize("host", HOSTS)
    async def test_it_opens_no_route(self, app: FastAPI, store: MemoryKeyStore, host: bytes) -> None:
        for name in (b"host", b"x-forwarded-host", b"x-forwarded-prefix", b"x-original-url", b"x-rewrite-url"):
            headers = [(name, host if name != b"x-original-url" else b"/health/live")]
            assert await status(app, "GET", "/metrics", headers) == 401
            assert await status(app, "POST", "/v1/models/load", headers) == 401
            viewer = (b"x-api-key", store.make(Role.VIEWER).encode())
            assert await status(app, "POST", "/v1/models/load", [*headers, viewer]) == 403

    @pytest.mark.parametrize("host", HOSTS)
    async def test_nor_does_it_close_one(self, app: FastAPI, host: bytes) -> None:
        assert (
            await status(app, "GET", "/health/live", [(b"host", host.replace(b"health/live", b"metrics"))]) == 200
        )

    async def test_nor_does_a_path_that_only_looks_like_another(self, app: FastAPI, store: MemoryKeyStore) -> None:
        for path in (
            "/health/live/../../metrics",
            "/health/live/",
            "//health/live",
            "/health/live?",
            "/health/live#",
            "/health/live;x",
            "/health/live\x00",
            "/Health/Live",
            "http://test/health/live",
            "",
        ):
            assert await status(app, "GET", path, []) == 401


class TestPagesOfOthers:
    """DNS rebinding: a page's own name comes to lead to a server on this machine, which asks nobody for a key. And a
    page may send some requests to any server as it is."""

    @pytest.fixture
    def open_app(self, text_model: TextModel) -> FastAPI:
        identity = OpenToOwnPages(hosts=(), origins=("https://chat.example",))
        return scripted_app(text_model, ScriptedBackend([5]), guard=Guard(identity=identity))

    async def test_a_page_whose_name_leads_here_reaches_nothing(self, open_app: FastAPI) -> None:
        page = [(b"host", b"evil.example:8000"), (b"origin", b"http://evil.example:8000")]
        for headers in (page, page[:1]):
            for method, path in REACHED:
                assert await status(open_app, method, path, headers) == 403

    async def test_nor_does_a_page_that_asks_without_asking_first(self, open_app: FastAPI) -> None:
        for origin in (b"https://evil.example", b"http://localhost:3000", b"null"):
            for kind in (b"text/plain", b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded"):
                headers = [(b"host", b"localhost:8000"), (b"origin", origin), (b"content-type", kind)]
                for method, path in REACHED:
                    assert await status(open_app, method, path, headers) == 403

    async def test_programs_and_own_pages_do(self, open_app: FastAPI) -> None:
        for host in (b"localhost:8000", b"127.0.0.1:8000", b"[::1]:8000"):
            for origin in (None, b"http://" + host, b"https://chat.example", b"vscode-webview://x"):
                headers = [(b"host", host)] if origin is None else [(b"host", host), (b"origin", origin)]
                for method, path in REACHED:
                    assert await status(open_app, method, path, headers) not in (401, 403)


REACHED = (
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
    ("POST", CHAT),
    ("POST", "/v1/models/load"),
    ("POST", "/v1/responses/resp_1/cancel"),
    ("DELETE", "/v1/responses/resp_1"),
)


class TestSqlInCredentials:
    """LiteLLM CVE-2026-42208: SQL metacharacters in credentials, on error paths too."""

    @pytest.fixture
    async def sql_app(self, text_model: TextModel, tmp_path: Path) -> AsyncIterator[FastAPI]:
        database = Database(StateConfig(), default_path=tmp_path / "state.db")
        self.keys = SqlKeyStore(database)
        authenticator = Authenticator(self.keys, TokenVerifier(TokenConfig(secret=SECRET), None))
        yield scripted_app(text_model, ScriptedBackend([5]), guard=Guard(identity=authenticator))
        await authenticator.aclose()  # when keys were last used is written now and then
        await database.close()

    async def test_they_are_text(self, sql_app: FastAPI) -> None:
        key, record = make_key(name=SQL[1], role=Role.USER, now_s=time.time())
        await self.keys.add(record)
        for text in SQL:
            for headers in (
                [(b"authorization", b"Bearer " + text.encode())],
                [(b"x-api-key", text.encode())],
                [(b"x-api-key", (key[:-1] + text).encode())],
                [(b"x-api-key", key.encode() + text.encode())],
                [(b"x-api-key", text.encode()), (b"authorization", b"Bearer " + key.encode())],
            ):
                assert await status(sql_app, "GET", "/v1/models", headers) == 401, (text, headers)
            token = jwt.encode({"sub": text.strip("\x00") or "a", "exp": 2**33, "role": text}, SECRET, "HS256")
            assert await status(sql_app, "GET", "/v1/models", [(b"x-api-key", token.encode())]) == 403
            assert await self.keys.revoke(text, at_s=0.0) is False
            assert await self.keys.find(text.encode()) is None
            await self.keys.touch({text: 1.0})
        assert await status(sql_app, "GET", "/v1/models", [(b"x-api-key", key.encode())]) == 200
        assert [one.name for one in await self.keys.all()] == [SQL[1]]

    async def test_while_the_database_is_broken_too(self, sql_app: FastAPI, tmp_path: Path) -> None:
        (tmp_path / "state.db").write_bytes(b"no database" * 1000)
        key, _ = make_key(name="a", role=Role.USER, now_s=time.time())
        assert await status(sql_app, "GET", "/v1/models", [(b"x-api-key", key.encode())]) == 503
        for text in SQL:
            assert await status(sql_app, "GET", "/v1/models", [(b"x-api-key", text.encode())]) == 401


class TestAdminFields:
    """LiteLLM CVE-2026-42271: a field that an admin may set became a command line."""

    @pytest.mark.parametrize("field", ["model", "name", "weights", "engines", "replace"])
    async def test_they_are_data(self, app: FastAPI, store: MemoryKeyStore, field: str) -> None:
        admin = bearer(store.make(Role.ADMIN))
        async with client_of(app) as client:
            for text in ("; touch /tmp/x", "$(id)", "`id`", "-o/etc/passwd", "--help", "../../etc/passwd", "a\nb"):
                body: dict[str, Any] = {"model": "tiny", field: [text] if field == "engines" else text}
                answer = await client.post("/v1/models/switch", json=body, headers=admin)
                assert answer.status_code in (400, 404), answer.text

    def test_what_is_handed_on_has_no_field_for_a_command(self) -> None:
        fields = set(ModelSpec.__dataclass_fields__)
        assert fields >= {"model", "engines"}
        assert not fields & {"command", "args", "env", "executable", "path"}


class TestTokenCache:
    """LiteLLM CVE-2026-35030: two tokens with a common beginning shared a cache entry."""

    async def test_tokens_with_a_common_beginning_are_two(self, app: FastAPI) -> None:
        claims = {"exp": 2**33, "padding": "x" * 2000}
        viewer = jwt.encode({**claims, "sub": "v", "role": "viewer"}, SECRET, "HS256")
        admin = jwt.encode({**claims, "sub": "a", "role": "admin"}, SECRET, "HS256")
        assert viewer[:2000] == admin[:2000]
        for _ in range(3):
            for token, expected in ((admin, 404), (viewer, 403)):
                headers = [(b"authorization", b"Bearer " + token.encode())]
                assert await status(app, "GET", "/nothing", headers) == expected


class TestStoredKeys:
    """vLLM CVE-2025-59425: keys were compared byte by byte."""

    async def test_the_store_is_asked_for_digests_only(self, app: FastAPI, store: MemoryKeyStore) -> None:
        asked: list[bytes] = []
        find = store.find

        async def note(digest: bytes) -> Any:
            asked.append(digest)
            return await find(digest)

        store.find = note  # type: ignore[method-assign]
        key = store.make()
        assert await status(app, "GET", "/v1/models", [(b"x-api-key", key.encode())]) == 200
        assert asked == [hashlib.sha256(key.encode()).digest()]

    async def test_what_it_finds_is_compared_in_constant_time(
        self, app: FastAPI, store: MemoryKeyStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared = []

        class Hmac:
            @staticmethod
            def compare_digest(one: bytes, other: bytes) -> bool:
                compared.append((one, other))
                return hmac.compare_digest(one, other)

        monkeypatch.setattr(keys_module, "hmac", Hmac)
        key, other = store.make(), store.make()
        record = next(iter(store.records.values()))

        async def find(digest: bytes) -> Any:
            return record  # a store that is too kind

        store.find = find  # type: ignore[method-assign]
        assert await status(app, "GET", "/v1/models", [(b"x-api-key", other.encode())]) == 401
        assert await status(app, "GET", "/v1/models", [(b"x-api-key", key.encode())]) == 200
        assert len(compared) == 2

    def test_secrets_are_not_in_what_is_printed(self) -> None:
        key, record = make_key(name="a", role=Role.USER, now_s=0.0)
        assert key.split("-", 2)[2] not in repr(record)


class TestIntegers:
    """vLLM CVE-2026-34756: `n = 10**9` and the like were taken."""

    @pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
    @pytest.mark.parametrize(
        "field",
        [
            {"n": 10**9},
            {"n": -1},
            {"max_tokens": 10**30},
            {"max_tokens": -1},
            {"logprobs": 10**9},
            {"top_logprobs": 10**9},
            {"stop": ["x"] * 100_000},
            {"stop": "x" * 100_000},
            {"stop_token_ids": [1] * 100_000},
            {"stop_token_ids": [2**63]},
            {"logit_bias": {str(n): 1 for n in range(100_000)}},
            {"top_k": 10**18},
            {"seed": 10**30},
            {"temperature": 1e308},
        ],
        ids=lambda field: f"{next(iter(field))}={str(next(iter(field.values())))[:12]}",
    )
    async def test_what_no_machine_could_do_is_refused(self, text_model: TextModel, path: str, field: Any) -> None:
        backend = ScriptedBackend([5])
        await backend.start()
        body = {**BODY} if path == CHAT else {"model": "tiny", "prompt": "hello"}
        async with client_of(scripted_app(text_model, backend)) as client:
            answer = await client.post(path, json={**body, **field})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(next(iter(field)))

    def test_every_number_that_a_client_may_send_has_bounds(self, complete_app: FastAPI) -> None:
        document = complete_app.openapi()
        schemas = document["components"]["schemas"]
        unbounded, seen = [], set[str]()

        def look(schema: dict[str, Any], where: str) -> None:
            if (reference := schema.get("$ref")) is not None:
                if reference not in seen:
                    seen.add(reference)
                    look(schemas[reference.rpartition("/")[2]], reference)
                return
            is_number = schema.get("type") in ("integer", "number") and not schema.keys() & {"enum", "const"}
            bounds = schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
            if is_number and len(bounds) < 2:
                unbounded.append(where)
            for name, one in schema.get("properties", {}).items():
                look(one, f"{where}.{name}")
            for kind in ("items", "additionalProperties"):
                if isinstance(schema.get(kind), dict):
                    look(schema[kind], f"{where}[]")
            for kind in ("anyOf", "oneOf", "allOf", "prefixItems"):
                for one in schema.get(kind, ()):
                    look(one, where)

        num_bodies = 0
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                for parameter in operation.get("parameters", ()):
                    look(parameter["schema"], f"{method} {path} {parameter['name']}")
                for content in operation.get("requestBody", {}).get("content", {}).values():
                    num_bodies += 1
                    look(content["schema"], f"{method} {path}")
        assert num_bodies > 15
        assert not unbounded


class TestTemplateArguments:
    """vLLM CVE-2025-62426: arguments of a chat template stalled the event loop."""

    async def test_they_stall_nobody(self, tmp_path: Path) -> None:
        loops = "{% for a in range(size) %}{% for b in range(size) %}{% endfor %}{% endfor %}"
        backend = ScriptedBackend([5])
        await backend.start()
        app = scripted_app(TextModel.load(write_tiny_text_model(tmp_path, chat_template=loops)), backend)
        async with client_of(app) as client:
            answering = asyncio.create_task(
                client.post(CHAT, json={**BODY, "chat_template_kwargs": {"size": 99_999}})
            )
            gap_share = await longest_gap_share(answering)
            answer = await answering
        assert answer.status_code == 400, answer.text
        assert gap_share < 0.7


class TestPromptsOfOthers:
    """vLLM CVE-2025-46570: how fast a prompt is computed tells whether somebody has asked it before."""

    async def test_engines_are_told_whose_prompt_it_is(self) -> None:
        asked: list[Request] = []

        class FakeEngine(ScriptedBackend):
            async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
                asked.append(request)
                yield TokenChunk(request_id=request.id)

        principals = iter(("ann", "bob", "ann"))
        model = ScopedGenerator(FakeEngine([5]), scope=lambda: next(principals))
        for _ in range(3):
            assert [chunk async for chunk in model.generate(greedy("a", [5], 1))]
        ann, bob, again = (request.cache_scope for request in asked)
        assert ann == again != bob
        assert "ann" not in ann  # engines may be elsewhere


class TestManyParts:
    """Small parts by the hundred thousand, each of them valid, took seconds in which nobody else was served."""

    @pytest.mark.parametrize(
        ("path", "field", "message", "part"),
        [
            (CHAT, "messages", {"role": "user"}, {"type": "text", "text": ""}),
            ("/v1/tokenize", "messages", {"role": "user"}, {"type": "text", "text": ""}),
            ("/v1/messages", "messages", {"role": "user"}, {"type": "text", "text": ""}),
            ("/v1/responses", "input", {"role": "user"}, {"type": "input_text", "text": ""}),
        ],
    )
    async def test_they_are_bounded_together(
        self, text_model: TextModel, path: str, field: str, message: dict[str, Any], part: dict[str, Any]
    ) -> None:
        backend = ScriptedBackend([5])
        await backend.start()
        body = {"model": "tiny", field: [{**message, "content": [part] * 1000}] * 20}
        async with client_of(scripted_app(text_model, backend)) as client:
            refused = await client.post(
                path, json={**body, **({"max_tokens": 1} if path == "/v1/messages" else {})}
            )
        assert refused.status_code == 400, refused.text
        assert "more than 16384 parts are in it" in refused.text


SCHEMA_OF_MANY = {"type": "object", "allOf": [{}] * 16_000}
"""As large as a schema may be that is made of as many as there can be."""


def tools_of(path: str, schemas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if path == "/v1/messages":
        return [{"name": f"f{index}", "input_schema": schema} for index, schema in enumerate(schemas)]
    functions = [{"name": f"f{index}", "parameters": schema} for index, schema in enumerate(schemas)]
    if path == "/v1/responses":
        return [{"type": "function", **function} for function in functions]
    return [{"type": "function", "function": function} for function in functions]


class TestManyTools:
    """A schema has a bound, and a hundred of them took many seconds in which nobody else was served."""

    @pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
    async def test_their_schemas_are_bounded_together(self, text_model: TextModel, path: str) -> None:
        question = "input" if path == "/v1/responses" else "messages"
        body = {"model": "tiny", question: BODY["messages"], "tools": tools_of(path, [SCHEMA_OF_MANY] * 3)}
        async with client_of(scripted_app(text_model, ScriptedBackend([5]))) as client:
            refused = await client.post(
                path, json={**body, **({"max_tokens": 1} if path == "/v1/messages" else {})}
            )
        assert refused.status_code == 400, refused.text
        assert "more than 32768 values are in it" in refused.text

    async def test_so_are_documents(self, text_model: TextModel) -> None:
        async with client_of(scripted_app(text_model, ScriptedBackend([5]))) as client:
            refused = await client.post(CHAT, json={**BODY, "documents": [{"numbers": [0] * 20_000}] * 2})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "documents"
        assert "more than 32768 values are in it" in refused.text

    async def test_they_stall_others_no_longer_than_those_of_a_large_agent(self, text_model: TextModel) -> None:
        name = {"type": "string", "description": "what a client has to say of it " * 3}
        agents = {"type": "object", "properties": {f"name{place}": name for place in range(40)}}
        app = scripted_app(text_model, ScriptedBackend([5]))
        gaps_s = {}
        async with client_of(app) as client:
            for schema, num_tools, message in (
                (agents, 128, "the model's context is 256 tokens"),
                (SCHEMA_OF_MANY, 32, "values are in it"),
            ):
                content = json.dumps({**BODY, "tools": tools_of(CHAT, [schema] * num_tools)}).encode()
                answering = asyncio.create_task(
                    client.post(CHAT, content=content, headers={"content-type": "application/json"})
                )
                gaps_s[message] = await longest_gap_s(answering)
                answer = await answering
                assert message in answer.text
        large_s, refused_s = gaps_s.values()
        assert refused_s < 5 * large_s, gaps_s


class TestServerSideFetch:
    """vLLM CVE-2026-24779: the server fetched what a client named."""

    async def test_nothing_that_a_client_names_is_fetched(self, app: FastAPI, store: MemoryKeyStore) -> None:
        connections = 0

        def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            writer.close()

        server = await asyncio.start_server(count, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_data": url}},
            {"type": "image", "source": {"type": "url", "url": url}},
            {"type": "input_image", "image_url": url},
            {"type": "input_file", "file_url": url},
        ]
        async with client_of(app) as client:
            for part in parts:
                body = {**BODY, "messages": [{"role": "user", "content": [part]}], "max_tokens": 5}
                responses = {"model": "tiny", "input": body["messages"]}
                for path, sent in ((CHAT, body), ("/v1/messages", body), ("/v1/responses", responses)):
                    answer = await client.post(path, json=sent, headers=bearer(store.make()))
                    assert answer.status_code == 400, answer.text
            schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": url}}}
            answer = await client.post(
                CHAT, json={**BODY, "response_format": schema}, headers=bearer(store.make())
            )
            assert answer.status_code == 400, answer.text
        server.close()
        await server.wait_closed()
        assert connections == 0


class TestDefaultDeny:
    """Ray CVE-2026-27482: some methods were not covered. Keys cover everything but liveness."""

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        method=st.sampled_from(
            ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "X"]
        ),
        path=st.one_of(
            st.text(max_size=40).map(lambda text: f"/{text}"),
            st.sampled_from(
                ["/metrics", CHAT, "/v1/models", "/docs", "/openapi.json", "/health/ready", "/v1/config"]
            ),
        ),
    )
    def test_without_a_key_nothing_opens(self, app: FastAPI, method: str, path: str) -> None:
        expected = 200 if (method, path) == ("GET", "/health/live") else 401
        assert asyncio.run(status(app, method, path, [])) == expected
