"""`/v1/responses` as it is on the wire: exact events, what is kept, and every field honoured, refused or named."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx2
import jsonschema
import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.current import Current
from localmoe.core.errors import EngineFaultError, OverloadedError, StorageFullError
from localmoe.core.events import EventBus
from localmoe.core.identity import Principal, Role
from localmoe.core.request import Request, TokenChunk
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.fields import MAX_PARTS_TOGETHER
from localmoe.gateway.identity.principal import set_principal
from localmoe.gateway.responses.store import MemoryResponseStore
from localmoe.text.text_model import TextModel
from support.tiny_text import (
    CHAT_TEMPLATE,
    encode,
    make_services,
    scripted_app,
    served_model,
    write_tiny_text_model,
)

BODY: dict[str, Any] = {"model": "tiny", "input": "hi"}
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    template = CHAT_TEMPLATE + "{# <think> </think> #}"
    return TextModel.load(write_tiny_text_model(tmp_path_factory.mktemp("thinker2"), chat_template=template))


class _Paused(ScriptedBackend):
    """Says nothing until it is let."""

    def __init__(self, script: Any) -> None:
        super().__init__(script)
        self.was_asked = asyncio.Event()
        self.may_speak = asyncio.Event()

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        self.num_running += 1
        self.was_asked.set()
        try:
            await self.may_speak.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        async for chunk in super().generate(request):
            yield chunk


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """What comes after what, repeated deltas once."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]


async def poll(client: httpx2.AsyncClient, response_id: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            response = (await client.get(f"/v1/responses/{response_id}")).json()
            if response["status"] not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.01)


async def test_the_response_in_one_piece(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "Hello 世界!"))) as client:
        response = (await client.post("/v1/responses", json={**BODY, "metadata": {"a": "b"}})).json()
        kept = (await client.get(f"/v1/responses/{response['id']}")).json()
    assert kept == response
    number = response["id"].removeprefix("resp_")
    assert response["object"] == "response"
    assert response["status"] == "completed"
    assert response["completed_at"] >= response["created_at"]
    assert response["output"] == [
        {
            "type": "message",
            "id": f"msg_{number}_0",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello 世界!", "annotations": [], "logprobs": []}],
        }
    ]
    num_tokens = len(encode(text_model, "Hello 世界!"))
    usage = response["usage"]
    assert usage["output_tokens"] == num_tokens
    assert usage["total_tokens"] == usage["input_tokens"] + num_tokens
    assert (response["metadata"], response["text"]) == ({"a": "b"}, {"format": {"type": "text"}})
    assert (response["tool_choice"], response["tools"], response["truncation"]) == ("auto", [], "disabled")


async def test_the_events_of_a_stream(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "Hello 世界!"))) as client:
        streamed = await client.post("/v1/responses", json={**BODY, "stream": True})
        events = events_of(streamed.text)
        kept = (await client.get(f"/v1/responses/{events[0]['response']['id']}")).json()
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert kinds_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, added, part = events[0], events[2], events[3]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert (added["output_index"], added["item"]["content"], added["item"]["status"]) == (0, [], "in_progress")
    assert (part["content_index"], part["part"]["text"]) == (0, "")
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == "Hello 世界!"
    assert {event["item_id"] for event in deltas} == {added["item"]["id"]}
    done = {event["type"].removeprefix("response."): event for event in events}
    assert done["output_text.done"]["text"] == done["content_part.done"]["part"]["text"] == "Hello 世界!"
    assert done["output_item.done"]["item"] == done["completed"]["response"]["output"][0]
    assert done["completed"]["response"] == kept


async def test_thoughts_text_and_calls_are_items_one_after_the_other(serve, thinker: TextModel) -> None:
    script = encode(thinker, f"<think>hm</think>\n\nLet me see.\n{CALL}")
    body = {**BODY, "tools": [WEATHER], "stream": True}
    async with serve(ScriptedBackend(script), text=thinker, context_tokens=2000) as client:
        events = events_of((await client.post("/v1/responses", json=body)).text)
    assert kinds_of(events)[2:] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    response = events[-1]["response"]
    thought, message, call = response["output"]
    assert thought["content"][0] == {"type": "reasoning_text", "text": thought["content"][0]["text"]}
    assert thought["content"][0]["text"].strip() == "hm"
    assert message["content"][0]["text"].strip() == "Let me see."
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Ulm"})
    assert call["call_id"]
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < response["usage"]["output_tokens"]


