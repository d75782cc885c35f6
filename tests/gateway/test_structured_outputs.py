"""Answers in a form: what becomes of `response_format` and `structured_outputs`, and of what nobody could follow."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import GatewayOverloadedError, InvalidRequestError, OverloadedError
from localmoe.core.request import Grammar, Request
from localmoe.gateway.answering.grammar_checks import GrammarChecker
from localmoe.text.sandbox_process import SandboxProcess
from localmoe.text.text_model import TextModel
from support.held_up import longest_gap_share
from support.tiny_text import encode

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
async def asked(serve, text_model: TextModel) -> AsyncIterator[Callable[..., Any]]:
    """`await asked(path, **fields)`: the response, and what the engine was asked if it was."""
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, '{"a": 1}')

    async with serve(ScriptedBackend(script), context_tokens=100_000) as client:

        async def ask(path: str, **fields: Any) -> tuple[httpx2.Response, Request | None]:
            seen.clear()
            prompt = {"messages": HI} if path == CHAT else {"prompt": "hi"}
            response = await client.post(path, json={"model": "tiny", **prompt, **fields})
            return response, seen[0] if seen else None

        yield ask


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar(kind="json_object")),
        (schema_format(OBJECT), Grammar(kind="json_schema", source=json.dumps(OBJECT))),
        (
            schema_format(OBJECT, strict=True, description="An é."),
            Grammar(kind="json_schema", source=json.dumps(OBJECT)),
        ),
        (
            schema_format({"enum": ["é"], "x-order": 1}, strict=False),
            Grammar(kind="json_schema", source='{"enum": ["é"], "x-order": 1}'),
        ),
    ],
)
async def test_response_formats(asked, response_format: Any, grammar: Grammar | None) -> None:
    response, request = await asked(CHAT, response_format=response_format)
    assert response.status_code == 200, response.text
    assert request.sampling.grammar == grammar


@pytest.mark.parametrize(
    ("structured_outputs", "grammar"),
    [
        ({"json_object": True}, Grammar(kind="json_object")),
        ({"json": OBJECT}, Grammar(kind="json_schema", source=json.dumps(OBJECT))),
        ({"regex": "a+"}, Grammar(kind="regex", source="a+")),
        ({"choice": ["yes", "né"]}, Grammar(kind="choice", source='["yes", "né"]')),
        ({"grammar": 'start: "a"'}, Grammar(kind="lark", source='start: "a"')),
        ({"regex": "a+", "whitespace_pattern": None}, Grammar(kind="regex", source="a+")),
    ],
)
async def test_structured_outputs(asked, structured_outputs: Any, grammar: Grammar) -> None:
    response, request = await asked(COMPLETIONS, structured_outputs=structured_outputs, n=2)
    assert response.status_code == 200, response.text
    assert request.sampling.grammar == grammar


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"response_format": {"type": "json"}}, "response_format.type"),
        (CHAT, {"response_format": {}}, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"response_format": schema_format([])}, "response_format.json_schema.schema"),
        (CHAT, {"response_format": schema_format(OBJECT, other=1)}, "response_format.json_schema.other"),
        (CHAT, {"response_format": schema_format(OBJECT, name="a b")}, "response_format.json_schema.name"),
        (CHAT, {"response_format": schema_format({"not": {}}, strict=True)}, "response_format.json_schema.schema"),
        (
            CHAT,
            {"response_format": schema_format({"items": {"anyOf": [{}, {"frobnicate": 1}]}}, strict=True)},
            "response_format.json_schema.schema.items.anyOf[1]",
        ),
        (
            CHAT,
            {"response_format": schema_format({"properties": {"a": {"anyOf": 1}}}, strict=True)},
            "response_format.json_schema.schema.properties.a.anyOf",
        ),
        (CHAT, {"response_format": schema_format({"not": {}})}, "response_format"),
        (COMPLETIONS, {"structured_outputs": {}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        (COMPLETIONS, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (COMPLETIONS, {"structured_outputs": {"choice": ["a"] * 5000}}, "structured_outputs.choice"),
        (COMPLETIONS, {"structured_outputs": {"regex": "("}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ],
)
async def test_what_is_wrong_is_named(asked, path: str, fields: dict[str, Any], param: str) -> None:
    response, request = await asked(path, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert request is None


async def test_an_unsupported_keyword_is_named(asked) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    response, _ = await asked(CHAT, response_format=schema_format(schema))
    assert response.status_code == 400
    assert "uniqueItems" in response.json()["error"]["message"]


HOSTILE: dict[str, Grammar] = {
    "a regex of repeats of repeats": Grammar(kind="regex", source="((a{1,1000}){1,1000}){1,1000}x("),
    "a regex of parentheses": Grammar(kind="regex", source="(" * 2000 + ")" * 2000),
    "a regex that looks ahead": Grammar(kind="regex", source="(?=a)b"),
    "a regex with a backreference": Grammar(kind="regex", source=r"(a)\1"),
    "a regex that is long": Grammar(kind="regex", source="a?" * 100_000),
    "rules in a long row that lead nowhere": Grammar(
        kind="lark", source="start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000))
    ),
    "terminals that double": Grammar(
        kind="lark", source="start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'
    ),
    "rules in parentheses": Grammar(kind="lark", source="start: " + "(" * 9000 + '"a"' + ")" * 9000),
    "rules that import a file": Grammar(kind="lark", source='%import "/etc/passwd"\nstart: "a"'),
    "rules with settings": Grammar(kind="lark", source='start: "a"\n%llguidance {"no_forcing": false}'),
    "no rules": Grammar(kind="lark", source=""),
    "a token that is none": Grammar(kind="lark", source="start: <[4000000000]>"),
    "JSON of lists in lists": Grammar(kind="json_schema", source='{"items":' * 10_000 + "{}" + "}" * 10_000),
    "a schema of alternatives of alternatives": Grammar(
        kind="json_schema",
        source=json.dumps({"allOf": [{"anyOf": [{"minLength": i + j} for i in range(30)]} for j in range(30)]}),
    ),
    "a huge enumeration": Grammar(
        kind="json_schema", source=json.dumps({"enum": [f"v{i}" for i in range(50_000)]})
    ),
    "thousands of properties": Grammar(
        kind="json_schema",
        source=json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(4000)}, "type": "object"}),
    ),
    "a schema that is itself": Grammar(kind="json_schema", source='{"$ref": "#"}'),
    "schemas that are each other": Grammar(
        kind="json_schema",
        source='{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
    ),
    "a schema within itself": Grammar(kind="json_schema", source='{"allOf": [{"$ref": "#"}, {"type": "null"}]}'),
    "a schema that is nowhere": Grammar(kind="json_schema", source='{"$ref": "#/$defs/none"}'),
    "a schema on another server": Grammar(kind="json_schema", source='{"$ref": "http://169.254.169.254/latest"}'),
    "a schema in a file": Grammar(kind="json_schema", source='{"$ref": "file:///etc/passwd"}'),
    "a pattern that is none": Grammar(kind="json_schema", source='{"type": "string", "pattern": "("}'),
    "a pattern that looks behind": Grammar(kind="json_schema", source='{"type": "string", "pattern": "(?<=a)b"}'),
    "a pattern with a backreference": Grammar(
        kind="json_schema", source='{"type": "string", "pattern": "(a)\\\\1"}'
    ),
    "a number too large": Grammar(kind="json_schema", source='{"type": "number", "minimum": 1e999}'),
    "multiples of a prime": Grammar(
        kind="json_schema", source='{"type": "integer", "multipleOf": 1000000007, "minimum": 1, "maximum": 1e300}'
    ),
    "what nothing is": Grammar(kind="json_schema", source='{"type": "integer", "minimum": 5, "maximum": 1}'),
    "a type that is none": Grammar(kind="json_schema", source='{"type": "strin"}'),
    "settings in a schema": Grammar(kind="json_schema", source='{"x-guidance": {"lenient": true}}'),
    "a list": Grammar(kind="json_schema", source="[]"),
    "no JSON": Grammar(kind="json_schema", source="{"),
    "no texts": Grammar(kind="choice", source="[]"),
}


LEAVES_LITTLE: dict[str, Grammar] = {
    "rules that refer to rules": Grammar(
        kind="lark", source="\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(5000)), 'r5000: "deep"'])
    ),
    "schemas that refer to schemas": Grammar(
        kind="json_schema",
        source=json.dumps(
            {
                "$ref": "#/$defs/a0",
                "$defs": {
                    **{f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}, "type": "array"} for i in range(2000)},
                    "a2000": {"type": "null"},
                },
            }
        ),
    ),
}
"""Grammars in order that would overflow the stack of an engine that is not ours."""


@pytest.fixture(scope="module")
def checker() -> GrammarChecker:
    return GrammarChecker()


@pytest.mark.parametrize("name", [*HOSTILE, *LEAVES_LITTLE])
async def test_a_hostile_grammar_is_refused_at_once(checker: GrammarChecker, name: str) -> None:
    await checker.check(Grammar(kind="json_object"), param="x")
    started_s = time.monotonic()
    with pytest.raises(InvalidRequestError) as refusal:
        await checker.check({**HOSTILE, **LEAVES_LITTLE}[name], param="response_format")
    assert time.monotonic() - started_s < 1.0
    assert refusal.value.param == "response_format"
    assert len(str(refusal.value)) < 400
    assert "/tmp" not in str(refusal.value)
    # The next one finds a process that is ready.
    good = Grammar(kind="regex", source=f"[a-z]{{{len(name)}}}")
    started_s = time.monotonic()
    await checker.check(good, param="x")
    assert time.monotonic() - started_s < 1.0


async def test_what_a_grammar_costs_its_process_costs_nobody_else() -> None:
    """While one is checked that takes long, the event loop goes on."""
    checker = GrammarChecker()
    check = asyncio.create_task(checker.check(HOSTILE["terminals that double"], param="x"))
    gap_share = await longest_gap_share(check)
    with pytest.raises(InvalidRequestError, match="too much"):
        await check
    assert gap_share < 0.7


async def test_what_was_found_out_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = GrammarChecker()
    good, bad = Grammar(kind="regex", source="a+"), Grammar(kind="regex", source="(")
    await checker.check(good, param="a")
    with pytest.raises(InvalidRequestError, match="a: "):
        await checker.check(bad, param="a")
    monkeypatch.setattr(SandboxProcess, "ask", None)
    await checker.check(good, param="b")
    with pytest.raises(InvalidRequestError, match="b: "):
        await checker.check(bad, param="b")


async def test_where_no_process_can_be_started_it_is_nobody_elses_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models that could answer in this one's place: they need the same."""

    def ask(_: SandboxProcess, __: bytes) -> bytes:
        raise OverloadedError("a process that is needed cannot be started")

    monkeypatch.setattr(SandboxProcess, "ask", ask)
    with pytest.raises(GatewayOverloadedError, match="cannot be started"):
        await GrammarChecker().check(Grammar(kind="regex", source="a+"), param="x")


