"""`POST /v1/inference`: text, code or both, answered at once, as a stream, or later."""

import re
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, model_validator
from starlette.responses import JSONResponse, Response

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError
from localmoe.core.jobs import Job, JobKind, JobState, NewItem
from localmoe.core.request import FinishReason
from localmoe.gateway.answering.conversation import Conversation, choices
from localmoe.gateway.answering.generation import ChoiceDelta, UsageCounter, stream_choices
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.streaming import DONE, Begun, encode_event, respond
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.exchange import current_principal
from localmoe.gateway.fields import MAX_TOKENS, SamplingFields, Text, UsageCounts
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.jobs.services import JobServices
from localmoe.gateway.openapi import ERROR_RESPONSES, documented

API = "inference"
PATH = "/v1/inference"
_FENCE = re.compile(r"`{3,}")
_NOT_LATER = ("x-localmoe-engine", "x-localmoe-timeout-s", "x-localmoe-cache")
"""Headers that jobs do not keep."""


class InferenceRequest(SamplingFields):
    """Asks for an answer to text, code, or both."""

    IGNORED = ("metadata", "user")
    REFUSED = {"n": (1,)}  # noqa: RUF012
    EXAMPLE = {  # noqa: RUF012
        "model": "smollm2-8x135m",
        "text": "What does this do?",
        "code": "print(sum(range(10)))",
        "language": "python",
        "max_tokens": 64,
    }

    text: Text | None = Field(default=None, description="A question or an instruction.")
    code: Text | None = Field(default=None, description="What it is about, or all there is.")
    language: Annotated[str, Field(pattern=r"^[A-Za-z0-9+#._-]{1,32}$")] | None = Field(
        default=None, description="Of the code, as it is called after a Markdown fence."
    )
    mode: Literal["sync", "stream", "async"] | None = Field(
        default=None, description="As `stream` or `async`; `sync` is neither."
    )
    run_later: bool | None = Field(
        default=None, alias="async", description="Answer with a job at once; see `/v1/jobs/{id}`."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Longest answer; the rest of the context if omitted."
    )

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if not self.text and not self.code:
            raise InvalidRequestError("send text, code, or both", param="text")
        if self.language is not None and not self.code:
            raise InvalidRequestError("only allowed with code", param="language")
        wishes = {"stream": self.stream, "async": self.run_later}
        if self.stream and self.run_later:
            raise InvalidRequestError("either stream or async, not both", param="async")
        for name, wish in wishes.items():
            if self.mode is not None and wish is not None and wish != (self.mode == name):
                raise InvalidRequestError(
                    f"mode is {self.mode!r}, but {name} is {str(wish).lower()}", param="mode"
                )
        return self

    @property
    def is_stream(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.stream) or self.mode == "stream"

    @property
    def is_async(self) -> bool:
        """Whether it comes later."""
        return bool(self.run_later) or self.mode == "async"

    @property
    def message(self) -> str:
        """What the model is told: the text, then the code, fenced so that nothing in it ends the fence."""
        if not self.code:
            return self.text or ""
        longest = max((len(run) for run in _FENCE.findall(self.code)), default=2)
        fence = "`" * (longest + 1)
        end = "" if self.code.endswith("\n") else "\n"
        code = f"{fence}{self.language or ''}\n{self.code}{end}{fence}"
        return f"{self.text}\n\n{code}" if self.text else code


class Inference(BaseModel):
    """An answer."""

    id: str
    object: Literal["inference"] = "inference"
    created: int
    model: str
    text: str
    reasoning: str | None = None
    """What the model thought before, if it did."""
    finish_reason: FinishReason
    usage: UsageCounts


class InferenceChunk(BaseModel):
    """One event of a stream. `usage` is there only with `stream_options.include_usage`."""

    id: str
    object: Literal["inference.chunk"] = "inference.chunk"
    created: int
    model: str
    text: str
    reasoning: str | None = None
    finish_reason: FinishReason | None
    usage: UsageCounts | None = None


class InferenceAccepted(BaseModel):
    """The answer comes later."""

    id: str
    object: Literal["job"] = "job"
    status: Literal["queued"] = "queued"
    created_at: int
    expires_at: int


