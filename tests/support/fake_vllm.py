"""A small server that speaks as vLLM does, and misbehaves as it is told to."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

VOCAB_SIZE = 100

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def piece(token_ids: list[int] | None, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """One event of a stream."""
    return {"choices": [{"index": 0, "text": "", "token_ids": token_ids, "finish_reason": reason, **fields}]}


def whole_stream(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the real one answers: here, the last token of the prompt and those after it."""
    first, count = body["prompt"][-1], body["max_tokens"]
    ids = [(first + index) % VOCAB_SIZE for index in range(count)]
    pieces = [piece([token_id]) for token_id in ids]
    pieces[-1]["choices"][0]["finish_reason"] = "length"
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
    return [*pieces, {"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 2}}}]


def says(*pieces: object, done: bool = True, then_drop: bool = False) -> Answer:
    """Answer each request with this stream; strings are sent as they are."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for data in pieces:
            text = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {text}\n\n".encode())
        if then_drop:
            assert request.transport is not None
            request.transport.abort()
        elif done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return answer


def refuses(status: int, body: object, headers: dict[str, str] | None = None) -> Answer:
    async def answer(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return answer


@dataclass
class FakeVllm:
    """What the server does, to be changed by tests, and what it was asked."""

    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the last request."""
    answer: Answer | None = None
    """In place of a right answer."""
    is_healthy: bool = True
    answers_at_all: bool = True
    """False: it takes connections and says nothing."""
    num_steps: int = 0
    model: str = "m"
    max_context_tokens: int = 64
    adapters: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [1, 2])
    questions: list[dict[str, Any]] = field(default_factory=list)
    num_left: int = 0
    """Clients that went before their answer was complete."""

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.headers = request.headers
        body = await request.json()
        self.questions.append(body)
        try:
            await self._pause()
            if self.answer is not None:
                return await self.answer(request, body)
            return await says(*whole_stream(body))(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.num_left += 1
            raise

    async def health(self, _: web.Request) -> web.Response:
        await self._pause()
        return web.Response(status=200 if self.is_healthy else 503)

    async def models(self, _: web.Request) -> web.Response:
        await self._pause()
        adapters = [{"id": name, "parent": self.model} for name in self.adapters]
        return web.json_response(
            {"data": [{"id": self.model, "max_model_len": self.max_context_tokens}, *adapters]}
        )

    async def tokenize(self, _: web.Request) -> web.Response:
        return web.json_response({"tokens": self.tokens, "count": len(self.tokens)})

    async def metrics(self, _: web.Request) -> web.Response:
        await self._pause()
        return web.Response(text=METRICS.replace("STEPS", str(self.num_steps)))

    async def _pause(self) -> None:
        while not self.answers_at_all:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.02)


METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1.2e+03
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 400.0
vllm:num_preemptions_total{engine="0",model_name="m"} 5.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} STEPS
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="40"} 1.0
vllm:broken{engine="0"} nonsense
"""


@asynccontextmanager
async def fake_vllm(port: int = 0) -> AsyncIterator[FakeVllm]:
    """A running one, on a free port or on this one."""
    fake = FakeVllm()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.completions)
    app.router.add_get("/health", fake.health)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/tokenize", fake.tokenize)
    app.router.add_get("/metrics", fake.metrics)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
