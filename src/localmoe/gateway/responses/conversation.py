"""From the items of OpenAI's responses to a conversation in the words that templates and engines know."""

from collections.abc import Iterator, Sequence
from typing import Any

from localmoe.core.request import Grammar
from localmoe.gateway.answering.conversation import Conversation
from localmoe.gateway.answering.structured import JsonObjectFormat, TextFormat, grammar_of, schema_grammar
from localmoe.gateway.fields import SamplingFields
from localmoe.gateway.responses.schema import (
    AllowedTools,
    FunctionCallInput,
    FunctionOutput,
    InputContent,
    InputImage,
    InputItem,
    JsonSchemaText,
    MessageItem,
    NamedFunction,
    ReasoningInput,
    ResponseRequest,
    ResponseTool,
)


def conversation_of(body: ResponseRequest, items: Sequence[InputItem]) -> Conversation:
    """What the request asks to be gone on with.

    Args:
        items: of all responses before it, and its own.
    """
    choice = body.tool_choice
    tools = body.tools or ()
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
    return Conversation(
        messages=_messages(items, body.instructions),
        sampling=SamplingFields(model=body.model, temperature=body.temperature, top_p=body.top_p),
        max_tokens=body.max_output_tokens,
        max_tokens_field="max_output_tokens",
        messages_field="input",
        num_logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
        tools=[_tool(tool) for tool in tools],
        tool_choice=choice if isinstance(choice, str) else "auto",
        forced_tool=choice.name if isinstance(choice, NamedFunction) else None,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_grammar=_grammar(body.format),
        response_field="text.format",
        effort=None if body.reasoning is None else body.reasoning.effort,
        other_part=next(_other_parts(items, len(items) - len(body.items)), None),
    )


def _other_parts(items: Sequence[InputItem], num_earlier: int) -> Iterator[tuple[str, str]]:
    """See `Conversation.other_part`."""
    for index, item in enumerate(items, -num_earlier):
        match item:
            case FunctionOutput():
                name, parts = "output", item.output
            case MessageItem():
                name, parts = "content", item.content
            case _:
                continue
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, InputImage):
                own = f"input[{index}].{name}[{place}].type"
                yield own if index >= 0 else "previous_response_id", part.type


def _grammar(format_: TextFormat | JsonObjectFormat | JsonSchemaText) -> Grammar | None:
    return schema_grammar(format_, "text.format") if isinstance(format_, dict) else grammar_of(format_)


def _messages(items: Sequence[InputItem], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation, the instructions before all else. What the assistant thought, said and called in one turn is
    one message."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                turn = _turn(messages, None if turn is None or turn["content"] or "tool_calls" in turn else turn)
                turn["content"] = _content(item.content)
            case MessageItem():
                turn = None
                messages.append({"role": item.role, "content": _content(item.content)})
            case ReasoningInput():
                if item.content:
                    turn = _turn(messages, None)
                    turn["reasoning_content"] = "\n".join(part.text for part in item.content)
            case FunctionCallInput():
                turn = _turn(messages, turn)
                function = {"name": item.name, "arguments": item.arguments}
                calls = turn.setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            case FunctionOutput():
                turn = None
                output = _content(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return messages


def _tool(tool: ResponseTool) -> dict[str, Any]:
    """The tool as OpenAI's chat API has it."""
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _turn(messages: list[dict[str, Any]], present: dict[str, Any] | None) -> dict[str, Any]:
    """The assistant's message under way, or a new one."""
    if present is not None:
        return present
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _content(content: InputContent) -> str | list[dict[str, Any]]:
    """A text, if that is all there is; else parts."""
    if isinstance(content, str):
        return content
    texts = [part.text for part in content if not isinstance(part, InputImage)]
    if len(texts) == len(content):
        return "\n".join(texts)
    return [
        _image(part) if isinstance(part, InputImage) else {"type": "text", "text": part.text} for part in content
    ]


def _image(part: InputImage) -> dict[str, Any]:
    image = {"url": part.image_url}
    return {"type": "image_url", "image_url": image if part.detail is None else {**image, "detail": part.detail}}