async def test_a_call_of_no_known_tool_can_be_gone_on_from(serve, thinker: TextModel) -> None:
    """Models make names up, and clients get them to see."""
    script = encode(thinker, '<tool_call>\n{"name": "fs.read:all", "arguments": {}}\n</tool_call>')
    body = {**BODY, "tools": [WEATHER]}
    async with serve(ScriptedBackend(script), text=thinker, context_tokens=100_000) as client:
        first = (await client.post("/v1/responses", json=body)).json()
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        assert call["name"] == "fs.read:all"
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "no such tool"}
        for again in (
            {**body, "previous_response_id": first["id"], "input": [result]},
            {**body, "input": [{"role": "user", "content": "hi"}, call, result]},
        ):
            second = await client.post("/v1/responses", json=again)
            assert second.status_code == 200, second.text
        history = [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "fs.read:all", "input": {}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "no such tool"}]},
        ]
        tools = [{"name": f"mcp__{number:0100}", "input_schema": {"type": "object"}} for number in range(200)]
        message = {"model": "tiny", "messages": history, "tools": tools}
        answer = await client.post("/v1/messages/count_tokens", json=message)
        assert answer.status_code == 200, answer.text


async def test_what_another_gateway_makes_is_not_deleted_under_it(text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "ok"))
    await backend.start()
    bus = EventBus()
    services = make_services(bus)
    here, there = (
        create_app(
            {"tiny": served_model(text_model, backend)},
            services=services,
            config=Current(GatewayConfig()),
            bus=bus,
        )
        for _ in range(2)
    )
    async with (
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=here), base_url="http://test") as maker,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=there), base_url="http://test") as other,
    ):
        made = (await maker.post("/v1/responses", json={**BODY, "background": True})).json()["id"]
        await backend.was_asked.wait()
        for method, path in (("DELETE", ""), ("POST", "/cancel")):
            refused = await other.request(method, f"/v1/responses/{made}{path}")
            assert refused.status_code == 409
            assert "another gateway" in refused.json()["error"]["message"]
        backend.may_speak.set()
        assert (await poll(maker, made))["status"] == "completed"
        assert (await other.delete(f"/v1/responses/{made}")).status_code == 200


@pytest.mark.parametrize("response_id", ["%00", "resp_%ff", "a%20b", "x" * 100])
async def test_ids_of_no_response_are_not_found(serve, response_id: str) -> None:
    async with serve(ScriptedBackend([5])) as client:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            refused = await client.request(method, f"/v1/responses/{response_id}{path}")
            assert refused.status_code == 404


