"""Details of a message that no scripted engine brings about."""

import json
from typing import Any

import pytest

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import FinishReason, ToolCallDelta
from localmoe.gateway.answering.generation import ChoiceDelta
from localmoe.gateway.anthropic.answer import MessageAnswer


def delta(
    text: str = "", *, calls: tuple[ToolCallDelta, ...] = (), finish: FinishReason | None = None
) -> ChoiceDelta:
    return ChoiceDelta(
        index=0,
        text=text,
        tool_calls=calls,
        scored=[],
        prompt_logprobs=None,
        finish_reason=finish,
        prompt_tokens=10,
        completion_tokens=4,
        cached_tokens=8,
    )


def whole(*deltas: ChoiceDelta) -> dict[str, Any]:
    answer = MessageAnswer("tiny", shows_thinking=True, shows_thoughts=True)
    for one in deltas:
        answer.add(one)
    message: dict[str, Any] = json.loads(answer.whole())
    return message


def test_tokens_found_in_the_cache_are_counted_once() -> None:
    usage = (whole(delta("hi", finish=FinishReason.STOP)))["usage"]
    assert usage == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 8,
        "output_tokens": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Ulm", "days": 3}', {"city": "Ulm", "days": 3}),
        ('{"city": "Ulm", "days": [1, 2', {"city": "Ulm", "days": [1, 2]}),
        ("", {}),
        ("[1]", {}),
        ("not JSON", {}),
    ],
)
def test_an_input_that_was_cut_off_is_what_there_is_of_it(arguments: str, shown: dict[str, Any]) -> None:
    call = ToolCallDelta(index=0, id="call_1", name="weather", arguments=arguments)
    message = whole(delta(calls=(call,)), delta(finish=FinishReason.LENGTH))
    assert message["content"] == [{"type": "tool_use", "id": "call_1", "name": "weather", "input": shown}]
    assert message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("arguments", ["{'city': 'Ulm'}", '{"city": "Ul', "[1]", '{"days": NaN}'])
def test_a_finished_call_with_arguments_that_nobody_can_read_is_no_call_without_any(arguments: str) -> None:
    call = ToolCallDelta(index=0, id="call_1", name="weather", arguments=arguments)
    with pytest.raises(EngineFaultError, match="'weather' with arguments that are no JSON object"):
        whole(delta(calls=(call,)), delta(finish=FinishReason.TOOL_CALLS))
    stream = MessageAnswer("tiny", shows_thinking=True, shows_thoughts=True)
    stream.events(delta(calls=(call,)))
    stream.events(delta(finish=FinishReason.TOOL_CALLS))
    with pytest.raises(EngineFaultError, match="'weather' with arguments that are no JSON object"):
        stream.end()


def test_only_the_last_call_can_have_been_cut_off() -> None:
    calls = [
        ToolCallDelta(index=index, id=f"call_{index}", name=f"tool_{index}", arguments='{"city": "Ul')
        for index in range(2)
    ]
    with pytest.raises(EngineFaultError, match="'tool_0'"):
        whole(*(delta(calls=(call,)) for call in calls), delta(finish=FinishReason.LENGTH))


def test_no_arguments_at_all_are_an_empty_object() -> None:
    call = ToolCallDelta(index=0, id="call_1", name="now")
    message = whole(delta(calls=(call,)), delta(finish=FinishReason.TOOL_CALLS))
    assert message["content"] == [{"type": "tool_use", "id": "call_1", "name": "now", "input": {}}]