async def test_a_grammar_for_which_there_was_no_time_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checker, grammar = GrammarChecker(), Grammar(kind="regex", source="a+")
    for no_answer in (b"null", None):
        with monkeypatch.context() as patched:
            patched.setattr(SandboxProcess, "ask", lambda *_, said=no_answer: said)
            with pytest.raises(GatewayOverloadedError, match="no time"):
                await checker.check(grammar, param="a")
    await checker.check(grammar, param="a")


async def test_equal_grammars_wait_for_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first that asked has gone."""
    num_asked, may_answer = 0, threading.Event()

    def ask(*_: Any) -> bytes:
        nonlocal num_asked
        num_asked += 1
        assert may_answer.wait(10)
        return b'""'

    monkeypatch.setattr(SandboxProcess, "ask", ask)
    checker = GrammarChecker()
    checks = [asyncio.create_task(checker.check(Grammar(kind="regex", source="a"), param="x")) for _ in range(200)]
    await asyncio.sleep(0)
    checks[0].cancel()
    may_answer.set()
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None] * 199
    assert num_asked == 1


async def test_no_more_wait_than_can_be_checked_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    may_answer = threading.Event()
    monkeypatch.setattr(SandboxProcess, "ask", lambda *_: b'""' if may_answer.wait(10) else None)
    checker = GrammarChecker()
    checks = [
        asyncio.create_task(checker.check(Grammar(kind="regex", source=f"a{i}"), param="x")) for i in range(40)
    ]
    await asyncio.sleep(0)
    may_answer.set()
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 32 + [GatewayOverloadedError] * 8
    await checker.check(Grammar(kind="regex", source="b"), param="x")
