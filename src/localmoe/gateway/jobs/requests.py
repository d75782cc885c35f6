"""Requests of jobs take the road that all requests take: they are put to the gateway's own application, in their
owner's name, so that everything that is checked for clients is checked for them."""

import asyncio
from dataclasses import dataclass

import msgspec
from starlette.types import ASGIApp, Message

from localmoe.core.identity import Principal
from localmoe.core.jobs import Setback
from localmoe.gateway.errors import ApiError
from localmoe.gateway.identity.principal import set_principal

_RETRIED = (429, 503)
_FINAL_CODES = ("deadline_exceeded",)
"""Of what is answered with such a status: trying again would take as long, and fail again."""


class _Detail(msgspec.Struct):
    code: str | None = None


class _Failure(msgspec.Struct):
    error: _Detail


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the application answered."""

    status: int
    body: bytes
    request_id: str | None = None
    setback: Setback | None = None
    """Why it may be tried again; None: it would be answered like this again."""
    retry_after_s: float = 0.0
    """If so, when at the earliest."""


class InProcessClient:
    """Sends requests to the application without a network between.

    Args:
        app: with its middleware.
        max_answer_bytes: a longer answer is cut off and replaced by an error.
    """

    def __init__(self, app: ASGIApp, *, max_answer_bytes: int) -> None:
        self._app = app
        self._max_answer_bytes = max_answer_bytes

    async def post(self, path: str, body: bytes, *, owner: Principal, request_id: str) -> Reply:
        """The answer to a request with this JSON."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", request_id.encode()),
            ],
            "client": None,
            "server": None,
        }
        set_principal(scope, owner)
        incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        answer = _Answer(self._max_answer_bytes)

        async def receive() -> Message:
            if incoming:
                return incoming.pop()
            await asyncio.Event().wait()  # nobody leaves; whoever waits for that is cancelled
            raise AssertionError

        await self._app(scope, receive, answer.send)
        return answer.reply()


class _Answer:
    """Collects what the application sends."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._status = 500
        self._headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self._is_too_long = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.lower(): value for name, value in message.get("headers", [])}
        elif message["type"] == "http.response.body" and not self._is_too_long:
            self._body += message.get("body", b"")
            if len(self._body) > self._max_bytes:
                self._is_too_long = True
                self._body.clear()

    def reply(self) -> Reply:
        request_id = self._headers.get(b"x-request-id")
        status, body = self._status, bytes(self._body)
        if self._is_too_long:
            message = f"the answer is longer than the {self._max_bytes} bytes that are kept of one"
            error = ApiError(status=500, message=message, type="server_error", code="answer_too_long")
            status, body = error.status, error.body()
        elif not _is_json(body):  # which could be put into no file of answers, and into no job's result
            error = ApiError(
                status=500, message="the answer was not valid JSON", type="server_error", code="invalid_answer"
            )
            status, body = error.status, error.body()
        return Reply(
            status=status,
            body=body,
            request_id=None if request_id is None else request_id.decode("latin-1"),
            setback=self._setback(status, _code(body) if status >= 400 else None),
            retry_after_s=self._retry_after_s() or 0.0,
        )

    def _setback(self, status: int, code: str | None) -> Setback | None:
        if code == "model_not_found":
            return Setback.NOT_SERVED
        if status not in _RETRIED or code in _FINAL_CODES or self._retry_after_s() is None:
            return None
        return Setback.INTERRUPTED if code == "engine_died" else Setback.REFUSED

    def _retry_after_s(self) -> float | None:
        """As the answer says; one that does not say will not be another the next time."""
        told = self._headers.get(b"retry-after", b"")
        return float(told) if told.isdigit() else None


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.format(body)
    except msgspec.MsgspecError:
        return False
    return True


def _code(body: bytes) -> str | None:
    try:
        return msgspec.json.decode(body, type=_Failure).error.code
    except msgspec.MsgspecError:
        return None
