"""Tools, reasoning and response formats: what the model sees, what engines are asked, what comes back."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tokenizers

from localmoe.backends.remote import RemoteBackend
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.request import FinishReason, Request, TokenChunk, ToolCallDelta, Usage
from localmoe.gateway.context import ServedModel
from localmoe.gateway.openai.chat_schema import ChatCompletion, ChatCompletionChunk
from localmoe.text.text_model import TextModel
from support.fake_openai import DONE, FakeOpenAI, chunk
from support.tiny_text import encode, gateway_app, served_model, write_tiny_text_model

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HISTORY = [
    {"role": "user", "content": "Weather in Paris?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I must ask.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<{{ message.role }}>"
    "{{ message.reasoning_content }}{{ message.content }}{% for call in message.tool_calls %}"
    "{{ call.function.name }}={{ call.function.arguments | tojson }}/{{ '' + call.function.arguments }}"
    "{% endfor %}{% endfor %}<assistant>{{ '<tool_call>' if false }}"
)
THINKING_TEMPLATE = (
    TOOL_TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% endif %}{{ reasoning_effort }}"
)


@pytest.fixture(scope="session")
def tool_text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    directory = tmp_path_factory.mktemp("tools")
    return TextModel.load(write_tiny_text_model(directory, chat_template=TOOL_TEMPLATE))


@pytest.fixture(scope="session")
def thinking_text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    directory = tmp_path_factory.mktemp("thinking")
    return TextModel.load(write_tiny_text_model(directory, chat_template=THINKING_TEMPLATE))


def mistral_text(directory: Path) -> TextModel:
    """Its marks are special tokens."""
    write_tiny_text_model(
        directory, chat_template="{{ messages[0].content }}{{ tools }}{{ '[TOOL_CALLS]' if false }}"
    )
    path = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[INST]"])
    tokenizer.save(str(path))
    (directory / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    return TextModel.load(directory)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI, **fields}


class Recorder:
    """A scripted backend that keeps what it was asked."""

    def __init__(self, text: TextModel, answer: str, **options: Any) -> None:
        self.text = text
        self.seen: list[Request] = []
        self.backend = ScriptedBackend(self._script, **options)
        self._answer = answer

    def _script(self, request: Request) -> list[int]:
        self.seen.append(request)
        return encode(self.text, self._answer)

    @property
    def prompt(self) -> str:
        return self.text.tokenizer.decode(self.seen[-1].prompt_ids, skip_special_tokens=False)


async def ask(recorder: Recorder, **fields: Any) -> httpx2.Response:
    await recorder.backend.start()
    model = served_model(recorder.text, recorder.backend, context_tokens=100_000)
    transport = httpx2.ASGITransport(app=gateway_app(model))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        # json.dumps writes NaN, Infinity and lone surrogates, as careless clients do.
        content = json.dumps(body(**fields))
        return await client.post(URL, content=content, headers={"content-type": "application/json"})


def chunks_of(raw: str) -> list[dict[str, Any]]:
    events = raw.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    for one in chunks:
        ChatCompletionChunk.model_validate(one, extra="forbid")
    return [one["choices"][0] for one in chunks]


async def test_a_tool_call_in_one_piece(tool_text: TextModel) -> None:
    recorder = Recorder(tool_text, f"Let me see.\n{CALL}")
    response = await ask(recorder, tools=[WEATHER, NOW])
    answer = response.json()
    ChatCompletion.model_validate(answer, extra="forbid")
    choice = answer["choices"][0]
    call = choice["message"].pop("tool_calls")[0]
    assert choice["message"] == {"role": "assistant", "content": "Let me see.", "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    assert json.dumps(WEATHER) in recorder.prompt
    assert recorder.seen[0].sampling.grammar is None
    assert "x-localmoe-ignored" not in response.headers


async def test_only_calls_leave_the_content_null(tool_text: TextModel) -> None:
    response = await ask(Recorder(tool_text, CALL + "\n" + CALL), tools=[WEATHER])
    message = response.json()["choices"][0]["message"]
    assert message["content"] is None
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_a_tool_call_in_a_stream(tool_text: TextModel) -> None:
    response = await ask(Recorder(tool_text, "Hi" + CALL), tools=[WEATHER], stream=True)
    choices = chunks_of(response.text)
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hi"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    first = {"name": "get_weather", "arguments": ""}
    assert calls[0] == {"index": 0, "id": calls[0]["id"], "type": "function", "function": first}
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])
    assert len(calls) > 5
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Paris"}'
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert deltas[-1] == {}


async def test_an_answer_that_breaks_off_in_a_call(tool_text: TextModel) -> None:
    recorder = Recorder(tool_text, CALL)
    response = await ask(recorder, tools=[WEATHER], max_tokens=len(encode(tool_text, CALL)) - 20)
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert '{"city": "Paris"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_no_tools_no_calls(tool_text: TextModel) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        recorder = Recorder(tool_text, CALL)
        response = await ask(recorder, **fields)
        choice = response.json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
        assert choice["finish_reason"] == "stop"
        assert "get_weather" not in recorder.prompt


async def test_one_call_at_most_frees_the_engine(tool_text: TextModel) -> None:
    recorder = Recorder(tool_text, CALL + CALL + "never sent" * 5)
    response = await ask(recorder, tools=[WEATHER], parallel_tool_calls=False)
    choice = response.json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert recorder.backend.num_cancelled == 1
    assert response.json()["usage"]["completion_tokens"] < len(encode(tool_text, CALL + CALL))


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"tool_choice": "required"}, 2),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, 1),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 2),
    ],
)
async def test_a_forced_call_is_a_grammar(tool_text: TextModel, fields: dict[str, Any], count: int) -> None:
    recorder = Recorder(tool_text, CALL)
    await ask(recorder, tools=[WEATHER, NOW], **fields)
    grammar = recorder.seen[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "lark"
    assert grammar.source.count("%json") == count
    assert ("get_weather" in grammar.source) == (count == 2)
    assert ("call)*" in grammar.source) == (fields == {"tool_choice": "required"})


async def test_tools_and_a_response_format_are_alternatives(tool_text: TextModel) -> None:
    recorder = Recorder(tool_text, '{"a": 1}')
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    response_format = {"type": "json_schema", "json_schema": schema}
    answer = (await ask(recorder, tools=[WEATHER], response_format=response_format)).json()
    assert answer["choices"][0]["message"]["content"] == '{"a": 1}'
    grammar = recorder.seen[0].sampling.grammar
    assert grammar is not None
    assert grammar.source.startswith("start: (calls | content)\n")
    await ask(recorder, response_format=response_format)
    plain = recorder.seen[1].sampling.grammar
    assert plain is not None
    assert plain.kind == "json_schema"
    await ask(recorder, response_format={"type": "json_object"}, messages=HI)
    assert recorder.seen[2].sampling.grammar is not None


async def test_what_was_called_and_thought_is_given_to_the_template(tool_text: TextModel) -> None:
    recorder = Recorder(tool_text, "ok")
    assert (await ask(recorder, messages=HISTORY, tools=[WEATHER])).is_success
    call = 'get_weather={"city": "Paris"}/{"city": "Paris"}'
    assert recorder.prompt.endswith(
        f"<user>Weather in Paris?<assistant>I must ask.None{call}<tool>sunny<assistant>"
    )


async def test_arguments_that_are_no_json_stay_text(tool_text: TextModel) -> None:
    messages = json.loads(json.dumps(HISTORY))
    messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Par'
    recorder = Recorder(tool_text, "ok")
    assert (await ask(recorder, messages=messages)).is_success
    assert 'get_weather="{\\"city\\": \\"Par"/{"city": "Par<tool>' in recorder.prompt


async def test_a_template_without_tools_is_told_of_them(text_model: TextModel) -> None:
    recorder = Recorder(text_model, CALL)
    answer = (await ask(recorder, messages=HISTORY, tools=[WEATHER])).json()
    assert answer["choices"][0]["message"]["tool_calls"]
    assert "You may call functions" in recorder.prompt
    text = text_model.render_chat(
        [{"role": "user", "content": "q"}, *recorded_history(), {"role": "tool", "content": "late"}],
        tools=[WEATHER],
    )
    system, *rest = text.split("<|im_start|>")[1:]
    assert system.startswith("system\n")
    assert json.dumps(WEATHER["function"]) in system
    assert '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>' in system
    assert rest == [
        "user\nq<|im_end|>\n",
        f"assistant\nHm.\n{CALL}<|im_end|>\n",
        "user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nlate\n</tool_response><|im_end|>\n",
        "assistant\n",
    ]
    added = text_model.render_chat([{"role": "system", "content": "Be brief."}, *HI], tools=[WEATHER])
    assert added.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions")
    assert added.count("<|im_start|>system") == 1


def recorded_history() -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    return [
        {"role": "assistant", "content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]


async def test_marks_that_are_special_tokens_are_seen_where_they_count(tmp_path: Path) -> None:
    text = mistral_text(tmp_path)
    recorder = Recorder(text, '[INST]Hm[TOOL_CALLS] [{"name": "get_weather", "arguments": {}}]')
    message = (await ask(recorder, tools=[WEATHER])).json()["choices"][0]["message"]
    assert message["content"] == "Hm"
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
    assert len(message["tool_calls"][0]["id"]) == 9
    plain = (await ask(recorder)).json()["choices"][0]["message"]
    assert plain["content"] == 'Hm [{"name": "get_weather", "arguments": {}}]'
    await ask(recorder, tools=[WEATHER], tool_choice="required")
    grammar = recorder.seen[-1].sampling.grammar
    assert grammar is not None
    assert f'calls: <[{text.tokenizer.token_id("[TOOL_CALLS]")}]> " ["' in grammar.source


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_goes_its_own_way(thinking_text: TextModel, stream: bool) -> None:
    recorder = Recorder(thinking_text, f"\nMust ask.\n</think>\n\n{CALL}")
    response = await ask(recorder, tools=[WEATHER], stream=stream)
    assert recorder.prompt.endswith("<think>\n")
    if stream:
        deltas = [choice["delta"] for choice in chunks_of(response.text)]
        reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
        content = "".join(delta.get("content", "") for delta in deltas)
        assert any(delta.get("tool_calls") for delta in deltas)
    else:
        message = response.json()["choices"][0]["message"]
        reasoning, content = message["reasoning_content"], message["content"]
        assert message["tool_calls"][0]["function"]["name"] == "get_weather"
    assert reasoning == "Must ask."
    assert not content


async def test_how_much_to_think(tool_text: TextModel, thinking_text: TextModel) -> None:
    recorder = Recorder(thinking_text, "Hi")
    low = await ask(recorder, reasoning_effort="low")
    assert recorder.prompt.endswith("<think>\nlow")
    assert (await ask(recorder, reasoning_effort="max")).is_success
    assert recorder.prompt.endswith("max")
    none = await ask(recorder, reasoning_effort="none")
    assert recorder.prompt.endswith("<assistant>none")
    assert none.json()["choices"][0]["message"]["content"] == "Hi"
    assert (await ask(recorder, chat_template_kwargs={"enable_thinking": False})).is_success
    assert recorder.prompt.endswith("<assistant>")
    ignored = await ask(
        Recorder(tool_text, "Hi"),
        reasoning_effort="low",
        verbosity="high",
        documents=[{"text": "x"}],
        chat_template_kwargs={"tools_first": True, "message": 1},
    )
    assert ignored.headers["x-localmoe-ignored"] == (
        "verbosity, reasoning_effort, documents, chat_template_kwargs.tools_first"
    )
    assert "x-localmoe-ignored" not in low.headers


async def test_grammars_let_a_model_think_first(thinking_text: TextModel) -> None:
    recorder = Recorder(thinking_text, "x")
    await ask(recorder, response_format={"type": "json_object"})
    grammar = recorder.seen[0].sampling.grammar
    assert grammar is not None
    assert grammar.source.startswith("start: thought (content)\n")
    await ask(recorder, response_format={"type": "json_object"}, reasoning_effort="none")
    grammar = recorder.seen[1].sampling.grammar
    assert grammar is not None
    assert grammar.source.startswith("start: thought? (content)\n")


async def test_strict_is_named_where_nothing_enforces_it(tool_text: TextModel) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    auto = await ask(Recorder(tool_text, "x"), tools=[strict])
    forced = await ask(Recorder(tool_text, CALL), tools=[strict], tool_choice="required")
    assert auto.headers["x-localmoe-ignored"] == "tools.function.strict"
    assert "x-localmoe-ignored" not in forced.headers


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


def params(**schema: Any) -> dict[str, Any]:
    return tool(parameters=schema)


deep: dict[str, Any] = {}
for _ in range(40):
    deep = {"properties": {"a": deep}}
NAMED = {"type": "function", "function": {"name": "g"}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    (tool(name="a b"), "match pattern", "tools[0].function.name"),
    (tool(name="a" * 65), "match pattern", "tools[0].function.name"),
    (tool(name=""), "match pattern", "tools[0].function.name"),
    ({"tools": tool()["tools"] * 2}, "two tools have the name 'f'", "tools"),
    ({"tools": [tool(name=f"f{i}")["tools"][0] for i in range(129)]}, "at most 128 items", "tools"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools of type 'custom' are not supported", "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "is required", "tools[0].function"),
    ({"tools": [1]}, "tools are objects with a type", "tools[0].type"),
    (params(type="string"), "arguments are an object", "tools[0].function.parameters.type"),
    (params(type=["object", 5]), "arguments are an object", "tools[0].function.parameters.type"),
    (params(properties=[]), "an object of schemas", "tools[0].function.parameters.properties"),
    (params(properties={"a": 5}), "no JSON Schema", "tools[0].function.parameters.properties.a"),
    (params(properties={"a": {"type": "text"}}), "one of array", "tools[0].function.parameters.properties.a.type"),
    (params(anyOf={}), "a list of schemas", "tools[0].function.parameters.anyOf"),
    (params(required="a"), "a list of names", "tools[0].function.parameters.required"),
    (params(required=[1]), "a list of names", "tools[0].function.parameters.required"),
    (params(**deep), "nested deeper than 32", "tools[0].function.parameters"),
    (params(title="\ud800"), "no JSON", "tools[0].function.parameters"),
    (params(default=float("nan")), "no JSON", "tools[0].function.parameters"),
    (params(description="x" * 70_000), "at most 65536", "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "needs tools", "tool_choice"),
    ({"tool_choice": NAMED, **tool()}, "'g' is none of the tools", "tool_choice.function.name"),
    ({"tool_choice": "sometimes", **tool()}, "'none', 'auto' or 'required'", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}, **tool()}, "not supported", "tool_choice.type"),
    (
        {"tool_choice": "required", **params(properties={"a": {"pattern": "(?=a)", "type": "string"}})},
        "tools: ",
        "tools",
    ),
    ({"tool_choice": "required", **params(properties={"a": {"$ref": "#/nope"}})}, "tools: ", "tools"),
    ({"parallel_tool_calls": 1}, "valid boolean", "parallel_tool_calls"),
    ({"reasoning_effort": "huge"}, "Input should be", "reasoning_effort"),
    ({"chat_template_kwargs": {"messages": []}}, "no name to give", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"__class__": 1}}, "no name to give", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": "\udc00"}}, "no JSON", "chat_template_kwargs"),
    ({"chat_template_kwargs": {f"a{i}": 1 for i in range(65)}}, "at most 64", "chat_template_kwargs"),
    ({"documents": [{"a": float("inf")}]}, "no JSON", "documents[0]"),
    ({"functions": [{}]}, "not supported", "functions"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "required with role 'tool'", "messages[0].tool_call_id"),
    (
        {"messages": [*HISTORY[:2], {"role": "tool", "content": "x", "tool_call_id": "no"}]},
        "no earlier message has a tool call of the id 'no'",
        "messages[2].tool_call_id",
    ),
    ({"messages": [{"role": "assistant"}]}, "required", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
        "only a message of role 'assistant'",
        "messages[0].reasoning_content",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
        "not supported",
        "messages[0].tool_calls[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
        "no content parts of type 'image_url'",
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
        "content parts of type 'video_url' are not supported",
        "messages[0].content[0].type",
    ),
]


@pytest.mark.parametrize(("fields", "words", "param"), BAD, ids=[f"{i}-{case[2]}" for i, case in enumerate(BAD)])
async def test_bad_tools(tool_text: TextModel, fields: dict[str, Any], words: str, param: str) -> None:
    response = await ask(Recorder(tool_text, "x"), **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == param


class TextEngine:
    """Answers in text, and has parsed it."""

    def __init__(self) -> None:
        self.seen: list[Request] = []

    @property
    def is_ready(self) -> bool:
        return True

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        self.seen.append(request)
        yield TokenChunk(request_id=request.id, text="", reasoning="Hm.")
        yield TokenChunk(request_id=request.id, text="<think>Hi")
        call = ToolCallDelta(index=0, id="call_7", name="get_weather")
        yield TokenChunk(request_id=request.id, text="", tool_calls=(call,))
        more = ToolCallDelta(index=0, arguments="{}")
        yield TokenChunk(request_id=request.id, text="", tool_calls=(more,))
        usage = Usage(prompt_tokens=3, completion_tokens=9)
        yield TokenChunk(request_id=request.id, finish_reason=FinishReason.TOOL_CALLS, usage=usage)


async def test_a_model_of_another_server_gets_all_that_was_said() -> None:
    engine = TextEngine()
    model = ServedModel(id="far", created=1, text=None, context_tokens=None, generator=engine)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}
    audio = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    messages = [*HISTORY, {"role": "user", "content": [{"type": "text", "text": "And this?"}, image, audio]}]
    fields = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
    }
    transport = httpx2.ASGITransport(app=gateway_app(model))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = (await client.post(URL, json={"model": "far", "messages": messages, **fields})).json()
        refused = await client.post(URL, json={"model": "far", "messages": HI, "documents": [{"text": "x"}]})
    source = engine.seen[0].source
    assert source is not None
    assert source.messages == messages
    assert source.parameters == fields
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "<think>Hi")
    assert message["tool_calls"] == [
        {"id": "call_7", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    ]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert refused.json()["error"]["param"] == "documents"


async def test_forced_calls_of_an_engine_elsewhere_whose_tokenizer_is_here(thinking_text: TextModel) -> None:
    """It is asked in the API's own words for calls or JSON, whatever the language of our model's marks is."""
    call = {"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    schema = {"type": "object", "properties": {"a": {"const": 1}}}
    in_json = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    server = FakeOpenAI()
    async with server.running():
        backend = RemoteBackend(config=RemoteConfig(url=server.url, model="there"))
        await backend.start()
        app = gateway_app(served_model(thinking_text, backend, context_tokens=100_000))
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
            calls = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}
            server.pieces = [b"data: " + json.dumps(calls).encode() + b"\n\n", DONE]
            called = await client.post(URL, json=body(tools=[WEATHER], tool_choice="required"))
            server.pieces = [chunk('{"a": 1}'), chunk(finish="stop"), DONE]
            formatted = await client.post(URL, json=body(response_format=in_json))
        await backend.stop()
    (choice,) = called.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == call["function"]
    assert formatted.json()["choices"][0]["message"]["content"] == '{"a": 1}'
    asked = [sent for _, sent in server.bodies]
    assert [sent.get("tool_choice") for sent in asked] == ["required", None]
    assert [sent.get("response_format") for sent in asked] == [None, in_json]
