"""`/v1/messages` as it is on the wire: exact events, errors, and every field honoured, refused or named."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import BackendUnavailableError, EngineFaultError, OverloadedError
from localmoe.core.request import FinishReason, PromptSource, Request, TokenChunk
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel
from localmoe.text.text_model import TextModel
from support.tiny_text import CHAT_TEMPLATE, encode, gateway_app, write_tiny_text_model

BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
# Qwen's way: a template that can be told whether to think, and closes what it does not want.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "'<|im_start|>assistant\\n' }}",
    "'<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{# </think> #}",
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    directory = write_tiny_text_model(tmp_path_factory.mktemp("thinker"), chat_template=THINKING_TEMPLATE)
    return TextModel.load(directory)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def joined(events: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The events' data with neighbouring deltas of one kind as one, since how text falls into tokens is no matter."""
    out: list[dict[str, Any]] = []
    for name, data in events:
        assert name == data["type"]
        if name == "content_block_delta" and out and out[-1]["type"] == name:
            (kind, text), (last_kind, last_text) = data["delta"].items(), out[-1]["delta"].items()
            if kind == last_kind:
                out[-1]["delta"][text[0]] = last_text[1] + text[1]
                continue
        out.append(data)
    return out


async def test_the_answer_in_one_piece(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "Hello 世界!"))) as client:
        response = await client.post("/v1/messages", json=BODY)
    assert response.status_code == 200
    message = response.json()
    assert message.pop("id").startswith("msg_")
    num_tokens = len(encode(text_model, "Hello 世界!"))
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello 世界!", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": message["usage"]["input_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": num_tokens,
        },
    }
    assert message["usage"]["input_tokens"] > 0
    assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_the_events_of_a_stream(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "Hello 世界!"))) as client:
        response = await client.post("/v1/messages", json={**BODY, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"]
    events = joined(events_of(response.text))
    start = events[0]["message"]
    assert start["content"] == []
    assert start["stop_reason"] is None
    assert start["usage"]["input_tokens"] > 0
    assert events[1:] == [
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": "", "citations": None},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello 世界!"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {**start["usage"], "output_tokens": len(encode(text_model, "Hello 世界!"))},
        },
        {"type": "message_stop"},
    ]


async def test_thoughts_text_and_calls_are_blocks_one_after_the_other(serve, thinker: TextModel) -> None:
    script = encode(thinker, f"<think>hm</think>\n\nLet me see.\n{CALL}\n{CALL}")
    body = {**BODY, "max_tokens": 200, "thinking": {"type": "adaptive"}, "tools": [WEATHER]}
    async with serve(ScriptedBackend(script), text=thinker, context_tokens=2000) as client:
        whole = (await client.post("/v1/messages", json=body)).json()
        streamed = (await client.post("/v1/messages", json={**body, "stream": True})).text
    thought, text, call, again = whole["content"]
    assert (thought["type"], thought["thinking"].strip()) == ("thinking", "hm")
    assert len(thought["signature"]) == 64
    assert (text["type"], text["text"].strip()) == ("text", "Let me see.")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Ulm"})
    assert again["id"] != call["id"]
    assert whole["stop_reason"] == "tool_use"
    kinds = [
        (data["index"], data.get("content_block", data.get("delta", {})).get("type"))
        for data in joined(events_of(streamed))
        if "index" in data
    ]
    assert kinds == [
        (0, "thinking"),
        (0, "thinking_delta"),
        (0, "signature_delta"),
        (0, None),
        (1, "text"),
        (1, "text_delta"),
        (1, None),
        (2, "tool_use"),
        (2, "input_json_delta"),
        (2, None),
        (3, "tool_use"),
        (3, "input_json_delta"),
        (3, None),
    ]
    pieces = [
        d["delta"]["partial_json"] for d in joined(events_of(streamed)) if "partial_json" in d.get("delta", {})
    ]
    assert [json.loads(piece) for piece in pieces] == [{"city": "Ulm"}] * 2


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "high"}}, "high"),
        ({"output_config": {"effort": "max"}}, "max"),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "medium"}}, "none"),
    ],
)
async def test_other_servers_hear_of_thinking_only_what_was_said(fields: Any, effort: str | None) -> None:
    sources: list[PromptSource] = []

    class TextEngine:
        """Most of its kind refuse a word on reasoning."""

        is_ready = True

        async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
            assert request.source is not None
            sources.append(request.source)
            yield TokenChunk(request_id=request.id, text="yes", finish_reason=FinishReason.STOP)

    model = ServedModel(id="tiny", created=1, text=None, context_tokens=None, generator=TextEngine())
    transport = httpx2.ASGITransport(app=gateway_app(model))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/messages", json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    assert sources[0].parameters == ({} if effort is None else {"reasoning_effort": effort})


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, []),
        ({"type": "disabled"}, []),
        ({"type": "enabled", "budget_tokens": 1024}, [("hm", True)]),
        ({"type": "adaptive", "display": "omitted"}, [("", True)]),
    ],
)
async def test_thoughts_are_shown_as_asked(serve, thinker: TextModel, thinking: Any, shown: list[Any]) -> None:
    prompts: list[str] = []

    def script(request: Request) -> list[int]:
        prompts.append(thinker.tokenizer.decode(request.prompt_ids, skip_special_tokens=False))
        return encode(thinker, "<think>hm</think>yes")

    body = BODY if thinking is None else {**BODY, "thinking": thinking}
    async with serve(ScriptedBackend(script), text=thinker) as client:
        whole = (await client.post("/v1/messages", json=body)).json()
        streamed = (await client.post("/v1/messages", json={**body, "stream": True})).text
    blocks = [(b["thinking"], bool(b["signature"])) for b in whole["content"] if b["type"] == "thinking"]
    assert blocks == shown
    assert ("thinking_delta" in streamed) == (shown == [("hm", True)])
    assert whole["content"][-1]["text"] == "yes"
    assert ("<think>\n\n</think>" in prompts[0]) == (not shown)


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["zzz", "fox"]}, "stop_sequence", "fox"),
        ({"max_tokens": 0}, "max_tokens", None),
    ],
)
async def test_why_an_answer_ends(
    serve, text_model, body: dict[str, Any], reason: str, sequence: str | None
) -> None:
    async with serve(ScriptedBackend(encode(text_model, "quick brown fox jumps"))) as client:
        whole = (await client.post("/v1/messages", json={**BODY, **body})).json()
        streamed = events_of((await client.post("/v1/messages", json={**BODY, **body, "stream": True})).text)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert streamed[-2][1]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert (whole["content"] == []) == (body.get("max_tokens") == 0)


