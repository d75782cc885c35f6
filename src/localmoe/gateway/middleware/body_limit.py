"""Bounds what is read of a body."""

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.core.current import Current
from localmoe.core.errors import RequestTooLargeError
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.errors import ApiError, to_api_error


class BodyLimitMiddleware:
    """Reads the body, at most as much of it as is allowed, before a route looks at the request.

    Args:
        config: says how much, and by when it must have come.
        streamed_paths: of routes that read their bodies themselves, and bound them.
    """

    def __init__(
        self, app: ASGIApp, *, config: Current[GatewayConfig], streamed_paths: Collection[str] = ()
    ) -> None:
        self._app = app
        self._streamed_paths = frozenset(streamed_paths)
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._streamed_paths:
            await self._app(scope, receive, send)
            return
        timeout_s = self._config.now.body_timeout_s
        declared = Headers(scope=scope).get("content-length", "0")
        try:
            if not declared.isdecimal() or int(declared[:20]) > self._config.now.max_body_bytes:
                raise self._too_large()
            async with asyncio.timeout(timeout_s):
                body = await self._read(receive)
        except (RequestTooLargeError, TimeoutError) as error:
            message = f"the body did not come whole within {timeout_s:g} s"
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
            if len(body) > self._config.now.max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(f"the body is larger than the {self._config.now.max_body_bytes} bytes allowed")
