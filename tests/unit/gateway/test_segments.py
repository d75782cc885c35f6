"""Answers cut into segments, whatever pieces they come in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import FinishReason, TokenLogprob, ToolCallDelta
from localmoe.gateway.answering.generation import ChoiceDelta, ScoredToken
from localmoe.gateway.answering.segments import Begin, End, Grow, Segmenter, SegmentKind, Step


def delta(
    text: str = "",
    *,
    reasoning: str = "",
    calls: tuple[ToolCallDelta, ...] = (),
    scored: list[ScoredToken] | None = None,
    ends: bool = False,
) -> ChoiceDelta:
    return ChoiceDelta(
        index=0,
        text=text,
        reasoning=reasoning,
        tool_calls=calls,
        scored=scored or [],
        prompt_logprobs=None,
        finish_reason=FinishReason.STOP if ends else None,
        prompt_tokens=3,
        completion_tokens=1,
        cached_tokens=0,
    )


def call(index: int, name: str, arguments: str = "") -> ToolCallDelta:
    return ToolCallDelta(index=index, id=f"call_{index}", name=name, arguments=arguments)


def test_calls_that_are_sent_in_turns_are_an_engines_fault() -> None:
    with pytest.raises(EngineFaultError, match="after it had begun another"):
        steps_of(
            delta(calls=(call(0, "look"), call(1, "go"))), delta(calls=(ToolCallDelta(index=0, arguments="}"),))
        )


def steps_of(*deltas: ChoiceDelta, shows_reasoning: bool = True) -> list[Step]:
    segmenter = Segmenter(shows_reasoning=shows_reasoning)
    return [step for one in deltas for step in segmenter.push(one)]


def ends_of(steps: list[Step]) -> list[tuple[SegmentKind, str]]:
    return [(step.kind, step.text) for step in steps if isinstance(step, End)]


def test_thoughts_content_and_calls_follow_each_other() -> None:
    steps = steps_of(
        delta(reasoning="hm"),
        delta(reasoning="m"),
        delta("\n\n"),
        delta("So: "),
        delta("this.", calls=(call(0, "look", "{"),)),
        delta(calls=(ToolCallDelta(index=0, arguments="}"), call(1, "go"))),
        delta(ends=True),
    )
    assert ends_of(steps) == [
        (SegmentKind.REASONING, "hmm"),
        (SegmentKind.CONTENT, "\n\nSo: this."),
        (SegmentKind.TOOL_CALL, "{}"),
        (SegmentKind.TOOL_CALL, ""),
    ]
    begins = [(step.kind, step.name) for step in steps if isinstance(step, Begin)]
    assert begins[2:] == [(SegmentKind.TOOL_CALL, "look"), (SegmentKind.TOOL_CALL, "go")]


def test_white_space_between_calls_is_no_segment_and_is_forgotten() -> None:
    steps = steps_of(
        delta(" \n"),
        delta(calls=(call(0, "a"),)),
        delta("\n"),
        delta(calls=(call(1, "b"),)),
        delta("x", ends=True),
    )
    assert ends_of(steps) == [
        (SegmentKind.TOOL_CALL, ""),
        (SegmentKind.TOOL_CALL, ""),
        (SegmentKind.CONTENT, "x"),
    ]


def test_an_answer_of_white_space_alone_is_content() -> None:
    assert ends_of(steps_of(delta(" "), delta("\n", ends=True))) == [(SegmentKind.CONTENT, " \n")]
    assert steps_of(delta(ends=True)) == []


def test_thoughts_can_be_left_out() -> None:
    steps = steps_of(delta(reasoning="secret"), delta("open", ends=True), shows_reasoning=False)
    assert ends_of(steps) == [(SegmentKind.CONTENT, "open")]


def test_scores_are_those_of_the_content_and_none_is_lost() -> None:
    def scored(token_id: int) -> list[ScoredToken]:
        return [ScoredToken(logprob=TokenLogprob(token_id=token_id, logprob=-1.0, top=[]), text_offset=0)]

    steps = steps_of(
        delta(reasoning="r", scored=scored(1)),
        delta(" ", scored=scored(2)),
        delta("a", scored=scored(3)),
        delta(scored=scored(4)),
        delta(scored=scored(5), ends=True),
    )
    grown = [token.logprob.token_id for step in steps if isinstance(step, Grow) for token in step.scored]
    assert grown == [2, 3, 4, 5]


pieces = st.lists(
    st.one_of(
        st.builds(lambda text: delta(text), st.text(alphabet="ab \n", min_size=1, max_size=3)),
        st.builds(lambda text: delta(reasoning=text), st.text(alphabet="xy", min_size=1, max_size=3)),
        st.builds(lambda text: ("call", text), st.text(alphabet='{}"', max_size=3)),
    ),
    max_size=12,
)


@given(pieces)
def test_every_segment_begins_grows_to_its_text_and_ends_before_the_next(parts: list[object]) -> None:
    deltas: list[ChoiceDelta] = []
    num_calls = 0
    for part in parts:
        if isinstance(part, tuple):
            deltas.append(delta(calls=(call(num_calls, "f", part[1]),)))
            num_calls += 1
        else:
            assert isinstance(part, ChoiceDelta)
            deltas.append(part)
    steps = steps_of(*deltas, delta(ends=True))
    grown = ""
    current: SegmentKind | None = None
    for step in steps:
        match step:
            case Begin():
                assert current is None
                current, grown = step.kind, ""
            case Grow():
                assert step.kind is current
                grown += step.text
            case End():
                assert step.kind is current
                assert step.text == grown
                current = None
    assert current is None
    ends = ends_of(steps)
    assert sum(kind is SegmentKind.TOOL_CALL for kind, _ in ends) == num_calls
    said = "".join(one.text for one in deltas)
    shown = "".join(text for kind, text in ends if kind is SegmentKind.CONTENT)
    assert "".join(shown.split()) == "".join(said.split())
    assert all(not text.isspace() for kind, text in ends if kind is SegmentKind.CONTENT) or len(ends) == 1


@pytest.mark.parametrize("text", ["word", " word"])
def test_content_is_passed_on_as_it_comes(text: str) -> None:
    segmenter = Segmenter(shows_reasoning=True)
    segmenter.push(delta("first"))
    assert segmenter.push(delta(text)) == [Grow(kind=SegmentKind.CONTENT, text=text, scored=[])]
