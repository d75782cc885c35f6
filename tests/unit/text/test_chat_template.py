"""Templates as transformers renders them, and what the sandbox keeps out."""

import json
import time
from datetime import datetime

import pytest

from localmoe.core.errors import CheckpointError, InvalidRequestError
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
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}", special_tokens={}, now=lambda: datetime(2026, 11, 21)
    )
    assert template.render([]) == "21 Nov 2026"


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


def test_results_are_bounded_in_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for i in range(1000) %}{{ 'x' * 100 }}{% endfor %}", special_tokens={})
    assert len(template.render([])) == 100_000
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 50_000)
    with pytest.raises(InvalidRequestError, match="over 50000 characters"):
        template.render([])
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 10**9)
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.05)
    started_s = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"took over 0\.05 s"):
        ChatTemplate(endless, special_tokens={}).render([])
    assert time.monotonic() - started_s < 5


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
