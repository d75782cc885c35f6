"""What tells one answer from another."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from localmoe.core.request import PromptSource, Request

_VERSION = 2
"""Of how keys are made, and of what is kept under them."""
_encoder = msgspec.msgpack.Encoder(order="deterministic")


def is_repeatable(request: Request) -> bool:
    """Whether the same request gets the same answer again, as far as its model can."""
    sampling = request.sampling
    is_drawn_alike = sampling.temperature == 0 or sampling.seed is not None
    return is_drawn_alike and not request.resumed_ids and not _refers_elsewhere(request.source)


def answer_key(request: Request, *, model_version: str, scope: str) -> bytes:
    """The SHA-256 of everything that the answer depends on.

    Args:
        model_version: another one wherever the model's name, weights or engines are others.
        scope: of those whose answers may be given to whoever asks.
    """
    told = (
        _VERSION,
        scope,
        model_version,
        request.model,
        request.prompt_ids,
        msgspec.structs.replace(request.sampling, logit_bias={}),
        sorted(request.sampling.logit_bias.items()),
        request.adapter,
        request.engine,
        request.embed,
        # Also where there are token ids, since some engines take this instead, and see to templates themselves.
        request.source,
    )
    return hashlib.sha256(_encoder.encode(told)).digest()


def _refers_elsewhere(source: PromptSource | None) -> bool:
    """Whether a message has what is behind a URL, or in another server's file, which may be another the next time."""
    messages = (source.messages or []) if source is not None else []
    contents = (message.get("content") for message in messages)
    return any(_is_elsewhere(part) for content in contents if isinstance(content, list) for part in content)


def _is_elsewhere(part: Mapping[str, Any]) -> bool:
    url = part.get("image_url", {}).get("url", "data:")
    return not url.startswith("data:") or part.get("file", {}).get("file_id") is not None
