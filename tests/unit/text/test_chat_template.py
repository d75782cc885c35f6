"""Templates as transformers renders them, and what the sandbox keeps out."""

import asyncio
import json
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from localmoe.core.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    OverloadedError,
)
from localmoe.text import chat_template
from localmoe.text.chat_template import ChatTemplate
from support.tiny_text import CHAT_TEMPLATE, write_tiny_text_model

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "héllo\n"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "again"},
]
TEMPLATES = [
    CHAT_TEMPLATE,
    "{{ bos_token }}{% for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n"
    "    {{ m | tojson }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 2 %}{% break %}{% endif %}{{ m.content.strip() }}|{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}{% endif %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{% if tools %}tools{% endif %}{{ undefined_name }}{{ eos_token }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_rendering_equals_transformers(tmp_path, source: str) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tiny_text_model(tmp_path, chat_template=source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, special_tokens=special).render(MESSAGES) == expected


def test_the_clock_is_visible() -> None:
    before = datetime.now().strftime("%d %b %Y")
    said = ChatTemplate("{{ strftime_now('%d %b %Y') }}", special_tokens={}).render([])
    assert said in (before, datetime.now().strftime("%d %b %Y"))


def test_developer_becomes_system_where_the_template_has_no_word_of_it() -> None:
    message = [{"role": "developer", "content": "x"}]
    assert ChatTemplate("{{ messages[0].role }}", special_tokens={}).render(message) == "system"
    aware = "{% if messages[0].role == 'developer' %}D{% endif %}"
    assert ChatTemplate(aware, special_tokens={}).render(message) == "D"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.deeper }}", "has no attribute"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% for i in range(10000000) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_failing_template_is_a_bad_request(source: str, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint) as caught:
        ChatTemplate(source, special_tokens={}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_prompt_is_bounded_in_size() -> None:
    template = ChatTemplate("{% for i in range(n) %}{{ 'x' * 1000 }}{% endfor %}", special_tokens={})
    assert len(template.render([], arguments={"n": 1000})) == 1_000_000
    with pytest.raises(InvalidRequestError, match="the prompt has more than 33554432 characters"):
        template.render([], arguments={"n": 40_000})


DOUBLED = "{% set ns = namespace(s=messages) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
HOSTILE = {
    "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless recursion of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a huge number": "{{ (messages | length + 9) ** (9 ** 9) }}",
    "a huge text": "{{ 'x' * (10 ** 9 + messages | length) }}",
    "a huge width": "{{ messages[0].content.ljust(10 ** 9) }}",
    "a text doubled": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}",
    "a list doubled, compared": DOUBLED
    + "{% set ns.t = ns.s %}"
    + DOUBLED.replace("ns", "no")
    + "{{ ns.s == no.s }}",
    "a list doubled, shown": DOUBLED + "{{ ns.s }}",
    "a huge batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "words that are far apart": "{{ 'a' | indent(10 ** 9, first=true) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_time_and_says_so(name: str) -> None:
    template = ChatTemplate(
        "{% if messages | length > 1 %}" + HOSTILE[name] + "{% else %}ok{% endif %}", special_tokens={}
    )
    assert template.render(MESSAGES[:1]) == "ok"
    started_s = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"does not take these messages: .*too much (time|memory)"):
        template.render(MESSAGES)
    assert time.monotonic() - started_s < 2.0
    assert template.render(MESSAGES[:1]) == "ok"


@pytest.mark.parametrize(
    "source", ["{{ 9 ** (9 ** 9) }}", "{{ 'x' * 10 ** 9 ~ 'x' * 10 ** 9 }}", "{{ [[[" * 90_000]
)
def test_a_template_that_is_hostile_to_compile_is_refused(source: str) -> None:
    """Jinja folds constants when it compiles."""
    started_s = time.monotonic()
    with pytest.raises(ValueError, match=r"the chat template is not valid: |does not take these messages: "):
        ChatTemplate(source, special_tokens={}).render(MESSAGES)  # the constant may be left for later
    assert time.monotonic() - started_s < 3.0


def test_what_cannot_be_told_to_a_template_is_refused() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for odd in (deep, 10**5000):
        with pytest.raises(InvalidRequestError):
            ChatTemplate("x", special_tokens={}).render([], arguments={"x": odd})


def test_arguments_of_calls_are_an_object_and_its_text() -> None:
    source = (
        "{% for c in messages[0].tool_calls %}{% set a = c.function.arguments %}"
        "{{ a.x }}/{{ a }}/{{ 'a' + a }};{% endfor %}"
    )
    said = ['{"x":  1}', "", "no JSON", "[1]"]
    calls = [{"function": {"name": "f", "arguments": text}} for text in said]
    rendered = ChatTemplate(source, special_tokens={}).render([{"role": "assistant", "tool_calls": calls}])
    assert rendered == '1/{"x":  1}/a{"x":  1};/{}/a{};/no JSON/ano JSON;/[1]/a[1];'


def test_texts_come_through_as_they_are() -> None:
    odd = 'é漢🙂 \u2028 \x00 \\ " </s> \r\n'
    template = ChatTemplate("{{ bos }}{{ messages[0].content }}", special_tokens={"bos": "<s>"})
    assert template.render([{"role": "user", "content": odd * 10_000}]) == "<s>" + odd * 10_000


async def test_who_has_to_wait_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("x", special_tokens={})
    monkeypatch.setattr(chat_template, "_MAX_WAITING", 2)
    release = threading.Event()
    waiting = [asyncio.create_task(template.in_turn(release.wait, 10)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="too many conversations"):
        await template.in_turn(release.wait, 10)
    release.set()
    assert await asyncio.gather(*waiting) == [True, True]
    assert await template.in_turn(template.render, []) == "x"


def test_a_file_in_place_of_the_models_own(tmp_path: Path) -> None:
    file = tmp_path / "brief.jinja"
    file.write_text("{{ messages[0].content }}!")
    assert ChatTemplate.read(file, special_tokens={}).render(MESSAGES) == MESSAGES[0]["content"] + "!"
    file.write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"chat_template is '.*brief\.jinja': the chat template is not valid"):
        ChatTemplate.read(file, special_tokens={})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ChatTemplate.read(tmp_path / "none.jinja", special_tokens={})


def test_where_templates_are_found(tmp_path) -> None:
    write_tiny_text_model(tmp_path, chat_template=None)
    assert ChatTemplate.load(tmp_path, special_tokens={}) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    template = ChatTemplate.load(tmp_path, special_tokens={})
    assert template is not None
    assert template.render([]) == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path, special_tokens={})
    assert template is not None
    assert template.render([]) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    template = ChatTemplate.load(tmp_path, special_tokens={})
    assert template is not None
    assert template.render([]) == "three"


@pytest.mark.parametrize(
    ("content", "complaint"), [("{% for %}", "not valid"), ("x" * (2**20 + 1), "larger than")]
)
def test_a_damaged_template_is_named(tmp_path, content: str, complaint: str) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        ChatTemplate.load(tmp_path, special_tokens={})
    assert str(caught.value).startswith(str(path))


async def test_closed_it_renders_no_more() -> None:
    template = ChatTemplate("x", special_tokens={})
    assert await template.in_turn(template.render, []) == "x"
    template.close()
    with pytest.raises(BackendUnavailableError):
        await template.in_turn(template.render, [])
    with pytest.raises(BackendUnavailableError):
        template.render([])
