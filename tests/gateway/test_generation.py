"""What is between engines and answers, where no answer shows it."""

import asyncio
import time
from collections.abc import AsyncGenerator

from localmoe.core.events import EventBus
from localmoe.core.request import FinishReason, Request, SamplingParams, TokenChunk
from localmoe.gateway.answering.generation import Choice, stream_choices
from localmoe.text.text_model import TextModel
from support.tiny_text import served_model


class EagerEngine:
    """Has all its tokens at once."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_sent = 0

    @property
    def is_ready(self) -> bool:
        return True

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        for _ in range(self.num_tokens):
            self.num_sent += 1
            yield TokenChunk(request_id=request.id, token_ids=[40])
        yield TokenChunk(request_id=request.id, finish_reason=FinishReason.LENGTH)


async def test_what_nobody_takes_is_not_generated(text_model: TextModel) -> None:
    engine = EagerEngine(10_000)
    choices = [
        Choice(
            index=index,
            request=Request(
                id=str(index), model="tiny", prompt_ids=[5], sampling=SamplingParams(max_tokens=10_000)
            ),
            stop_strings=(),
        )
        for index in range(3)
    ]
    model = served_model(text_model, engine)
    deltas = stream_choices(model, choices, api="test", bus=EventBus(), started_s=time.monotonic())
    await anext(deltas)
    for _ in range(1000):
        await asyncio.sleep(0)
    assert engine.num_sent < 300
    num_deltas = 1 + len([delta async for delta in deltas])
    assert num_deltas == 3 * 10_001
