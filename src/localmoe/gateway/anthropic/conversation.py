"""From Anthropic's messages to a conversation in the words that templates and engines know, OpenAI's."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from localmoe.core.request import Grammar
from localmoe.gateway.answering.conversation import Conversation
from localmoe.gateway.answering.structured import schema_grammar
from localmoe.gateway.anthropic.schema import (
    Base64Source,
    ImageInput,
    InputBlock,
    InputMessage,
    PromptFields,
    TextInput,
    ThinkingInput,
    Tool,
    ToolResultInput,
    ToolUseInput,
)
from localmoe.gateway.fields import SamplingFields

_ERROR = "Error:"
"""Before what a tool gave back in place of a result; templates have no other way to say so."""


_TOOL_CHOICES: Mapping[str, Literal["auto", "required", "none"]] = {"any": "required", "none": "none"}


def conversation_of(body: PromptFields, sampling: SamplingFields, max_tokens: int | None) -> Conversation:
    """What the request asks to be answered."""
    choice, output = body.tool_choice, body.output_config
    return Conversation(
        messages=_messages(body),
        sampling=sampling,
        max_tokens=max_tokens,
        max_tokens_field="max_tokens",
        tools=[_tool(tool) for tool in body.tools or ()],
        tool_choice="auto" if choice is None else _TOOL_CHOICES.get(choice.type, "auto"),
        forced_tool=None if choice is None else choice.name,
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        response_grammar=_grammar(body),
        response_field="output_config.format",
        thinks=body.thinks,
        forbids_thinking=body.forbids_thinking,
        effort=None if output is None else output.effort,
        other_part=next(_other_parts(body.messages), None),
    )


def _other_parts(messages: list[InputMessage]) -> Iterator[tuple[str, str]]:
    """See `Conversation.other_part`."""
    for index, message in enumerate(messages):
        for place, block in enumerate(message.blocks):
            path = f"messages[{index}].content[{place}]"
            if isinstance(block, ImageInput):
                yield f"{path}.type", block.type
            elif isinstance(block, ToolResultInput) and isinstance(block.content, list):
                images = (inner for inner, part in enumerate(block.content) if isinstance(part, ImageInput))
                yield from ((f"{path}.content[{inner}].type", "image") for inner in images)


def _grammar(body: PromptFields) -> Grammar | None:
    output = body.output_config
    if output is None or output.format is None:
        return None
    return schema_grammar(
        {"name": "output", "schema": output.format["schema"], "strict": True}, "output_config.format"
    )


def _messages(body: PromptFields) -> list[dict[str, Any]]:
    """The conversation, the system's text before all else."""
    messages: list[dict[str, Any]] = []
    if body.system:
        blocks = [body.system] if isinstance(body.system, str) else [block.text for block in body.system]
        messages.append({"role": "system", "content": "\n".join(blocks)})
    for role, turn in _turns(body.messages):
        messages += _assistant_messages(turn) if role == "assistant" else _user_messages(role, turn)
    return messages


def _tool(tool: Tool) -> dict[str, Any]:
    """The tool as OpenAI's chat API has it."""
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _turns(messages: list[InputMessage]) -> Iterator[tuple[str, list[InputBlock]]]:
    """Messages of one role that follow each other are one turn."""
    turn: list[InputBlock] = []
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        turn += message.blocks
        if following is None or following.role != message.role:
            yield message.role, turn
            turn = []


def _user_messages(role: str, blocks: list[InputBlock]) -> list[dict[str, Any]]:
    """A tool's result is a message of its own, and so is what stands between results."""
    messages: list[dict[str, Any]] = []
    parts: list[TextInput | ImageInput] = []

    def flush() -> None:
        if parts:
            messages.append({"role": role, "content": _content(parts)})
            parts.clear()

    for block in blocks:
        if isinstance(block, ToolResultInput):
            flush()
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        elif isinstance(block, TextInput | ImageInput):
            parts.append(block)
    flush()
    return messages


def _assistant_messages(blocks: list[InputBlock]) -> list[dict[str, Any]]:
    """One message, with thoughts and calls beside its text."""
    texts = [block.text for block in blocks if isinstance(block, TextInput)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingInput) and block.thinking]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseInput)]
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _call(block: ToolUseInput) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultInput) -> str | list[dict[str, Any]]:
    blocks: list[TextInput | ImageInput] = [TextInput(type="text", text=_ERROR)] if block.is_error else []
    if isinstance(block.content, str):
        blocks.append(TextInput(type="text", text=block.content))
    else:
        blocks += block.content
    return _content(blocks)


def _content(blocks: Sequence[TextInput | ImageInput]) -> str | list[dict[str, Any]]:
    """A text, if that is all there is; else parts."""
    texts = [block.text for block in blocks if isinstance(block, TextInput)]
    if len(texts) == len(blocks):
        return "\n".join(texts)
    return [
        {"type": "text", "text": block.text} if isinstance(block, TextInput) else _image(block) for block in blocks
    ]


def _image(block: ImageInput) -> dict[str, Any]:
    source = block.source
    url = f"data:{source.media_type};base64,{source.data}" if isinstance(source, Base64Source) else source.url
    return {"type": "image_url", "image_url": {"url": url}}
