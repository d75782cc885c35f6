"""Requests with grammars and the engines that are not ours: passed on in their words, or refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.deepspeed import DeepSpeedBackend
from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.remote import RemoteBackend
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.vllm import ServedModel, VllmBackend
from localmoe.backends.vllm_client import VllmClient
from localmoe.backends.vllm_config import VllmConfig, command
from localmoe.core.events import EventBus
from localmoe.core.request import Grammar, PromptSource, Request, SamplingParams
from localmoe.text.grammar_source import written
from support.fake_openai import DONE, FakeOpenAI, chunk
from support.fake_vllm import VOCAB_SIZE, fake_vllm

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"const": 1.0}}}
OBJECT = Grammar(kind="json_object")
BY_SCHEMA = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
REGEX = Grammar(kind="regex", source="a+")
RULES = Grammar(kind="lark", source='start: "a"')
CHOICE = Grammar(kind="choice", source='["yes", "no"]')


def request(grammar: Grammar | None, source: PromptSource | None = None, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=3, temperature=0.0, grammar=grammar)
    return Request(
        **{"id": "a", "model": "m", "prompt_ids": [5], "sampling": sampling, "source": source, **fields}
    )


@pytest.mark.parametrize(
    ("grammar", "structured_outputs"),
    [
        (OBJECT, {"json_object": True}),
        (BY_SCHEMA, {"json": json.dumps(SCHEMA)}),
        (REGEX, {"regex": "a+"}),
        (RULES, {"grammar": 'start: "a"'}),
        (CHOICE, {"choice": ["yes", "no"]}),
    ],
)
async def test_vllm_is_asked_in_its_words(grammar: Grammar, structured_outputs: dict[str, Any]) -> None:
    async with fake_vllm() as fake, asyncio.timeout(10):
        client = VllmClient(url=fake.url, vocab_size=VOCAB_SIZE)
        for asked in (request(grammar), request(None)):
            assert [chunk async for chunk in client.generate(asked, "m")]
        await client.close()
    with_grammar, without = fake.questions
    assert with_grammar["structured_outputs"] == structured_outputs
    assert with_grammar["ignore_eos"] is False
    assert "structured_outputs" not in without
    assert without["ignore_eos"] is True


@pytest.mark.parametrize("grammar", [OBJECT, BY_SCHEMA, REGEX, RULES, CHOICE])
async def test_a_vllm_server_of_ours_gets_what_was_tried(grammar: Grammar) -> None:
    async with fake_vllm() as fake, asyncio.timeout(10):
        client = VllmClient(url=fake.url, vocab_size=VOCAB_SIZE, write_grammar=written)
        assert [chunk async for chunk in client.generate(request(grammar), "m")]
        await client.close()
    (question,) = fake.questions
    assert question["structured_outputs"] == {"grammar": written(grammar)}
    # With forcing it would follow a repeat of a million to its end before each token.
    assert '{"no_forcing": true}' in written(grammar)


def vllm(**config: Any) -> VllmBackend:
    return VllmBackend(
        model=ServedModel(name="m", vocab_size=VOCAB_SIZE),
        model_path=Path("checkpoint"),
        config=VllmConfig(**config),
        python=Path("python"),
        on_gpu=False,
        write_grammar=written,
        bus=EventBus(),
    )


def test_vllm_does_not_go_on_within_a_sentence() -> None:
    assert vllm().refusal(request(REGEX)) is None
    assert "grammar" in (vllm().refusal(request(REGEX, resumed_ids=[1])) or "")
    assert vllm().refusal(request(None, resumed_ids=[1])) is None


def test_rules_are_for_vllm_servers_that_read_them_as_we_do() -> None:
    assert vllm().refusal(request(RULES)) is None
    foreign = vllm(url="http://localhost:1")
    assert "rules" in (foreign.refusal(request(RULES)) or "")
    assert foreign.refusal(request(BY_SCHEMA)) is None
    words = command(
        VllmConfig(),
        python=Path("python"),
        model="m",
        model_path=Path("m"),
        socket=Path("s"),
        on_gpu=False,
    )
    assert json.loads(words[words.index("--structured-outputs-config") + 1]) == {"backend": "guidance"}


def test_deepspeed_takes_none() -> None:
    backend = DeepSpeedBackend(
        model="m", model_path=Path("m"), config=DeepSpeedConfig(), python=Path("python"), bus=EventBus()
    )
    assert "grammars" in (backend.refusal(request(OBJECT)) or "")
    assert backend.refusal(request(None)) is None


@pytest.mark.parametrize(
    ("grammar", "is_taken"), [(OBJECT, True), (BY_SCHEMA, True), (REGEX, False), (RULES, False), (CHOICE, False)]
)
def test_other_servers_take_json_in_answers_to_messages(grammar: Grammar, is_taken: bool) -> None:
    backend = RemoteBackend(config=RemoteConfig(url="http://localhost:1/v1", model="there"))
    asked = PromptSource(messages=MESSAGES, content_grammar=grammar)
    # Of what the model writes, with what it thinks before.
    for whole in (grammar, RULES):
        assert (backend.refusal(request(whole, asked)) is None) == is_taken
    assert backend.refusal(request(grammar, PromptSource(text="hi"))) is not None
    assert backend.refusal(request(None, PromptSource(text="hi"))) is None


async def test_other_servers_are_asked_for_a_response_format() -> None:
    server = FakeOpenAI([chunk("{}"), chunk(None, "stop"), DONE])
    async with server.running(), asyncio.timeout(10):
        backend = RemoteBackend(config=RemoteConfig(url=server.url, model="there"))
        await backend.start()
        for grammar in (OBJECT, BY_SCHEMA, None):
            asked = request(grammar, PromptSource(messages=MESSAGES, content_grammar=grammar))
            assert [piece async for piece in backend.generate(asked)]
        await backend.stop()
    formats = [body.get("response_format") for _, body in server.bodies]
    assert formats == [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
        None,
    ]
    # The order of properties is the order in which they are written.
    assert list(formats[1]["json_schema"]["schema"]["properties"]) == ["b", "a"]


NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("choice", "content", "is_taken"),
    [
        ("required", None, True),
        ("required", REGEX, True),
        (NAMED, BY_SCHEMA, True),
        ("auto", None, False),
        ("none", REGEX, False),
    ],
)
async def test_other_servers_are_told_that_there_must_be_calls(
    choice: object, content: Grammar | None, is_taken: bool
) -> None:
    """The grammar of the calls is of our own model's marks; they have their own. Beside calls there is no content."""
    server = FakeOpenAI([chunk("{}"), chunk(None, "stop"), DONE])
    async with server.running(), asyncio.timeout(10):
        backend = RemoteBackend(config=RemoteConfig(url=server.url, model="there"))
        await backend.start()
        parameters = {"tools": [], "tool_choice": choice}
        asked = request(RULES, PromptSource(messages=MESSAGES, parameters=parameters, content_grammar=content))
        assert (backend.refusal(asked) is None) == is_taken
        assert [piece async for piece in backend.generate(asked)]
        await backend.stop()
    ((_, body),) = server.bodies
    assert body["tool_choice"] == choice
    assert "response_format" not in body
