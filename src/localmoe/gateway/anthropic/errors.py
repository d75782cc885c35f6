"""Failures in the shape of Anthropic's API, for its routes.

A middleware around all that may refuse translates: routes, and what stands before them (bounds, identity, limits),
need not know of a second shape.
"""

import json
from typing import Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.gateway.answering.streaming import encode_tagged
from localmoe.gateway.anthropic.wire import ErrorMessage, MessageErrorDetail
from localmoe.gateway.errors import ApiError
from localmoe.gateway.exchange import current_exchange

PREFIX = "/v1/messages"
OVERLOADED_STATUS = 529
_MAX_BODY_BYTES = 2**16
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED_STATUS: "overloaded_error",
}


def failure_event(error: ApiError) -> bytes:
    """The last event of a stream that breaks off."""
    return encode_tagged(_error_message(_status(error.status, error.code), error.message))


class AnthropicErrorsMiddleware:
    """Rewrites errors of these routes, and names the request in every answer as this API does, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_ours(scope["path"]):
            await self._app(scope, receive, send)
            return
        failure: Message | None = None
        body = bytearray()

        async def send_translated(message: Message) -> None:
            nonlocal failure
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["request-id"] = _request_id() or ""
                if message["status"] >= 400 and "application/json" in headers.get("content-type", ""):
                    failure = message  # waits until it is known what it is about
                    return
            elif failure is not None:
                body.extend(message.get("body", b""))
                if message.get("more_body", False) and len(body) <= _MAX_BODY_BYTES:
                    return
                start, failure = failure, None
                message["body"] = _translate(start, bytes(body))
                await send(start)
            await send(message)

        await self._app(scope, receive, send_translated)


def _is_ours(path: str) -> bool:
    return path == PREFIX or path.startswith(PREFIX + "/")


def _translate(start: Message, body: bytes) -> bytes:
    """The body in the other shape, whose status and length are put into `start`."""
    try:
        error: Any = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):
        return body
    start["status"] = _status(start["status"], code)
    translated = msgspec.json.encode(_error_message(start["status"], message))
    MutableHeaders(raw=start["headers"])["content-length"] = str(len(translated))
    return translated


def _error_message(status: int, message: str) -> ErrorMessage:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return ErrorMessage(error=MessageErrorDetail(type=kind, message=message), request_id=_request_id())


def _request_id() -> str | None:
    exchange = current_exchange()
    return None if exchange is None else exchange.request_id


def _status(status: int, code: str | None) -> int:
    return OVERLOADED_STATUS if status == 503 and code == "overloaded" else status