def router(context: GatewayContext, jobs: JobServices | None) -> APIRouter:
    """The route over these models.

    Args:
        jobs: None: nothing is answered later.
    """
    routes = APIRouter(tags=["inference"])

    @routes.post(
        PATH,
        response_model=Inference,
        responses={
            200: documented(Inference, streams=[InferenceChunk]),
            202: {"model": InferenceAccepted, "description": "With `async`: the job that will have the answer."},
            **ERROR_RESPONSES,
        },
        summary="Answer text, code, or both",
    )
    async def create_inference(
        body: InferenceRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        context.model(body.model)
        if body.is_async:
            if jobs is None:
                raise UnsupportedFieldError("this server keeps no jobs; ask for an answer at once", param="async")
            return await _accept(body, request, jobs, context.config.jobs)
        conversation = Conversation(
            messages=[{"role": "user", "content": body.message}],
            sampling=body,
            max_tokens=body.max_tokens,
            max_tokens_field="max_tokens",
            messages_field="text",
        )

        async def begin(model: ServedModel) -> Begun:
            answer_id = f"inf-{uuid.uuid4().hex}"
            choice = (await choices(conversation, model, hints, answer_id=answer_id, grammars=context.grammars))[0]
            answer = InferenceAnswer(answer_id, model, include_usage=body.include_usage)
            deltas = stream_choices(model, [choice], api=API, bus=context.bus, started_s=hints.came_s)
            return Begun(answer, deltas)

        return await respond(
            begin,
            context.candidates(body.model),
            stream=body.is_stream,
            headers=body.ignored_headers(),
            request=request,
            keepalive_s=context.config.keepalive_s,
        )

    return routes


async def _accept(body: InferenceRequest, request: Request, jobs: JobServices, config: JobsConfig) -> Response:
    """Put off a request; it is put to this route again, without the wish for that."""
    for name in _NOT_LATER:
        if name in request.headers:
            raise UnsupportedFieldError("not for requests that are answered later; leave it out", param=name)
    put_off = body.model_dump_json(
        exclude_unset=True, by_alias=True, exclude={"mode", "run_later", "stream", "stream_options"}
    ).encode()
    now_s = time.time()
    job = Job(
        id=f"job_{uuid.uuid4().hex}",
        kind=JobKind.INFERENCE,
        owner=current_principal(),
        endpoint=PATH,
        state=JobState.IN_PROGRESS,
        created_at=now_s,
        expires_at=now_s + config.expire_after_s,
        in_progress_at=now_s,
        num_bytes=len(put_off),
        num_items=1,
    )
    item = NewItem(position=0, custom_id=None, body=put_off)
    await jobs.store.add(
        job, [item], max_open=config.max_open_per_owner, max_open_bytes=config.max_owner_file_bytes
    )
    jobs.runner.wake()
    accepted = InferenceAccepted(id=job.id, created_at=int(now_s), expires_at=int(job.expires_at))
    headers = {"location": f"/v1/jobs/{job.id}", **body.ignored_headers()}
    return JSONResponse(accepted.model_dump(), status_code=202, headers=headers)


class InferenceAnswer:
    """One request's answer, in the making."""

    def __init__(self, answer_id: str, model: ServedModel, *, include_usage: bool) -> None:
        self._id = answer_id
        self._model = model
        self._created = int(time.time())
        self._include_usage = include_usage
        self._usage = UsageCounter(1)
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._reason = FinishReason.STOP

    def add(self, delta: ChoiceDelta) -> None:
        """See `Answer.add`."""
        self._usage.count(delta)
        self._texts.append(delta.text)
        self._thoughts.append(delta.reasoning)
        self._reason = delta.finish_reason or self._reason

    def whole(self) -> bytes:
        """See `Answer.whole`."""
        whole = Inference(
            id=self._id,
            created=self._created,
            model=self._model.id,
            text="".join(self._texts),
            reasoning="".join(self._thoughts) or None,
            finish_reason=self._reason,
            usage=self._usage.usage(),
        )
        return whole.model_dump_json(exclude_none=True).encode()

    def events(self, delta: ChoiceDelta) -> bytes:
        """See `Answer.events`."""
        self._usage.count(delta)
        event: dict[str, Any] = {"text": delta.text, "finish_reason": delta.finish_reason}
        if delta.reasoning:
            event["reasoning"] = delta.reasoning
        if not delta.text and not delta.reasoning and delta.finish_reason is None:
            return b""
        return self._event(event)

    def end(self) -> bytes:
        """See `Answer.end`: token counts where asked for."""
        if not self._include_usage:
            return DONE
        return self._event({"text": "", "finish_reason": None, "usage": self._usage.usage()}) + DONE

    def _event(self, fields: Mapping[str, Any]) -> bytes:
        return encode_event(
            {
                "id": self._id,
                "object": "inference.chunk",
                "created": self._created,
                "model": self._model.id,
                **fields,
            }
        )
