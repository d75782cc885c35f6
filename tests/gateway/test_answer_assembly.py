"""Answers put together from tokens, however many come at once."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import FinishReason, Request, SamplingParams, TokenChunk, TokenLogprob, ToolCallDelta
from localmoe.core.serving import AnswerFormatName
from localmoe.gateway.answering.generation import AnswerAssembler, Choice, ChoiceDelta
from localmoe.gateway.answering.segments import Begin, End, Grow, Segmenter
from localmoe.gateway.anthropic.answer import MessageAnswer
from localmoe.text.answer_format import answer_format
from localmoe.text.text_model import TextModel

TOOLS = {"f": {"type": "object", "properties": {"path": {"type": "string"}}}}
_DS_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"path": "/tmp/x"}\n```<｜tool▁call▁end｜>'
CALL = '<tool_call>\n{"name": "f", "arguments": {"path": "/tmp/x"}}\n</tool_call>'
ANSWERS: list[tuple[AnswerFormatName, str]] = [
    ("hermes", "Let me.\n" + CALL + "\nDone."),
    ("hermes", "<think>Hm.\n\nSo.</think>\n\nA\n\nB" + CALL + CALL + " end\n"),
    (
        "qwen3_coder",
        "I see.\n<tool_call>\n<function=f>\n<parameter=path>\n/tmp/x\n</parameter>\n</function>\n</tool_call>\n"
        "Done.\n\n",
    ),
    (
        "mistral",
        'So.[TOOL_CALLS] [{"name": "f", "arguments": {"path": "x"}}, {"name": "f", "arguments": {}}] End.',
    ),
    ("mistral_args", 'So.[TOOL_CALLS]f[ARGS]{"path": "x"}[TOOL_CALLS]f[ARGS]{} End.'),
    ("llama3", '{"name": "f", "parameters": {"path": "x"}}; {"name": "f", "parameters": {}}\nDone.'),
    ("deepseek", "Wait.<｜tool▁calls▁begin｜>" + _DS_CALL + "\n" + _DS_CALL + "<｜tool▁calls▁end｜>Done."),
    (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>It is\n\nfinal.",
    ),
]
STOPS = [(), ("\n\n",), ("final",), ('"path"',), ("Done", "A\n\nB"), (".<|",), ("n",)]


def assembler(
    text_model: TextModel, name: AnswerFormatName, *, stops: tuple[str, ...] = (), max_calls: int | None = None
) -> AnswerAssembler:
    format_ = answer_format("<think>" if name != "harmony" else None, name)
    choice = Choice(
        index=0,
        request=Request(id="r", model="tiny", prompt_ids=[5], sampling=SamplingParams(max_tokens=1000)),
        stop_strings=stops,
        make_parser=format_.make_parser(tools=TOOLS, prompt="", max_calls=max_calls),
    )
    return AnswerAssembler(text_model.tokenizer, choice)


def tokens(text_model: TextModel, text: str) -> list[int]:
    return [token for char in text for token in text_model.tokenizer.encode(char, add_special_tokens=False)]


def deltas_of(
    answer: AnswerAssembler, pieces: list[list[int]], *, finish: FinishReason = FinishReason.STOP
) -> list[ChoiceDelta]:
    """Of chunks of these tokens, whose log-probabilities are their places in the answer."""
    deltas: list[ChoiceDelta] = []
    place = 0
    for number, ids in enumerate(pieces):
        scores = [TokenLogprob(token_id=token, logprob=-float(place + at), top=[]) for at, token in enumerate(ids)]
        place += len(ids)
        ends = finish if number + 1 == len(pieces) else None
        deltas += answer.push(TokenChunk(request_id="r", token_ids=ids, logprobs=scores, finish_reason=ends))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def seen(deltas: list[ChoiceDelta]) -> dict[str, Any]:
    """What clients see of an answer, but for the ids of its calls."""
    segmenter = Segmenter(shows_reasoning=True)
    steps = [step for delta in deltas for step in segmenter.push(delta)]
    message = MessageAnswer("tiny", shows_thinking=True, shows_thoughts=True)
    for delta in deltas:
        message.add(delta)
    blocks = json.loads(message.whole())
    for block in blocks["content"]:
        block.pop("id", None)
    return {
        "segments": [(step.kind, step.text) for step in steps if isinstance(step, End)],
        "names": [step.name for step in steps if isinstance(step, Begin)],
        "scored in segments": [token.logprob for step in steps if isinstance(step, Grow) for token in step.scored],
        "scored": [token.logprob for delta in deltas for token in delta.scored],
        "content": "".join(delta.text for delta in deltas),
        "end": (deltas[-1].finish_reason, deltas[-1].stop_string, deltas[-1].completion_tokens),
        "blocks": (blocks["content"], blocks["stop_reason"]),
    }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(ANSWERS), st.sampled_from(STOPS), st.sampled_from([None, 1]))
def test_tokens_that_come_at_once_are_seen_as_one_by_one(
    text_model: TextModel,
    data: st.DataObject,
    answer: tuple[AnswerFormatName, str],
    stops: tuple[str, ...],
    max_calls: int | None,
) -> None:
    name, text = answer
    ids = tokens(text_model, text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    chunks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    at_once, singly = (
        seen(deltas_of(assembler(text_model, name, stops=stops, max_calls=max_calls), pieces))
        for pieces in (chunks, [*([token] for token in ids), []])
    )
    assert at_once == singly
    # Line breaks are put between paragraphs that were apart.
    assert not any(stop in at_once["content"] for stop in stops if max_calls == 1 and stop.strip())


def test_what_follows_a_call_is_none_of_its_arguments(text_model: TextModel) -> None:
    text = CALL + "\nDone."
    cut = text.index('"}}')
    pieces = [tokens(text_model, text[:cut]), tokens(text_model, text[cut:])]
    assert seen(deltas_of(assembler(text_model, "hermes"), pieces))["blocks"][0] == [
        {"type": "tool_use", "name": "f", "input": {"path": "/tmp/x"}},
        {"type": "text", "text": "Done.", "citations": None},
    ]


def test_scores_of_content_stay_where_thoughts_end_in_the_same_chunk(text_model: TextModel) -> None:
    ids = tokens(text_model, "<think>a</think>bc")
    shown = seen(deltas_of(assembler(text_model, "hermes"), [ids]))
    assert [-int(score.logprob) for score in shown["scored in segments"]] == list(range(8, len(ids)))


@pytest.mark.parametrize(
    ("name", "text", "stops", "content", "stop"),
    [
        ("harmony", ANSWERS[-1][1], ("final",), "I look.\n\nIt is\n\n", "final"),
        ("harmony", "<|channel|>analysis<|message|>final<|end|>", ("final",), "", None),
        ("hermes", "<think>a</think>\n\nHi.\n\nThere.", ("\n\n",), "Hi.", "\n\n"),
        ("hermes", "<think>a b</think>c b", (" b",), "c", " b"),
        ("hermes", "Hi\n\n", ("\n\n",), "Hi", "\n\n"),
        # What is put between paragraphs that were apart is not what the model says.
        ("hermes", "Let me." + CALL + "Done.", ("\n\n",), "Let me.\n\nDone.", None),
        ("harmony", ANSWERS[-1][1], ("\n\n",), "I look.\n\nIt is", "\n\n"),
    ],
)
def test_stop_strings_are_looked_for_in_what_is_said(
    text_model: TextModel,
    name: AnswerFormatName,
    text: str,
    stops: tuple[str, ...],
    content: str,
    stop: str | None,
) -> None:
    deltas = deltas_of(assembler(text_model, name, stops=stops), [[token] for token in tokens(text_model, text)])
    assert "".join(delta.text for delta in deltas) == content
    assert deltas[-1].stop_string == stop


def test_a_stop_string_in_an_argument_cuts_no_call(text_model: TextModel) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"path": "a\n\nb"}}</tool_call>'
    deltas = deltas_of(assembler(text_model, "hermes", stops=("\n\n",)), [tokens(text_model, text)])
    assert deltas[-1].finish_reason == FinishReason.TOOL_CALLS
    arguments = "".join(call.arguments for delta in deltas for call in delta.tool_calls)
    assert json.loads(arguments, strict=False) == {"path": "a\n\nb"}


def test_tokens_that_a_stop_string_cut_off_are_not_scored(text_model: TextModel) -> None:
    ids = tokens(text_model, "<think>a</think>\n\nHi\n\nthere")
    deltas = deltas_of(assembler(text_model, "hermes", stops=("\n\n",)), [[token] for token in ids])
    scored = [-int(token.logprob.logprob) for delta in deltas for token in delta.scored]
    assert scored == list(range(20))  # up to "Hi"


def text_chunk(**fields: Any) -> TokenChunk:
    return TokenChunk(request_id="r", **fields)


def of_text(*chunks: TokenChunk) -> list[ChoiceDelta]:
    choice = Choice(
        index=0,
        request=Request(id="r", model="tiny", prompt_ids=[], sampling=SamplingParams(max_tokens=10)),
        stop_strings=("END",),
    )
    answer = AnswerAssembler(None, choice)
    return [delta for chunk in chunks for delta in answer.push(chunk)]


BEGUN = ToolCallDelta(index=0, id="call_0", name="f", arguments='{"x"')
GOES_ON = ToolCallDelta(index=0, arguments=": 1}")


def test_a_call_elsewhere_goes_on_before_what_comes_with_it() -> None:
    deltas = of_text(
        text_chunk(text="", tool_calls=(BEGUN,)),
        text_chunk(text="Done.", tool_calls=(GOES_ON,)),
        text_chunk(text="", finish_reason=FinishReason.STOP),
    )
    assert [text for _, text in seen(deltas)["segments"]] == ['{"x": 1}', "Done."]


def test_content_in_the_midst_of_a_call_is_an_engines_fault() -> None:
    deltas = of_text(
        text_chunk(text="", tool_calls=(BEGUN,)),
        text_chunk(text="Oh."),
        text_chunk(text="", tool_calls=(GOES_ON,)),
    )
    with pytest.raises(EngineFaultError, match="after it had begun another"):
        seen(deltas)


def test_content_that_might_have_become_a_stop_string_comes_before_the_call() -> None:
    deltas = of_text(
        text_chunk(text="The EN"),
        text_chunk(text="", tool_calls=(BEGUN, GOES_ON)),
        text_chunk(text="D", finish_reason=FinishReason.STOP),
    )
    assert [text for _, text in seen(deltas)["segments"]] == ["The EN", '{"x": 1}', "D"]
    (call,) = next(delta.tool_calls for delta in deltas if delta.tool_calls)
    assert (call.name, call.arguments) == ("f", '{"x": 1}')
