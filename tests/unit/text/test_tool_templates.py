"""What templates are given of tools, calls and thoughts, each as far as it knows of them."""

from pathlib import Path
from typing import Any

from localmoe.text.text_model import TextModel
from support.tiny_text import write_tiny_text_model

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def model(directory: Path, template: str, **options: Any) -> TextModel:
    return TextModel.load(write_tiny_text_model(directory, chat_template=template), **options)


def test_tools_documents_and_further_names(tmp_path: Path) -> None:
    text = model(tmp_path, "{{ tools }}|{{ documents }}|{{ level }}|{{ messages | length }}|{{ bos_token }}")
    said = [{"role": "user", "content": "x"}]
    assert text.render_chat(said) == "None|None||1|<|im_start|>"
    rendered = text.render_chat(
        said, tools=[TOOL], documents=[{"a": 1}], arguments={"level": 3, "messages": [], "tools": []}
    )
    assert rendered == f"{[TOOL]}|{[{'a': 1}]}|3|1|<|im_start|>"


def test_a_template_that_knows_calls_but_no_tools(tmp_path: Path) -> None:
    """As DeepSeek's is."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ (m.tool_calls or [{}])[0].id }}{% endfor %}"
        "{{ '<｜tool▁calls▁begin｜>' if false }}"
    )
    text = model(tmp_path, template)
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}]
    rendered = text.render_chat([{"role": "developer", "content": "Be brief."}, *messages], tools=[TOOL])
    assert rendered.startswith("[system]Be brief.\n\nYou may call functions")
    assert "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function_name<｜tool▁sep｜>" in rendered
    assert rendered.endswith("[assistant]c[tool]5")
    assert rendered.count("[system]") == 1


def test_thoughts_by_the_name_that_the_template_has(tmp_path: Path) -> None:
    """As gpt-oss's is, which takes thoughts or content beside a call."""
    template = (
        "{% for message in messages %}{{ message.thinking }}/{{ message.content }};{% endfor %}{{ tool_calls }}"
    )
    text = model(tmp_path, template)
    thought = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}
    calls = {**thought, "tool_calls": [CALL]}
    messages = [thought, calls, {**calls, "content": None}, {"role": "user", "content": "x"}]
    assert text.render_chat(messages) == "Hm/Hi;Hm\n\nHi/None;Hm/None;/x;"


def test_a_format_by_name(tmp_path: Path) -> None:
    assert model(tmp_path, "<tool_call>").answer_format.name == "hermes"
    assert model(tmp_path, "<tool_call>", format_name="llama3").answer_format.name == "llama3"
