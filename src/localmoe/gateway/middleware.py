"""What surrounds every route, in plain ASGI."""

import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.core.errors import RequestTooLargeError
from localmoe.gateway.errors import INTERNAL_ERROR, to_api_error

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
    """Reads the body, at most `max_body_bytes` of it, before anything else looks at the request."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self._max_body_bytes:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                await self._refuse(scope, receive, send)
                return
        replay: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        del body

        async def receive_again() -> Message:
            return replay.pop() if replay else await receive()

        await self._app(scope, receive_again, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestTooLargeError(f"the body is larger than the {self._max_body_bytes} bytes allowed")
        response = to_api_error(error).response({"connection": "close"})
        await response(scope, receive, send)


def _sane_request_id(value: str | None) -> str | None:
    if value and len(value) <= _MAX_REQUEST_ID_CHARS and all("!" <= char <= "~" for char in value):
        return value
    return None
