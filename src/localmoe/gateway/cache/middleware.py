"""The headers by which clients go past the cache, and learn whether an answer is from it."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.gateway.cache.use import CacheUse, bound
from localmoe.gateway.errors import ApiError

HEADER = "x-localmoe-cache"


class CacheMiddleware:
    """`x-localmoe-cache: bypass` and `cache-control: no-store` neither read the cache nor write to it,
    `cache-control: no-cache` only writes. Answers that could be in the cache say in `x-localmoe-cache` whether
    they were."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wish = headers.get(HEADER)
        if wish not in (None, "bypass"):
            message = f"{HEADER} is {wish[:50]!r}; the only thing it can ask for is 'bypass'"
            await ApiError(status=400, message=message, param=HEADER).response()(scope, receive, send)
            return
        controls = {control.strip().lower() for control in headers.get("cache-control", "").split(",")}
        is_past = wish is not None or "no-store" in controls
        use = CacheUse(may_read=not is_past and "no-cache" not in controls, may_write=not is_past)

        async def send_with_summary(message: Message) -> None:
            if message["type"] == "http.response.start" and (summary := use.summary) is not None:
                MutableHeaders(scope=message)[HEADER] = summary
            await send(message)

        with bound(use):
            await self._app(scope, receive, send_with_summary)
