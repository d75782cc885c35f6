"""One request for a response, from what it says to the answer that is kept."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence

from localmoe.core.errors import DeadlineExceededError
from localmoe.gateway.answering.conversation import choices
from localmoe.gateway.answering.generation import stream_choices
from localmoe.gateway.answering.hints import DispatchHints
from localmoe.gateway.answering.sampling import bounded_logprobs
from localmoe.gateway.answering.streaming import Begun, collect
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.errors import ApiError, to_api_error
from localmoe.gateway.openai.logprobs import Scorer
from localmoe.gateway.responses.answer import ResponseAnswer, no_scores, set_failed
from localmoe.gateway.responses.conversation import conversation_of
from localmoe.gateway.responses.keeping import ResponseKeeper, numbered
from localmoe.gateway.responses.schema import InputItem, ResponseRequest
from localmoe.gateway.responses.wire import ResponseObject, ResponseStatus, StoredResponse

API = "responses"


class Creation:
    """A response in the making.

    Args:
        body: what was asked for.
        keeper: of whoever asks.
        earlier: items of the conversation before it.
    """

    def __init__(
        self,
        body: ResponseRequest,
        context: GatewayContext,
        hints: DispatchHints,
        keeper: ResponseKeeper,
        earlier: Sequence[InputItem],
    ) -> None:
        self._body = body
        self._context = context
        self._hints = hints
        self._keeper = keeper
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created_at = int(time.time())
        self._input = numbered(body.items, self._id)
        self.conversation = conversation_of(body, [*earlier, *body.items])
        self._answer: ResponseAnswer | None = None

    async def begin(self, model: ServedModel) -> Begun:
        """See `Begin`."""
        body = self._body
        given = await choices(
            self.conversation, model, self._hints, answer_id=self._id, grammars=self._context.grammars
        )
        asked = bounded_logprobs(
            given,
            echo=False,
            limit=self._context.config.max_logprobs,
            max_tokens_given=body.max_output_tokens is not None,
        )
        sampling = asked[0].request.sampling
        response = self._response(model.id, "in_progress")
        response.temperature, response.top_p = sampling.temperature, sampling.top_p
        score = Scorer(model).entries if body.wants_logprobs else no_scores
        answer = self._answer = ResponseAnswer(response, score=score)
        deltas = stream_choices(model, asked, api=API, bus=self._context.bus, started_s=self._hints.came_s)
        if response.store:
            must_keep = body.store is True or response.background
            deltas = self._keeper.following(answer, deltas, self._input, must_keep=must_keep)
        return Begun(answer, deltas)

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that breaks off."""
        answer = self._answer or ResponseAnswer(self._so_far())
        return answer.failure(error)

    async def queue(self) -> ResponseObject:
        """Keep it before it has begun."""
        response = self._response(self._body.model, "queued")
        await self._keeper.put(StoredResponse(response=response, input=self._input))
        return response

    async def make(self, models: Iterator[ServedModel]) -> None:
        """Make the answer with nobody waiting. Whatever becomes of it is kept."""
        limit_s = self._context.config.background_timeout_s
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await collect(self.begin, models)
            except TimeoutError:
                raise DeadlineExceededError(f"the response was not complete within {limit_s:g} s") from None
        except asyncio.CancelledError:
            response = self._so_far()
            response.status = "cancelled"
            await self._keeper.put(StoredResponse(response=response, input=self._input))
            raise
        except Exception as error:
            response = self._so_far()
            set_failed(response, to_api_error(error))
            await self._keeper.put(StoredResponse(response=response, input=self._input))

    def _so_far(self) -> ResponseObject:
        return self._response(self._body.model, "in_progress") if self._answer is None else self._answer.response

    def _response(self, model_id: str, status: ResponseStatus) -> ResponseObject:
        """Without an answer yet."""
        body = self._body
        choice = body.tool_choice or "auto"
        return ResponseObject(
            id=self._id,
            created_at=self._created_at,
            status=status,
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=model_id,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            store=body.store is not False,
            temperature=body.temperature,
            text={"format": body.format if isinstance(body.format, dict) else body.format.model_dump()},
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in body.tools or ()],
            top_logprobs=body.top_logprobs or 0,
            top_p=body.top_p,
        )