async def test_an_answer_that_is_cut_off_is_incomplete(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "quick brown fox"))) as client:
        whole = (await client.post("/v1/responses", json={**BODY, "max_output_tokens": 2})).json()
        streamed = await client.post("/v1/responses", json={**BODY, "max_output_tokens": 2, "stream": True})
    last = events_of(streamed.text)[-1]
    assert last["type"] == "response.incomplete"
    for response in (whole, last["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete"
        assert response["completed_at"] is None


async def test_a_conversation_goes_on_from_what_was_kept(serve, text_model: TextModel) -> None:
    prompts: list[str] = []

    def script(request: Request) -> list[int]:
        prompts.append(text_model.tokenizer.decode(request.prompt_ids, skip_special_tokens=False))
        return encode(text_model, f"answer {len(prompts)}")

    async with serve(ScriptedBackend(script)) as client:
        first = (await client.post("/v1/responses", json={**BODY, "instructions": "be kind"})).json()
        second = (await client.post("/v1/responses", json={**BODY, "previous_response_id": first["id"]})).json()
        third = (await client.post("/v1/responses", json={**BODY, "previous_response_id": second["id"]})).json()
        image = {"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}
        refused = await client.post(
            "/v1/responses", json={**BODY, "input": [image], "previous_response_id": second["id"]}
        )
        await client.delete(f"/v1/responses/{first['id']}")
        lost = await client.post("/v1/responses", json={**BODY, "previous_response_id": third["id"]})
    assert (
        prompts[2]
        == "".join(
            f"<|im_start|>{role}\n{text}<|im_end|>\n"
            for role, text in (
                ("user", "hi"),
                ("assistant", "answer 1"),
                ("user", "hi"),
                ("assistant", "answer 2"),
                ("user", "hi"),
            )
        )
        + "<|im_start|>assistant\n"
    )
    assert prompts[0].startswith("<|im_start|>system\nbe kind<|im_end|>")
    assert third["previous_response_id"] == second["id"]
    assert refused.json()["error"]["param"] == "input[0].content[0].type"
    assert lost.status_code == 400
    assert lost.json()["error"]["code"] == "previous_response_not_found"


async def turns_until_refused(client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Turns of one conversation, each of which says this, and what is said of the one that is too many."""
    previous, num_turns = None, 0
    while True:
        response = await client.post("/v1/responses", json={**body, "previous_response_id": previous})
        if response.status_code != 200:
            assert response.status_code == 400
            return num_turns, response.json()["error"]
        previous, num_turns = response.json()["id"], num_turns + 1


async def test_a_conversation_has_a_bound(serve, text_model: TextModel) -> None:
    async with serve(
        ScriptedBackend(encode(text_model, "ok")),
        config=GatewayConfig(max_body_bytes=3000),
        context_tokens=100_000,
    ) as client:
        num_turns, error = await turns_until_refused(client, {**BODY, "input": "x" * 900})
    assert error["code"] == "conversation_too_long"
    assert "3000 bytes" in error["message"]
    assert num_turns == 3


async def test_what_nobody_said_takes_no_room_in_it(serve, text_model: TextModel) -> None:
    """Tools come with each turn of an agent, and took its conversation's bound after some turns of few words. Only so
    much of them as no agent has is too much to read."""
    tool = {"type": "function", "name": "f", "description": "x" * 2000}
    async with serve(
        ScriptedBackend(encode(text_model, "ok")),
        config=GatewayConfig(max_body_bytes=3000),
        context_tokens=100_000,
    ) as client:
        num_turns, error = await turns_until_refused(client, {**BODY, "tools": [tool], "tool_choice": "none"})
    assert error["code"] == "conversation_too_long"
    assert num_turns > 7


async def test_so_have_the_parts_of_a_conversation(serve, text_model: TextModel) -> None:
    message = {"role": "user", "content": [{"type": "input_text", "text": ""}] * 900}
    async with serve(ScriptedBackend(encode(text_model, "ok")), context_tokens=100_000) as client:
        num_turns, error = await turns_until_refused(client, {**BODY, "input": [message] * 9})
    assert (num_turns, error["code"]) == (3, "conversation_too_long")
    assert "16384 parts" in error["message"]


class _FullStore(MemoryResponseStore):
    async def put(self, owner: str, response_id: str, data: bytes) -> None:
        raise StorageFullError("no room")


@pytest.mark.parametrize(("store", "status"), [(None, 200), (False, 200), (True, 507)])
async def test_an_answer_is_lost_to_a_full_disk_only_if_it_must_be_kept(
    text_model: TextModel, store: bool | None, status: int
) -> None:
    backend = ScriptedBackend(encode(text_model, "ok"))
    await backend.start()
    bus = EventBus()
    services = replace(make_services(bus), responses=_FullStore())
    app = create_app(
        {"tiny": served_model(text_model, backend)}, services=services, config=Current(GatewayConfig()), bus=bus
    )
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/responses", json={**BODY, "store": store})
        streamed = await client.post("/v1/responses", json={**BODY, "store": store, "stream": True})
    assert response.status_code == status
    last = events_of(streamed.text)[-1]
    if status == 200:
        assert (response.json()["store"], response.json()["status"]) == (False, "completed")
        assert (last["type"], last["response"]["store"]) == ("response.completed", False)
    else:
        assert (last["type"], last["response"]["error"]["message"]) == ("response.failed", "no room")


async def test_items_of_all_kinds_make_one_conversation(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, "ok")

    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "sun", "prompt_cache_breakpoint": {"mode": "explicit"}}],
        },
        {"role": "user", "content": "so?"},
    ]
    async with serve(ScriptedBackend(script), context_tokens=2000) as client:
        response = await client.post("/v1/responses", json={**BODY, "input": items, "tools": [WEATHER]})
    assert response.status_code == 200, response.text
    assert set(response.headers["x-localmoe-ignored"].split(", ")) == {
        "input.summary",
        "input.content.annotations",
        "input.output.prompt_cache_breakpoint",
    }
    calls = [
        {"id": id_, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for id_ in ("c1", "c2")
    ]
    assert seen[0].source is not None
    assert seen[0].source.messages == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "user", "content": "so?"},
    ]


async def test_log_probabilities_are_reported_where_included(serve, text_model: TextModel) -> None:
    body = {**BODY, "include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": True}
    async with serve(ScriptedBackend(encode(text_model, "fox jumps"))) as client:
        events = events_of((await client.post("/v1/responses", json=body)).text)
    part = events[-1]["response"]["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in part["logprobs"]).startswith("fox jumps")
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    deltas = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert deltas == part["logprobs"]


async def test_a_text_format_is_a_grammar(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, '{"a": 1}')

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
    async with serve(ScriptedBackend(script)) as client:
        response = await client.post("/v1/responses", json={**BODY, "text": {"format": format_}})
        refused = await client.post("/v1/responses", json={**BODY, "text": {"format": {"type": "xml"}}})
    assert response.status_code == 200, response.text
    grammar = seen[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", schema)
    assert response.json()["text"]["format"]["name"] == "thing"
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "text.format.type"


async def test_what_is_not_to_be_kept_is_not(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "ok"))) as client:
        response = (await client.post("/v1/responses", json={**BODY, "store": False})).json()
        assert response["store"] is False
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            missing = await client.request(method, f"/v1/responses/{response['id']}{path}")
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "not_found"


async def test_input_items_come_in_pages(serve, text_model: TextModel) -> None:
    items = [{"role": "user", "content": f"text {place}"} for place in range(5)]
    async with serve(ScriptedBackend(encode(text_model, "ok"))) as client:
        response = (await client.post("/v1/responses", json={**BODY, "input": items})).json()
        url = f"/v1/responses/{response['id']}/input_items"
        newest = (await client.get(url)).json()
        first = (await client.get(url, params={"order": "asc", "limit": 2})).json()
        second = (await client.get(url, params={"order": "asc", "limit": 3, "after": first["last_id"]})).json()
        wrong = await client.get(url, params={"after": "x"})
        too_many = await client.get(url, params={"limit": 101})
    assert [item["content"][0]["text"] for item in newest["data"]] == [
        f"text {place}" for place in range(4, -1, -1)
    ]
    assert newest["data"][0]["content"] == [{"type": "input_text", "text": "text 4"}]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert [item["content"][0]["text"] for item in first["data"] + second["data"]] == [
        f"text {i}" for i in range(5)
    ]
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "after")
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "limit")


async def test_a_background_response_is_made_while_nobody_waits(serve, text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "done"))
    async with serve(backend) as client:
        queued = (await client.post("/v1/responses", json={**BODY, "background": True})).json()
        assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
        again = await client.post("/v1/responses", json={**BODY, "previous_response_id": queued["id"]})
        assert again.json()["error"]["code"] == "previous_response_unfinished"
        backend.may_speak.set()
        response = await poll(client, queued["id"])
    assert response["status"] == "completed"
    assert response["output"][0]["content"][0]["text"] == "done"


async def test_cancelling_a_background_response_frees_the_engine(serve, text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "done"))
    async with serve(backend) as client:
        queued = (await client.post("/v1/responses", json={**BODY, "background": True})).json()
        await backend.was_asked.wait()
        cancelled = await client.post(f"/v1/responses/{queued['id']}/cancel")
        assert (backend.num_running, backend.num_cancelled) == (0, 1)
        again = await client.post(f"/v1/responses/{queued['id']}/cancel")
        backend.may_speak.set()
        foreground = (await client.post("/v1/responses", json=BODY)).json()
        refused = await client.post(f"/v1/responses/{foreground['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    assert again.json() == cancelled.json()
    assert refused.status_code == 400
    assert "background" in refused.json()["error"]["message"]


async def test_deleting_a_background_response_ends_it(serve, text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "done"))
    async with serve(backend) as client:
        queued = (await client.post("/v1/responses", json={**BODY, "background": True})).json()
        await backend.was_asked.wait()
        deleted = await client.delete(f"/v1/responses/{queued['id']}")
        missing = await client.get(f"/v1/responses/{queued['id']}")
    assert deleted.json() == {"id": queued["id"], "object": "response", "deleted": True}
    assert (backend.num_running, backend.num_cancelled) == (0, 1)
    assert missing.status_code == 404


async def test_failures_in_the_background_are_kept(serve, text_model: TextModel) -> None:
    backend = ScriptedBackend(
        encode(text_model, "never"), failure=ScriptedFailure(error=EngineFaultError("broken"), after_tokens=2)
    )
    async with serve(backend) as client:
        queued = (await client.post("/v1/responses", json={**BODY, "background": True})).json()
        failed = await poll(client, queued["id"])
        long = {**BODY, "input": "word " * 500, "background": True}
        refused = await poll(client, (await client.post("/v1/responses", json=long)).json()["id"])
    assert failed["status"] == refused["status"] == "failed"
    assert failed["error"] == {"code": "server_error", "message": "broken"}
    assert refused["error"]["code"] == "invalid_prompt"


async def test_background_responses_are_bounded_in_number_and_time(serve, text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "done"))
    config = GatewayConfig(max_background_responses=1, background_timeout_s=0.2)
    async with serve(backend, config=config) as client:
        queued = (await client.post("/v1/responses", json={**BODY, "background": True})).json()
        refused = await client.post("/v1/responses", json={**BODY, "background": True})
        late = await poll(client, queued["id"])
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert late["status"] == "failed"
    assert (backend.num_running, backend.num_cancelled) == (0, 1)


async def test_background_responses_end_with_the_server(text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "done"))
    await backend.start()
    app = scripted_app(text_model, backend)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        async with app.router.lifespan_context(app):
            queued = (await client.post("/v1/responses", json={**BODY, "background": True})).json()
            await backend.was_asked.wait()
        assert (backend.num_running, backend.num_cancelled) == (0, 1)
        assert (await client.get(f"/v1/responses/{queued['id']}")).json()["status"] == "cancelled"


async def test_a_stream_that_breaks_off_ends_as_failed(serve, text_model: TextModel) -> None:
    backend = ScriptedBackend(
        encode(text_model, "Hello world"),
        failure=ScriptedFailure(error=EngineFaultError("broken"), after_tokens=2),
    )
    async with serve(backend) as client:
        events = events_of((await client.post("/v1/responses", json={**BODY, "stream": True})).text)
        kept = (await client.get(f"/v1/responses/{events[0]['response']['id']}")).json()
        whole = await client.post("/v1/responses", json=BODY)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "broken"}
    assert kept["status"] == "failed"
    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "broken")


async def test_an_overloaded_engine_is_a_plain_refusal(serve, text_model: TextModel) -> None:
    failure = ScriptedFailure(error=OverloadedError("the queue is full"))
    async with serve(ScriptedBackend(encode(text_model, "never"), failure=failure)) as client:
        for stream in (False, True):
            response = await client.post("/v1/responses", json={**BODY, "stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]},
        "input[0].content[0].type",
    ),
    (
        {
            "instructions": "be kind",
            "input": [
                {"role": "user", "content": "look"},
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [{"type": "input_image", "image_url": "http://x/y.png"}],
                },
            ],
        },
        "input[1].output[0].type",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": 1}, "seed"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"access_programs": {}}, "access_programs"),
    ({"image": {}}, "image"),
    ({"truncation": "auto"}, "truncation"),
    ({"background": True, "stream": True}, "background"),
    ({"background": True, "store": False}, "background"),
    ({"stream_options": {}}, "stream_options"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"include": ["everything"]}, "include[0]"),
    ({"previous_response_id": "x"}, "previous_response_id"),
    ({"previous_response_id": "resp_missing"}, "previous_response_id"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(place): "x" for place in range(17)}}, "metadata"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
    (
        {
            "tools": [WEATHER],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "other"}],
            },
        },
        "tool_choice.tools[0].name",
    ),
    ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
]


@pytest.mark.parametrize(
    ("change", "named"), REFUSALS, ids=[f"{i}-{named}" for i, (_, named) in enumerate(REFUSALS)]
)
async def test_what_is_refused_is_named(serve, text_model: TextModel, change: dict[str, Any], named: str) -> None:
    async with serve(ScriptedBackend(encode(text_model, "no"))) as client:
        response = await client.post("/v1/responses", json={**BODY, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named


async def test_fields_without_effect_are_named(serve, text_model: TextModel) -> None:
    body = {
        **BODY,
        "user": "me",
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"},
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    async with serve(ScriptedBackend(encode(text_model, "ok"))) as client:
        response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-localmoe-ignored"].split(", ")) == {
        "user",
        "service_tier",
        "prompt_cache_key",
        "max_tool_calls",
        "include[reasoning.encrypted_content]",
        "text.verbosity",
        "reasoning.summary",
        "stream_options.include_obfuscation",
    }


async def test_only_allowed_tools_are_shown(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, "ok")

    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    body = {**BODY, "tools": [{**WEATHER, "name": "other"}, WEATHER], "tool_choice": choice}
    async with serve(ScriptedBackend(script), context_tokens=2000) as client:
        response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    assert seen[0].source is not None
    shown = seen[0].source.parameters["tools"]
    assert [tool["function"]["name"] for tool in shown] == ["weather"]
    assert response.json()["tool_choice"] == choice
    assert [tool["name"] for tool in response.json()["tools"]] == ["other", "weather"]


async def test_a_stream_of_an_earlier_response_is_refused(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "ok"))) as client:
        response = (await client.post("/v1/responses", json=BODY)).json()
        refused = await client.get(f"/v1/responses/{response['id']}", params={"stream": "true"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")


async def test_nobody_sees_what_is_anothers(text_model: TextModel) -> None:
    backend = _Paused(encode(text_model, "mine"))
    await backend.start()
    app = scripted_app(text_model, backend)

    async def as_said(scope: Scope, receive: Receive, send: Send) -> None:
        who = Headers(scope=scope)["x-who"]
        set_principal(scope, Principal(id=who, name=who, role=Role.USER))
        await app(scope, receive, send)

    transport = httpx2.ASGITransport(app=as_said)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", headers={"x-who": "ann"}) as ann:
        running = (await ann.post("/v1/responses", json={**BODY, "background": True})).json()["id"]
        await backend.was_asked.wait()
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://test", headers={"x-who": "bob"}
        ) as bob:
            for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
                assert (await bob.request(method, f"/v1/responses/{running}{path}")).status_code == 404
            stolen = await bob.post("/v1/responses", json={**BODY, "previous_response_id": running})
        assert stolen.json()["error"]["code"] == "previous_response_not_found"
        assert (backend.num_running, backend.num_cancelled) == (1, 0)
        backend.may_speak.set()
        assert (await poll(ann, running))["status"] == "completed"


async def test_what_is_sent_is_what_is_documented(serve, thinker: TextModel) -> None:
    script = encode(thinker, f"<think>hm</think>Let me see.{CALL}")
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "messages": [{"role": "user", "content": "hi"}]}
    ask |= {"thinking": {"type": "adaptive"}, "tools": [{"name": "weather", "input_schema": {"type": "object"}}]}
    async with serve(ScriptedBackend(script), text=thinker, context_tokens=2000) as client:
        document = (await client.get("/openapi.json")).json()
        body = {**BODY, "tools": [WEATHER]}
        whole = (await client.post("/v1/responses", json=body)).json()
        items = (await client.get(f"/v1/responses/{whole['id']}/input_items")).json()
        deleted = (await client.delete(f"/v1/responses/{whole['id']}")).json()
        events = events_of((await client.post("/v1/responses", json={**body, "stream": True})).text)
        message = (await client.post("/v1/messages", json=ask)).json()
        streamed = (await client.post("/v1/messages", json={**ask, "stream": True})).text
        counted = (
            await client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": ask["messages"]})
        ).json()
    message_events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]

    def check(value: Any, path: str, media_type: str = "application/json", method: str = "post") -> None:
        content = document["paths"][path][method]["responses"]["200"]["content"]
        jsonschema.validate(value, {**content[media_type]["schema"], "components": document["components"]})

    check(whole, "/v1/responses")
    check(items, "/v1/responses/{response_id}/input_items", method="get")
    check(deleted, "/v1/responses/{response_id}", method="delete")
    check(message, "/v1/messages")
    check(counted, "/v1/messages/count_tokens")
    for event in events:
        check(event, "/v1/responses", "text/event-stream")
    for event in message_events:
        check(event, "/v1/messages", "text/event-stream")
    with pytest.raises(jsonschema.ValidationError):
        check({**events[0], "type": "response.unheard_of"}, "/v1/responses", "text/event-stream")
    assert not [name for name in document["components"]["schemas"] if "__" in name]


async def test_scores_are_no_parts_of_a_conversation(serve, text_model: TextModel) -> None:
    """An answer with them has thousands of small things in it, none of which the model is told again."""
    body = {**BODY, "include": ["message.output_text.logprobs"], "top_logprobs": 20}
    async with serve(ScriptedBackend(encode(text_model, "ok " * 500)), context_tokens=100_000) as client:
        first = (await client.post("/v1/responses", json=body)).json()
        second = await client.post("/v1/responses", json={**BODY, "previous_response_id": first["id"]})
    scores = first["output"][0]["content"][0]["logprobs"]
    assert sum(3 + 2 * len(entry["top_logprobs"]) for entry in scores) > MAX_PARTS_TOGETHER
    assert second.status_code == 200