async def test_the_conversation_reaches_the_template_whole(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, "ok")

    messages = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "second", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "abc"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "third"},
            ],
        },
        {"role": "user", "content": "fourth"},
    ]
    body = {
        **BODY,
        "messages": messages,
        "system": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}],
    }
    async with serve(ScriptedBackend(script)) as client:
        response = await client.post("/v1/messages", json=body)
        counted = await client.post(
            "/v1/messages/count_tokens", json={k: v for k, v in body.items() if k != "max_tokens"}
        )
    prompt = text_model.tokenizer.decode(seen[0].prompt_ids, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nbe\nkind<|im_end|>\n<|im_start|>user\nfirst\nsecond<|im_end|>\n"
        "<|im_start|>assistant\nthird<|im_end|>\n<|im_start|>user\nfourth<|im_end|>\n<|im_start|>assistant\n"
    )
    assert counted.json() == {"input_tokens": len(seen[0].prompt_ids)}
    assert response.json()["usage"]["input_tokens"] == len(seen[0].prompt_ids)
    ignored = response.headers["x-localmoe-ignored"].split(", ")
    assert set(ignored) == {f"messages.content.{name}" for name in ("cache_control", "signature", "data")}
    assert seen[0].source is not None
    assert seen[0].source.messages is not None
    assert seen[0].source.messages[2]["reasoning_content"] == "hm"


async def test_results_of_tools_come_before_what_is_said_with_them(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, "ok")

    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}
    rain = {"type": "text", "text": "rain", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [rain]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no such city", "is_error": True}
    body = {
        **BODY,
        "tools": [WEATHER],
        "messages": [
            BODY["messages"][0],
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, failed, {"type": "text", "text": "and?"}]},
        ],
    }
    async with serve(ScriptedBackend(script), context_tokens=2000) as client:
        response = await client.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-localmoe-ignored"] == "messages.content.content.cache_control"
    assert seen[0].source is not None
    messages = seen[0].source.messages
    assert messages is not None
    assert messages[1]["tool_calls"] == [
        {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    ]
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Error:\nno such city"},
        {"role": "user", "content": "and?"},
    ]


async def test_sampling_fields_reach_the_engine(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, "ok")

    fields = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "max_tokens": 9}
    async with serve(ScriptedBackend(script)) as client:
        assert (await client.post("/v1/messages", json={**BODY, **fields})).status_code == 200
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.25, 7, 0.5, 9)


async def test_a_format_is_a_grammar(serve, text_model: TextModel) -> None:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, '{"a": 1}')

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    output = {"format": {"type": "json_schema", "schema": schema}}
    async with serve(ScriptedBackend(script)) as client:
        response = await client.post("/v1/messages", json={**BODY, "output_config": output})
        refused = await client.post(
            "/v1/messages",
            json={**BODY, "output_config": {"format": {"type": "json_schema", "schema": {"fancy": 7}}}},
        )
    assert response.status_code == 200, response.text
    grammar = seen[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", schema)
    assert refused.status_code == 400
    assert "output_config.format.schema" in refused.json()["error"]["message"]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*BODY["messages"], {"role": "assistant", "content": "It is"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
        "messages[0].content[0].type",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}
            ]
        },
        "messages[0].content[0].source.type",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}],
                }
            ]
        },
        "messages[0].content[0].type: this model takes no content parts of type 'image'",
    ),
    (
        {
            "system": "be kind",
            "messages": [
                {"role": "user", "content": "look"},
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "a",
                            "content": [
                                {"type": "text", "text": "x"},
                                {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}},
                            ],
                        }
                    ],
                },
            ],
        },
        "messages[1].content[0].content[1].type",
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**WEATHER, "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    ({"tools": [{**WEATHER, "input_examples": [{}]}]}, "tools[0].input_examples"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "auto", "name": "weather"}}, "tool_choice.name"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
]


