"""A server that speaks OpenAI's API and streams by the clock: what stands behind a gateway that is measured.

The last message of a conversation is its plan, as JSON. Each event's text is the time at which it was sent, by the
system's monotonic clock, which all processes of a machine share.
"""

import asyncio
import json
import socket
import time

import msgspec
from aiohttp import web

MODEL = "scripted"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is streamed."""

    num_events: int
    interval_s: float
    """Between two events."""
    hold_s: float = 0.0
    """After the last one, before the stream ends."""


def run_scripted_server(listener: socket.socket) -> None:
    """Serve until killed."""
    app = web.Application()
    app.add_routes([web.get("/v1/models", _models), web.post("/v1/chat/completions", _chat)])
    web.run_app(app, sock=listener, print=None, access_log=None)


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    plan = msgspec.json.decode(body["messages"][-1]["content"], type=Plan)
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    next_s = time.monotonic()
    for _ in range(plan.num_events):
        await response.write(_event({"content": f"{time.monotonic_ns()} "}, None))
        # By a schedule, or the pace would depend on how long sending takes.
        next_s += plan.interval_s
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
    await asyncio.sleep(plan.hold_s)
    await response.write(_event({}, "stop"))
    await response.write(b"data: [DONE]\n\n")
    return response


def _event(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {
        "id": "chatcmpl-0",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
