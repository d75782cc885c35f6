"""Text to token ids without holding up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from localmoe.core.errors import ContextLengthError, InvalidRequestError
from localmoe.gateway.context import ServedModel
from localmoe.gateway.sampling import check_token_id

LARGE_INPUT_CHARS = 8192
"""Larger inputs are worked on in a thread; for smaller ones the way there would cost more than the work."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """One prompt, ready for the engine."""

    ids: list[int]
    text: str
    """What `echo` shows; empty if it was not asked for."""
    num_prefix_tokens: int
    """Tokens at the beginning that the text does not show."""


async def work_on(num_chars: int, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call the function, in a thread if its input, all that one request brings, is large."""
    if num_chars > LARGE_INPUT_CHARS:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


async def encode_prompts(
    prompts: Sequence[str | list[int]], model: ServedModel, *, echo: bool
) -> list[EncodedPrompt]:
    """Prompts given as text or as ids.

    Raises:
        InvalidRequestError: see `encode_text`; also for an empty prompt.
    """
    return await work_on(sum(map(len, prompts)), _encode_prompts, prompts, model, echo=echo)


async def encode_chat(
    model: ServedModel, messages: Sequence[dict[str, Any]], *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a conversation by the model's template.

    Raises:
        InvalidRequestError: there is no template, it refuses the messages, or the prompt is empty; see also
            `encode_text`.
    """

    def render_and_encode() -> list[int]:
        text = model.text.render_chat(messages)
        return encode_text(text, model, add_special_tokens=add_special_tokens, param="messages")

    # Always in a thread: a template may take any time over few messages.
    return _not_empty(await asyncio.to_thread(render_and_encode), "messages")


def encode_text(text: str, model: ServedModel, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of one text.

    Raises:
        ContextLengthError: it is too long for the context even if it were all longest tokens; then it is not
            tokenized, which takes long.
        InvalidRequestError: a token in it is none that the model knows, as the tokenizer has more than the model.
    """
    tokenizer = model.text.tokenizer
    num_bytes = len(text.encode())
    if num_bytes > model.context_tokens * tokenizer.max_token_bytes:
        raise ContextLengthError(
            f"{param}: the model's context is {model.context_tokens} tokens; the prompt's {num_bytes} bytes are at"
            f" least {-(-num_bytes // tokenizer.max_token_bytes)} tokens. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    check_token_id(max(ids, default=0), model, param=param)
    return ids


def _encode_prompts(prompts: Sequence[str | list[int]], model: ServedModel, *, echo: bool) -> list[EncodedPrompt]:
    tokenizer = model.text.tokenizer
    encoded = []
    for index, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            ids = encode_text(prompt, model, add_special_tokens=True, param=param)
            text, num_prefix_tokens = prompt, tokenizer.num_prefix_tokens
        else:
            ids = prompt
            check_token_id(max(ids), model, param=param)
            text = tokenizer.decode(ids, skip_special_tokens=False) if echo else ""
            num_prefix_tokens = 0
        encoded.append(
            EncodedPrompt(
                ids=_not_empty(ids, param), text=text if echo else "", num_prefix_tokens=num_prefix_tokens
            )
        )
    return encoded


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequestError(f"{param}: the prompt is empty; send at least one token", param=param)
    return ids
