"""Conversations with tools for chat templates that know nothing of them, or not everything."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from localmoe.text.answer_format import CallSyntax

Message = Mapping[str, Any]

_INTRODUCTION = (
    "You may call functions to help with what the user asks. These are the functions that you have, each with the"
    " JSON schema of its arguments:"
)
_HOW = "To call one, answer with this and nothing else, but with the function's name and its arguments:"


def with_tools_described(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], syntax: CallSyntax
) -> list[Message]:
    """The conversation with the tools described in its system message.

    Args:
        tools: in the words of the OpenAI API.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = syntax.write([("function_name", '{"argument": "value"}')])
    description = f"{_INTRODUCTION}\n{functions}\n\n{_HOW}\n{example}"
    if messages and messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{description}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": description}, *messages]


def with_calls_written(messages: Sequence[Message], syntax: CallSyntax) -> list[Message]:
    """The conversation with tool calls as the model's own text, and with the tools' answers as the user's."""
    written: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if written and written[-1].get("is_response"):
                written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{text}"}
            else:
                written.append({"role": "user", "content": text, "is_response": True})
        elif calls := message.get("tool_calls"):
            text = syntax.write(
                [(call["function"]["name"], call["function"]["arguments"] or "{}") for call in calls]
            )
            content = f"{message['content']}\n{text}" if message.get("content") else text
            written.append({**_without(message, "tool_calls"), "content": content})
        else:
            written.append(message)
    return [_without(message, "is_response") for message in written]


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}
