"""An answer as OpenAI's Responses API sends it: output items, in one piece or as a stream of numbered events."""

import time
from collections.abc import Callable, Sequence

import msgspec

from localmoe.core.request import FinishReason
from localmoe.gateway.answering.generation import ChoiceDelta, ScoredToken
from localmoe.gateway.answering.segments import Begin, End, Grow, Segmenter, SegmentKind, Step
from localmoe.gateway.answering.streaming import encode_tagged
from localmoe.gateway.errors import ApiError
from localmoe.gateway.responses.wire import (
    ContentPartAdded,
    ContentPartDone,
    FunctionCallArgumentsDelta,
    FunctionCallArgumentsDone,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseError,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseStreamEvent,
    ResponseUsage,
    Score,
)

_ITEM_PREFIXES = {SegmentKind.CONTENT: "msg", SegmentKind.REASONING: "rs", SegmentKind.TOOL_CALL: "fc"}

ShowScores = Callable[[Sequence[ScoredToken]], list[Score]]


def no_scores(scored: Sequence[ScoredToken]) -> list[Score]:
    """For answers whose log-probabilities were not asked for."""
    return []


def set_failed(response: ResponseObject, error: ApiError) -> None:
    """Nothing more comes of it."""
    response.status = "failed"
    response.error = ResponseError(
        code="invalid_prompt" if error.status == 400 else "server_error", message=error.message
    )