@pytest.mark.parametrize(
    ("change", "named"), REFUSALS, ids=[f"{i}-{named}" for i, (_, named) in enumerate(REFUSALS)]
)
async def test_what_is_refused_is_named(serve, text_model: TextModel, change: dict[str, Any], named: str) -> None:
    async with serve(ScriptedBackend(encode(text_model, "no"))) as client:
        response = await client.post("/v1/messages", json={**BODY, **change})
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["request_id"] == response.headers["request-id"]
    assert named in error["error"]["message"]


async def test_fields_without_effect_are_named(serve, text_model: TextModel) -> None:
    body = {
        **BODY,
        "metadata": {"user_id": "me"},
        "diagnostics": {"previous_message_id": None},
        "speed": "fast",
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": []},
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}}],
        "tool_choice": {"type": "none"},
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "prompt-caching-2024-07-31", "x-api-key": "k"}
    async with serve(ScriptedBackend(encode(text_model, "ok"))) as client:
        response = await client.post("/v1/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-localmoe-ignored"].split(", ")) == {
        "metadata",
        "diagnostics",
        "speed",
        "service_tier",
        "cache_control",
        "context_management",
        "thinking.budget_tokens",
        "tools.cache_control",
    }


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (OverloadedError("the queue is full"), 529, "overloaded_error"),
        (BackendUnavailableError("no engine"), 503, "api_error"),
        (EngineFaultError("broken"), 500, "api_error"),
    ],
)
async def test_failures_have_the_shape_of_this_api(serve, text_model, failure, status: int, kind: str) -> None:
    backend = ScriptedBackend(encode(text_model, "never"), failure=ScriptedFailure(error=failure))
    async with serve(backend) as client:
        for stream in (False, True):
            response = await client.post("/v1/messages", json={**BODY, "stream": stream})
            assert response.status_code == status
            assert response.json() == {
                "type": "error",
                "error": {"type": kind, "message": str(failure)},
                "request_id": response.headers["request-id"],
            }
        assert ("retry-after" in response.headers) == (status in (503, 529))


async def test_a_stream_that_breaks_off_ends_with_an_error_event(serve, text_model: TextModel) -> None:
    backend = ScriptedBackend(
        encode(text_model, "Hello world"),
        failure=ScriptedFailure(error=EngineFaultError("broken"), after_tokens=2),
    )
    async with serve(backend) as client:
        response = await client.post("/v1/messages", json={**BODY, "stream": True})
    events = events_of(response.text)
    assert events[0][0] == "message_start"
    assert events[-1] == (
        "error",
        {
            "type": "error",
            "error": {"type": "api_error", "message": "broken"},
            "request_id": response.headers["request-id"],
        },
    )


@pytest.mark.parametrize(
    ("request_of", "status", "kind"),
    [
        ({"json": {**BODY, "model": "other"}}, 404, "not_found_error"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_request_error"),
        ({"content": b"x" * 2000, "headers": {"content-type": "application/json"}}, 413, "request_too_large"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "invalid_request_error"),
    ],
)
async def test_refusals_before_the_route_have_it_too(
    serve, text_model, request_of, status: int, kind: str
) -> None:
    config = GatewayConfig(max_body_bytes=1000)
    async with serve(ScriptedBackend(encode(text_model, "no")), config=config) as client:
        response = await client.post("/v1/messages", **request_of)
        unknown = await client.get("/v1/messages/batches")
        elsewhere = await client.get("/v1/messagesx")
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert int(response.headers["content-length"]) == len(response.content)
    assert unknown.json()["error"]["type"] == "not_found_error"
    assert elsewhere.json()["error"]["param"] is None


class _Silent(ScriptedBackend):
    """Says nothing at first, for longer than a gateway does, whose timer began before."""

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        await asyncio.sleep(0.1)
        async for chunk in super().generate(request):
            yield chunk


async def test_pings_are_sent_where_there_is_silence(serve, text_model: TextModel) -> None:
    backend = _Silent(encode(text_model, "ok"))
    async with serve(backend, config=GatewayConfig(keepalive_s=0.01)) as client:
        events = events_of((await client.post("/v1/messages", json={**BODY, "stream": True})).text)
    assert events[0] == ("ping", {"type": "ping"})
    assert events[-1][0] == "message_stop"


async def test_counting_needs_a_tokenizer_and_a_model(serve, text_model: TextModel, tmp_path: Path) -> None:
    body = {"model": "other", "messages": BODY["messages"]}
    async with serve(ScriptedBackend(encode(text_model, "ok"))) as client:
        missing = await client.post("/v1/messages/count_tokens", json=body)
        refused = await client.post("/v1/messages/count_tokens", json={**body, "model": "tiny", "max_tokens": 5})
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"
    assert "max_tokens" in refused.json()["error"]["message"]
