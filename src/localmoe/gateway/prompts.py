"""Text to token ids without holding up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from localmoe.core.errors import InvalidRequestError
from localmoe.gateway.context import ServedModel

LARGE_INPUT_CHARS = 8192
"""Larger inputs are worked on in a thread; for smaller ones the way there would cost more than the work."""

T = TypeVar("T")


async def work_on(num_chars: int, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call the function, in a thread if its input is large."""
    if num_chars > LARGE_INPUT_CHARS:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


async def encode_text(
    model: ServedModel, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
) -> list[int]:
    """Token ids of a prompt.

    Raises:
        InvalidRequestError: there are none.
    """
    ids = await work_on(len(text), model.text.tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return _not_empty(ids, param)


async def encode_chat(
    model: ServedModel, messages: Sequence[dict[str, Any]], *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a conversation by the model's template.

    Raises:
        InvalidRequestError: there is no template, it refuses the messages, or the prompt is empty.
    """
    num_chars = sum(len(message["content"]) for message in messages)
    ids = await work_on(num_chars, model.text.encode_chat, messages, add_special_tokens=add_special_tokens)
    return _not_empty(ids, "messages")


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequestError(f"{param}: the prompt is empty; send at least one token", param=param)
    return ids