class ResponseAnswer:
    """One response's answer, in the making.

    Args:
        response: as it is before its answer.
        score: shows log-probabilities.
    """

    def __init__(self, response: ResponseObject, *, score: ShowScores = no_scores) -> None:
        self.response = response
        """As it is now."""
        self._items = _Items(response.id, score)
        self._segmenter = Segmenter(shows_reasoning=True)
        self._num_events = 0
        self._completion_tokens = 0
        self._reasoning_tokens = 0

    def events(self, delta: ChoiceDelta) -> bytes:
        """See `Answer.events`: how the response begins at first, then items as they come."""
        return self._beginning() + self._encode(self._push(delta))

    def end(self) -> bytes:
        """See `Answer.end`."""
        kind = ResponseCompleted if self.response.status == "completed" else ResponseIncomplete
        return self._encode([kind(sequence_number=0, response=self.response)])

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that breaks off, after those of its beginning, without which official clients
        understand none."""
        if not self._num_events:
            self.response.store = False  # what never began is not kept
        beginning = self._beginning()
        set_failed(self.response, error)
        return beginning + self._encode([ResponseFailed(sequence_number=0, response=self.response)])

    def add(self, delta: ChoiceDelta) -> None:
        """See `Answer.add`."""
        self._push(delta)

    def whole(self) -> bytes:
        """See `Answer.whole`."""
        return msgspec.json.encode(self.response)

    def _beginning(self) -> bytes:
        """How the response begins, unless that was said."""
        if self._num_events:
            return b""
        in_progress = ResponseInProgress(sequence_number=0, response=self.response)
        return self._encode([ResponseCreated(sequence_number=0, response=self.response), in_progress])

    def _push(self, delta: ChoiceDelta) -> list[ResponseStreamEvent]:
        if delta.reasoning:
            self._reasoning_tokens += delta.completion_tokens - self._completion_tokens
        self._completion_tokens = delta.completion_tokens
        is_cut = delta.finish_reason == FinishReason.LENGTH
        steps = self._segmenter.push(delta)
        events = [
            event
            for place, step in enumerate(steps)
            for event in self._items.push(
                step, status="incomplete" if is_cut and place + 1 == len(steps) else "completed"
            )
        ]
        self.response.output = self._items.whole
        if delta.finish_reason is not None:
            self._finish(delta, is_cut=is_cut)
        return events

    def _finish(self, delta: ChoiceDelta, *, is_cut: bool) -> None:
        response = self.response
        if is_cut:
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            response.status = "completed"
            response.completed_at = int(time.time())
        response.usage = ResponseUsage(
            input_tokens=delta.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=delta.cached_tokens),
            output_tokens=delta.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._reasoning_tokens),
            total_tokens=delta.prompt_tokens + delta.completion_tokens,
        )

    def _encode(self, events: Sequence[ResponseStreamEvent]) -> bytes:
        data = b""
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
            data += encode_tagged(event)
        return data


class _Items:
    """Output items, one after the other, and the events that tell of them, which have no numbers yet."""

    def __init__(self, response_id: str, score: ShowScores) -> None:
        self._suffix = response_id.partition("_")[2]
        self._score = score
        self._id = ""
        self._call = Begin(kind=SegmentKind.TOOL_CALL)
        self._logprobs: list[Score] = []
        self.whole: list[OutputItem] = []
        """Those that are complete."""

    def push(self, step: Step, *, status: ItemStatus) -> list[ResponseStreamEvent]:
        """Events of one step.

        Args:
            status: of an item that ends.
        """
        match step:
            case Begin():
                return self._begin(step)
            case Grow():
                return [self._grow(step)]
            case End():
                return self._end(step, status)

    def _begin(self, step: Begin) -> list[ResponseStreamEvent]:
        self._id = f"{_ITEM_PREFIXES[step.kind]}_{self._suffix}_{len(self.whole)}"
        self._logprobs = []
        self._call = step
        place = {"sequence_number": 0, "output_index": len(self.whole)}
        item = self._item(step.kind, None, "in_progress")
        events: list[ResponseStreamEvent] = [OutputItemAdded(item=item, **place)]
        if step.kind is not SegmentKind.TOOL_CALL:
            part = self._part(step.kind, "")
            events.append(ContentPartAdded(item_id=self._id, content_index=0, part=part, **place))
        return events

    def _grow(self, step: Grow) -> ResponseStreamEvent:
        place = {"sequence_number": 0, "output_index": len(self.whole)}
        match step.kind:
            case SegmentKind.CONTENT:
                logprobs = self._score(step.scored) if step.scored else []
                self._logprobs += logprobs
                return OutputTextDelta(
                    item_id=self._id, content_index=0, delta=step.text, logprobs=logprobs, **place
                )
            case SegmentKind.REASONING:
                return ReasoningTextDelta(item_id=self._id, content_index=0, delta=step.text, **place)
            case SegmentKind.TOOL_CALL:
                return FunctionCallArgumentsDelta(item_id=self._id, delta=step.text, **place)

    def _end(self, step: End, status: ItemStatus) -> list[ResponseStreamEvent]:
        place = {"sequence_number": 0, "output_index": len(self.whole)}
        events: list[ResponseStreamEvent] = []
        if step.kind is SegmentKind.TOOL_CALL:
            name = self._call.name
            events.append(FunctionCallArgumentsDone(item_id=self._id, name=name, arguments=step.text, **place))
        else:
            part = self._part(step.kind, step.text)
            if isinstance(part, OutputText):
                logprobs = part.logprobs
                events.append(
                    OutputTextDone(item_id=self._id, content_index=0, text=step.text, logprobs=logprobs, **place)
                )
            else:
                events.append(ReasoningTextDone(item_id=self._id, content_index=0, text=step.text, **place))
            events.append(ContentPartDone(item_id=self._id, content_index=0, part=part, **place))
        item = self._item(step.kind, step.text, status)
        events.append(OutputItemDone(item=item, **place))
        self.whole.append(item)
        return events

    def _item(self, kind: SegmentKind, text: str | None, status: ItemStatus) -> OutputItem:
        """The item with this text; with None, as it begins."""
        match kind:
            case SegmentKind.CONTENT:
                content = [] if text is None else [OutputText(text=text, logprobs=self._logprobs)]
                return OutputMessage(id=self._id, status=status, content=content)
            case SegmentKind.REASONING:
                thoughts = [] if text is None else [ReasoningText(text=text)]
                return ReasoningItem(id=self._id, status=status, content=thoughts)
            case SegmentKind.TOOL_CALL:
                call = self._call
                return FunctionCallItem(
                    id=self._id, status=status, call_id=call.call_id, name=call.name, arguments=text or ""
                )

    def _part(self, kind: SegmentKind, text: str) -> OutputText | ReasoningText:
        if kind is SegmentKind.REASONING:
            return ReasoningText(text=text)
        return OutputText(text=text, logprobs=self._logprobs)
