"""What surrounds every route, in plain ASGI."""

import asyncio
import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.core.errors import RequestTooLargeError
from localmoe.gateway.errors import INTERNAL_ERROR, ApiError, to_api_error

logger = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128


class RequestIdMiddleware:
    """Gives every answer an `x-request-id` (the client's own, if it is sane) and every crash a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _sane_request_id(Headers(scope=scope).get("x-request-id")) or uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise  # the server cuts the connection: an answer broken in half must not look whole
            await INTERNAL_ERROR.response()(scope, receive, send_with_id)


class BodyLimitMiddleware:
    """Reads the body, at most `max_body_bytes` of it, before anything else looks at the request.

    Args:
        timeout_s: the body must have come by then.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        try:
            if not declared.isdecimal() or int(declared[:20]) > self._max_body_bytes:
                raise self._too_large()
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except (RequestTooLargeError, TimeoutError) as error:
            message = f"the body did not come whole within {self._timeout_s:g} s"
            late = ApiError(status=408, message=message, code="request_timeout")
            refusal = late if isinstance(error, TimeoutError) else to_api_error(error)
            await refusal.response({"connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body

        async def receive_again() -> Message:
            return replay.pop() if replay else await receive()

        await self._app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """None if the client left before the end."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(f"the body is larger than the {self._max_body_bytes} bytes allowed")


def _sane_request_id(value: str | None) -> str | None:
    if value and len(value) <= _MAX_REQUEST_ID_CHARS and all("!" <= char <= "~" for char in value):
        return value
    return None
