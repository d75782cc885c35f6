"""Who may do what: every role at every route, and what is written about it."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match, Route

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.core.identity import Role
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.access import OTHER, TABLE, AccessTable, Rule
from localmoe.gateway.identity.authenticator import Authenticator
from localmoe.gateway.middleware.stack import Guard, middleware_stack
from localmoe.text.text_model import TextModel
from support.identity import MemoryKeyStore, bearer
from support.tiny_text import scripted_app

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
ORDER = (None, *Role)


def routes_of(routes: list[BaseRoute]) -> Iterator[tuple[str, str, BaseRoute]]:
    """(method, path, route) of everything that the app answers."""
    for route in routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            yield from routes_of(inner.routes)
            continue
        for method in sorted(route.methods):  # type: ignore[attr-defined]
            if method != "HEAD":  # Starlette's, of every GET; for admins, as what is not in the table
                yield method, route.path, route  # type: ignore[attr-defined]


def path_like(route: str) -> str:
    """A path that the route takes."""
    return re.sub(r"{\w+(:\w+)?}", "some-id", route)


@pytest.fixture
def store() -> MemoryKeyStore:
    return MemoryKeyStore()


@pytest.fixture
def app(text_model: TextModel, store: MemoryKeyStore) -> FastAPI:
    return scripted_app(text_model, ScriptedBackend([5]), guard=Guard(identity=Authenticator(store, None)))


def test_every_route_is_in_the_table_and_nothing_else(complete_app: FastAPI) -> None:
    app = complete_app
    listed = [(rule.method, rule.route) for rule in TABLE]
    assert len(listed) == len(set(listed))
    missing = {(method, path) for method, path, _ in routes_of(app.routes)} - set(listed)
    assert not missing, f"say in gateway/identity/access.py who may use {sorted(missing)}"
    assert set(listed) == {(method, path) for method, path, _ in routes_of(app.routes)}


def test_the_table_and_the_router_mean_the_same_route(complete_app: FastAPI) -> None:
    table = AccessTable()
    routes = list(routes_of(complete_app.routes))
    for method, path, _ in routes:
        wanted = path_like(path)
        assert table.rule(method, wanted).route == path
        scope = {
            "type": "http",
            "method": method,
            "path": wanted,
            "headers": [],
            "root_path": "",
            "query_string": b"",
        }
        taken = [found for _, found, route in routes if route.matches(dict(scope))[0] == Match.FULL]
        assert taken[0] == path


async def test_every_role_at_every_route(complete_app: FastAPI, store: MemoryKeyStore) -> None:
    """Whoever may reaches the very route, and nobody else any, as the documentation has it."""

    def marker(method: str, path: str) -> Route:
        async def answer(request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"{method} {path}")

        return Route(path, answer, methods=[method])

    found = [(method, path) for method, path, _ in routes_of(complete_app.routes)]
    stack = middleware_stack(
        Current(GatewayConfig()), Guard(identity=Authenticator(store, None)), bus=EventBus(), streamed_paths=()
    )
    app = Starlette(routes=[marker(method, path) for method, path in found], middleware=stack)
    least = documented_roles()
    assert least.keys() == set(found)
    keys = {role: store.make(role) for role in Role}
    num_refused = 0
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        for (method, path), role in itertools.product(found, ORDER):
            headers = bearer(keys[role]) if role else {}
            answer = await client.request(method, path_like(path), headers=headers)
            where = f"{method} {path} as {role}: {answer.status_code} {answer.text[:200]}"
            needed = least[method, path]
            if needed is None or (role is not None and role >= needed):
                assert (answer.status_code, answer.text) == (200, f"{method} {path}"), where
                continue
            num_refused += 1
            if role is None:
                assert answer.status_code == 401, where
                assert answer.headers["www-authenticate"] == "Bearer", where
            else:
                assert answer.status_code == 403, where
                assert f"needs the role {needed.name.lower()}" in answer.text, where
    assert num_refused > len(found)  # nobody without a key, and more


async def test_what_is_not_in_the_table_is_for_admins(app: FastAPI, store: MemoryKeyStore) -> None:
    @app.post("/v1/forgotten")
    async def forgotten() -> str:
        return "secret"

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        for method, path in (
            ("POST", "/v1/forgotten"),
            ("GET", "/v1/nothing"),
            ("PUT", "/v1/models"),
            ("BREW", "/metrics"),
            ("OPTIONS", "/v1/models"),
            ("HEAD", "/docs"),
            ("POST", "/health/live"),
            ("GET", "//metrics"),
            ("GET", "/metrics/"),
            ("GET", "/Metrics"),
            ("GET", "/metrics%00"),
            ("GET", "/metrics;a=b"),
            ("GET", "/v1/experts%2F"),
        ):
            for role in (Role.VIEWER, Role.USER, Role.OPERATOR):
                answer = await client.request(method, path, headers=bearer(store.make(role)))
                assert answer.status_code == 403, f"{method} {path} as {role}"
            assert (await client.request(method, path)).status_code == 401
        admin = bearer(store.make(Role.ADMIN))
        assert (await client.post("/v1/forgotten", headers=admin)).text == '"secret"'
        assert (await client.get("/v1/nothing", headers=admin)).status_code == 404


@given(st.sampled_from(["GET", "POST", "PUT", "X" * 50]), st.text(max_size=60))
def test_no_path_is_let_in_by_accident(method: str, path: str) -> None:
    rule = AccessTable().rule(method, path)
    if rule.route == OTHER:
        assert rule.role == Role.ADMIN
        assert len(rule.method) < 10
    else:
        assert rule in TABLE


def test_a_pattern_takes_what_the_router_takes_only() -> None:
    table = AccessTable([Rule("GET", "/a/{id}", Role.VIEWER), Rule("GET", "/b/{id:path}", Role.USER)])
    assert table.rule("GET", "/a/x").role == Role.VIEWER
    assert table.rule("GET", "/b/x/y").role == Role.USER
    for path in ("/a/x/y", "/a/", "/a", "/b", "/xa/x", "/a/x/"):
        assert table.rule("GET", path).role == Role.ADMIN
    assert table.rule("POST", "/a/x").role == Role.ADMIN


def documented_lines() -> list[str]:
    """Of the documentation's table."""
    lines = DOCUMENT.read_text().splitlines()
    start = lines.index("|---|---|", lines.index("| route | least role |"))
    return lines[start + 1 : lines.index("<!-- end of table -->")]


def documented_roles() -> dict[tuple[str, str], Role | None]:
    """The least role that may, by method and route."""
    roles: dict[str, Role | None] = {"open": None, **{role.name.lower(): role for role in Role}}
    found = (re.fullmatch(r"\| `(\w+) (\S+)` \| (\w+) \|", line) for line in documented_lines())
    return {(row[1], row[2]): roles[row[3]] for row in found if row is not None}


def table_rows() -> list[str]:
    """As the documentation has them: one line for each role, routes in order."""
    names = {role: "open" if role is None else role.name.lower() for role in ORDER}
    rules = sorted(TABLE, key=lambda rule: (ORDER.index(rule.role), rule.route, rule.method))
    return [f"| `{rule.method} {rule.route}` | {names[rule.role]} |" for rule in rules]


def test_the_documentation_has_the_same_table() -> None:
    assert documented_lines() == table_rows(), "the table in docs/security.md should be\n" + "\n".join(
        table_rows()
    )


def test_roles_contain_each_other() -> None:
    assert [role.name for role in sorted(Role)] == ["VIEWER", "USER", "OPERATOR", "ADMIN"]
    for lower, higher in itertools.pairwise(sorted(Role)):
        assert lower < higher
