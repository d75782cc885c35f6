"""Text to token ids without holding up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from localmoe.core.errors import ContextLengthError, InvalidRequestError
from localmoe.core.request import PromptSource
from localmoe.gateway.answering.sampling import check_token_id
from localmoe.gateway.context import ServedModel
from localmoe.gateway.fields import SamplingFields
from localmoe.text.fill_in_middle import OtherFile

LARGE_INPUT_CHARS = 8192
"""Larger inputs are worked on in a thread; for smaller ones the way there would cost more than the work."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """One prompt, ready for the engine."""

    ids: list[int]
    given: str | None
    """The text as it came; None for a prompt of token ids."""
    text: str
    """What `echo` shows; empty if it was not asked for."""
    num_prefix_tokens: int
    """Tokens at the beginning that the text does not show."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends at these, too."""


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


async def encode_to_fill(
    prefixes: Sequence[str], suffix: str, model: ServedModel, *, others: Sequence[OtherFile] = ()
) -> list[EncodedPrompt]:
    """Prompts for what is between each of these texts and another.

    Args:
        others: files to put before all else, where the model knows of such.

    Raises:
        InvalidRequestError: the model was not made for it; see also `encode_text`.
    """
    around = len(suffix) + sum(len(other.name) + len(other.text) for other in others)
    num_chars = sum(len(prefix) + around for prefix in prefixes)
    return await work_on(num_chars, _encode_to_fill, prefixes, suffix, model, others)


def prompt_source(
    body: SamplingFields,
    model: ServedModel,
    *,
    text: str | None = None,
    suffix: str | None = None,
    messages: list[dict[str, Any]] | None = None,
) -> PromptSource | None:
    """What engines with a tokenizer of their own are given; None where they could not do what is asked, since end
    tokens cannot be named to them.

    Raises:
        InvalidRequestError: the model has only such engines.
    """
    by_ids = "ignore_eos" if body.ignore_eos else "stop_token_ids" if body.stop_token_ids else None
    if by_ids is not None and model.text is None:
        raise InvalidRequestError(
            f"{by_ids}: model {model.id!r} runs on another server, to which tokens cannot be named", param=by_ids
        )
    if by_ids is not None or (text is None and messages is None):
        return None
    return PromptSource(text=text, suffix=suffix, messages=messages, stop=body.stop_strings)


def encode_text(text: str, model: ServedModel, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of one text.

    Raises:
        ContextLengthError: it is too long for the context even if it were all longest tokens; then it is not
            tokenized, which takes long.
        InvalidRequestError: a token in it is none that the model knows, as the tokenizer has more than the model.
    """
    tokenizer = model.local_text.tokenizer
    _check_length(len(text.encode()), model, param=param)
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    check_token_id(max(ids, default=0), model, param=param)
    return ids


def _check_length(num_bytes: int, model: ServedModel, *, param: str) -> None:
    max_token_bytes = model.local_text.tokenizer.max_token_bytes
    if model.context_tokens is not None and num_bytes > model.context_tokens * max_token_bytes:
        raise ContextLengthError(
            f"{param}: the model's context is {model.context_tokens} tokens; the prompt's {num_bytes} bytes are at"
            f" least {-(-num_bytes // max_token_bytes)} tokens. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )


def _encode_to_fill(
    prefixes: Sequence[str], suffix: str, model: ServedModel, others: Sequence[OtherFile]
) -> list[EncodedPrompt]:
    if model.text is None:
        return [EncodedPrompt(ids=[], given=prefix, text="", num_prefix_tokens=0) for prefix in prefixes]
    fill = model.text.fill_in_middle
    if fill is None:
        raise InvalidRequestError(
            f"suffix: model {model.id!r} was not made to fill in: its tokenizer has no tokens for it",
            param="suffix",
        )
    others = others if fill.takes_files else ()
    around = len(suffix.encode()) + sum(len(other.name.encode()) + len(other.text.encode()) for other in others)
    encoded = []
    for index, prefix in enumerate(prefixes):
        param = _param(prefixes, index)
        _check_length(len(prefix.encode()) + around, model, param=param)
        ids = fill.prompt_ids(prefix, suffix, others)
        check_token_id(max(ids), model, param=param)
        encoded.append(
            EncodedPrompt(ids=ids, given=prefix, text="", num_prefix_tokens=0, stop_token_ids=fill.stop_token_ids)
        )
    return encoded


def _param(prompts: Sequence[object], index: int) -> str:
    """What a client calls one of its prompts."""
    return "prompt" if len(prompts) == 1 else f"prompt[{index}]"


def _encode_prompts(prompts: Sequence[str | list[int]], model: ServedModel, *, echo: bool) -> list[EncodedPrompt]:
    encoded = []
    for index, prompt in enumerate(prompts):
        param = _param(prompts, index)
        given = prompt if isinstance(prompt, str) else None
        if model.text is None and given is not None:
            # Its engine tokenizes. Without log-probabilities, which it does not give, an echo is just the text.
            encoded.append(EncodedPrompt(ids=[], given=given, text=given if echo else "", num_prefix_tokens=0))
            continue
        tokenizer = model.local_text.tokenizer
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
                ids=not_empty(ids, param),
                given=given,
                text=text if echo else "",
                num_prefix_tokens=num_prefix_tokens,
            )
        )
    return encoded


def not_empty(ids: list[int], param: str) -> list[int]:
    """The token ids, or InvalidRequestError where there are none."""
    if not ids:
        raise InvalidRequestError(f"{param}: the prompt is empty; send at least one token", param=param)
    return ids
