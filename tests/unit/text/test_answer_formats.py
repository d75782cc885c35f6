"""Answers as models write them, cut anywhere."""

import json
import weakref
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from localmoe.core.serving import AnswerFormatName
from localmoe.text.answer_format import FORMATS, AnswerFormat, answer_format
from localmoe.text.answer_parser import AnswerParser, PlainParser
from localmoe.text.answer_scanner import MAX_ATTEMPT_CHARS, SteppedParser

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array"},
        "free": {"enum": [1, "a"]},
    },
}
TOOLS = {"get_weather": WEATHER, "now": {"type": "object"}}


@dataclass
class Answer:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] | None = None
    is_complete: bool = False


def formats(name: str, *, thinks: str = "") -> AnswerFormat:
    return answer_format(thinks, name)


def parse(parser: AnswerParser, pieces: list[str]) -> Answer:
    answer = Answer(calls=[])
    for part in [part for piece in pieces for part in parser.push(piece)] + list(parser.flush()):
        answer.content += part.content
        answer.reasoning += part.reasoning
        assert answer.calls is not None
        for delta in part.tool_calls:
            if delta.name is not None:
                assert delta.index == len(answer.calls)
                assert delta.id
                answer.calls.append((delta.name, ""))
            assert delta.index == len(answer.calls) - 1
            name, arguments = answer.calls[-1]
            answer.calls[-1] = (name, arguments + delta.arguments)
    answer.is_complete = parser.is_complete
    return answer


def parser_of(format_: AnswerFormat, *, prompt: str = "", max_calls: int | None = None) -> AnswerParser:
    return format_.make_parser(tools=TOOLS, prompt=prompt, max_calls=max_calls)()


PARIS = '{"city": "Paris"}'
TRICKY = '{"city": "a \\"}{[] \\\\", "x": {"y": [1, {"z": "</tool_call>"}]}}'
DS_BEGIN, DS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def ds(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def hermes_call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


# format, text, content, reasoning, calls
SAMPLES: list[tuple[str, str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Just text.\n", "Just text.\n", "", []),
    ("hermes", "  ", "  ", "", []),
    (
        "hermes",
        hermes_call('{"name": "get_weather", "arguments": {"city": "Paris"}}'),
        "",
        "",
        [("get_weather", PARIS)],
    ),
    (
        "hermes",
        "Let me look.\n"
        + hermes_call('{"name": "get_weather", "arguments": ' + TRICKY + "}")
        + "\n"
        + hermes_call('{"arguments": {}, "name": "now"}')
        + "\n",
        "Let me look.",
        "",
        [("get_weather", TRICKY), ("now", "{}")],
    ),
    ("hermes", '<tool_call>{"name":"now"}</tool_call>', "", "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name":"now","arguments":null}</tool_call> ok', "ok", "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name":"now","arguments":"{\\"a\\": 1}"}', "", "", [("now", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name":"now","parameters":{"a":1},"id":7}', "", "", [("now", '{"a":1}')]),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        "",
        "",
        [("get_weather", '{"city": "Par')],
    ),
    (
        "hermes",
        hermes_call(
            '{"name": "now", "arguments":\n {"code": "a = 1\n\tb\\n", "smile": "\\ud83d\\ude00 \\ud83d \\udE00"}}'
        ),
        "",
        "",
        [("now", '{"code": "a = 1\\n\\tb\\n", "smile": "\\ud83d\\ude00 \\ufffd \\ufffd"}')],
    ),
    (
        "hermes",
        hermes_call('{"name": "now", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}'),
        "",
        "",
        [("now", '{"a": "?"}')],
    ),
    (
        "hermes",
        hermes_call('{"name": "now", "arguments": "{\\"a\\": \\"b\\nc\\"}"}'),
        "",
        "",
        [("now", '{"a": "b\\nc"}')],
    ),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "b\\ud83d', "", "", [("now", '{"a": "b')]),
    ("hermes", "<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", "", []),
    ("hermes", '<tool_call>{"name": 5}', '<tool_call>{"name": 5}', "", []),
    ("hermes", '<tool_call>{"name": "a b"}', '<tool_call>{"name": "a b"}', "", []),
    ("hermes", "a <tool_", "a <tool_", "", []),
    ("hermes", "a <tool_call>", "a <tool_call>", "", []),
    ("hermes", "<tool_call><tool_call>" + '{"name":"now"}', "<tool_call>", "", [("now", "{}")]),
    (
        "qwen3_coder",
        'Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n"York"\n</parameter>\n<parameter=days>\n3\n'
        '</parameter>\n<parameter=note>\n5\n</parameter>\n<parameter=tags>\n["a", 1]\n</parameter>\n</function>\n'
        "</tool_call>",
        "Sure.",
        "",
        [("get_weather", '{"city": "New\\n\\"York\\"", "days": 3, "note": "5", "tags": ["a", 1]}')],
    ),
    (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=days>\nmany\n</parameter>\n<parameter=note>null</parameter>\n"
        "<parameter=free>True</parameter><parameter=tags>NaN</parameter>\n</function>",
        "",
        "",
        [("get_weather", '{"days": "many", "note": null, "free": true, "tags": "NaN"}')],
    ),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", "", [("now", "{}")]),
    (
        "qwen3_coder",
        "<tool_call>\n<function=now>\n<parameter=x>\na\n</parameter>\n</tool_call>\nDone.",
        "Done.",
        "",
        [("now", '{"x": "a"}')],
    ),
    ("qwen3_coder", "<tool_call><function=now></tool_call>", "", "", [("now", "{}")]),
    (
        "qwen3_coder",
        '<function=get_weather><parameter=tags>["\\ud83d"]</parameter></function>',
        "",
        "",
        [("get_weather", '{"tags": ["\\ufffd"]}')],
    ),
    ("qwen3_coder", "<function=now>\n<parameter=x>\nab\n", "", "", [("now", '{"x": "ab')]),
    ("qwen3_coder", "<function=now><parameter=x>ab</parameter>\nfoo", "foo", "", [("now", '{"x": "ab"}')]),
    ("qwen3_coder", "<function=now><parameter=x>ab</parameter>\n", "", "", [("now", '{"x": "ab"')]),
    ("qwen3_coder", hermes_call('{"name": "now", "arguments": {}}'), "", "", [("now", "{}")]),
    ("qwen3_coder", "<function=a b>", "<function=a b>", "", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "now", "arguments": {}, "id": "123456789"}]',
        "",
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}', "", "", [("now", "{}")]),
    ("mistral", "Hi [TOOL_CALLS] [1, 2]", "Hi [TOOL_CALLS] [1, 2]", "", []),
    (
        "mistral_args",
        'One moment.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}',
        "One moment.",
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    ("mistral_args", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", "", [("get_weather", PARIS)]),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", "", [("get_weather", PARIS)]),
    (
        "llama3",
        '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "now", "parameters": {}}',
        "",
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}', "", "", [("now", "{}")]),
    ("llama3", '{"name": "Alice", "parameters": {}}', '{"name": "Alice", "parameters": {}}', "", []),
    ("llama3", '{"name": "now"}', '{"name": "now"}', "", []),
    ("llama3", '{"city": "Paris"}\n', '{"city": "Paris"}\n', "", []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", "", []),
    (
        "deepseek",
        "Wait." + DS_BEGIN + ds("get_weather", PARIS) + "\n" + ds("now", "{}") + DS_END,
        "Wait.",
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    (
        "deepseek_v31",
        f"{DS_BEGIN}<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>{DS_END}",
        "",
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    ("deepseek", DS_BEGIN + "nothing", DS_BEGIN + "nothing", "", []),
    (
        "harmony",
        "<|channel|>analysis<|message|>They want\n the weather.<|end|><|start|>assistant<|channel|>commentary"
        " to=functions.get_weather <|constrain|>json<|message|>" + PARIS,
        "",
        "They want\n the weather.",
        [("get_weather", PARIS)],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>analysis<|message|>Yes.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Sunny.\n",
        "Sunny.\n",
        "Hm.\n\nYes.",
        [],
    ),
    ("harmony", " to=functions.now<|channel|>commentary json<|message|>{}", "", "", [("now", "{}")]),
    (
        "harmony",
        "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant to=functions.now<|channel|>commentary"
        " json<|message|>{}<|call|>",
        "I'll look.",
        "",
        [("now", "{}")],
    ),
    (
        "harmony",
        '<|channel|>commentary to=functions.now<|message|>{"code": "a\nb"}<|call|>',
        "",
        "",
        [("now", '{"code": "a\\nb"}')],
    ),
    ("harmony", "<|channel|>commentary to=functions.now<|message|> \n<|call|>", "", "", [("now", "{}")]),
    ("harmony", "<|channel|>commentary to=functions.now<|message|>", "", "", [("now", "{}")]),
    ("harmony", "no channel", "no channel", "", []),
    ("harmony", "<|channel|>fin", "", "", []),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>fin", "", "Hm.", []),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|start|>assistant", "", "Hm.", []),
    ("harmony", "<|channel|>final<|message|>Hm.<|end|><|start|>assistant to=functions.no", "Hm.", "", []),
    ("harmony", "<|channel|>final<|message|>Hm.<|end|><|start|>", "Hm.", "", []),
    ("harmony", "Hm.<|start|>assistant<|channel|>commentary <|constrain|>js", "Hm.", "", []),
    ("harmony", " to=functions.now<|channel|>comm", "", "", []),
    ("harmony", "a <|start|> b <", "a <|start|> b <", "", []),
    ("harmony", "assistant", "assistant", "", []),
]
IDS = [f"{index}-{sample[0]}" for index, sample in enumerate(SAMPLES)]


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_whole_and_by_characters(sample: tuple[str, str, str, str, list[tuple[str, str]]]) -> None:
    name, text, content, reasoning, calls = sample
    expected = Answer(content=content, reasoning=reasoning, calls=calls)
    assert parse(parser_of(formats(name)), [text]) == expected
    assert parse(parser_of(formats(name)), list(text)) == expected


@pytest.mark.parametrize("marks", ["<think>", "[THINK]"])
@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("sample", SAMPLES[:4])
def test_reasoning_before_an_answer(sample: Any, marks: str, has_begun: bool) -> None:
    closing = marks[0] + "/" + marks[1:]
    name, text, content, _, calls = sample
    format_ = formats(name, thinks=marks + closing)
    whole = ("" if has_begun else f"\n{marks}") + f"\nI think <b>.\n{closing}\n\n{text}"
    expected = Answer(content=content if content.strip() else "", reasoning="I think <b>.", calls=calls)
    for pieces in ([whole], list(whole)):
        prompt = f"user: hi\nassistant: {marks}\n" if has_begun else "assistant:"
        assert parse(parser_of(format_, prompt=prompt), pieces) == expected


def test_reasoning_that_never_ends_and_none() -> None:
    format_ = formats("hermes", thinks="<think></think>")
    assert parse(parser_of(format_), ["<think>abc </thi"]) == Answer(reasoning="abc </thi", calls=[])
    assert parse(parser_of(format_), ["<think>\n\n</think>\n\nHi"]) == Answer(content="Hi", calls=[])
    assert parse(parser_of(format_), ["Hi <think>"]) == Answer(content="Hi <think>", calls=[])
    prompt = "<think>\n\n</think>\n\n"
    assert parse(parser_of(format_, prompt=prompt), ["Hi"]) == Answer(content="Hi", calls=[])


def test_without_tools_calls_are_text() -> None:
    text = hermes_call('{"name": "now", "arguments": {}}')
    assert formats("hermes").make_parser(tools={}, prompt="") is PlainParser
    thinking = formats("hermes", thinks="<think>").make_parser(tools={}, prompt="")()
    assert parse(thinking, ["<think>a</think>" + text]) == Answer(content=text, reasoning="a", calls=[])
    harmony = formats("harmony").make_parser(tools={}, prompt="")()
    assert parse(harmony, ["<|channel|>final<|message|>Hi"]) == Answer(content="Hi", calls=[])


def test_an_answer_does_not_keep_its_prompt() -> None:
    class Prompt(str):
        """Can be seen to go."""

    prompt = Prompt("user: hi<think>")
    left = weakref.ref(prompt)
    parser = parser_of(formats("hermes", thinks="<think>"), prompt=prompt)
    del prompt
    assert left() is None
    assert parse(parser, ["a</think>b"]) == Answer(content="b", reasoning="a", calls=[])


def test_one_call_ends_an_answer_that_may_have_one() -> None:
    text = hermes_call('{"name": "now", "arguments": {}}') * 2 + "more"
    whole = parse(parser_of(formats("hermes"), max_calls=1), [text])
    assert whole == Answer(calls=[("now", "{}")], is_complete=True)
    assert parse(parser_of(formats("hermes"), max_calls=1), list(text)) == whole


def test_names_come_first_and_arguments_as_they_come() -> None:
    parser = parser_of(formats("hermes"))
    seen = []
    for piece in (
        "Hi ",
        "<tool",
        '_call>{"name": "now"',
        ', "arguments": {"a',
        '": [1',
        "]}",
        "}</tool_call>",
        ".",
    ):
        parts = parser.push(piece)
        calls = [(call.name, call.arguments) for part in parts for call in part.tool_calls]
        seen.append(("".join(part.content for part in parts), calls))
    assert seen == [
        ("Hi", []),
        ("", []),
        ("", [("now", "")]),
        ("", [(None, '{"a')]),
        ("", [(None, '": [1')]),
        ("", [(None, "]}")]),
        ("", []),
        ("\n\n.", []),
    ]


def test_ids_differ_and_suit_mistral() -> None:
    text = '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'
    parts = parser_of(formats("mistral")).push(text)
    ids = [call.id for part in parts for call in part.tool_calls if call.id]
    assert len(set(ids)) == 2
    assert all(len(id_) == 9 and id_.isalnum() for id_ in ids)


MARKS = [
    *(mark for format_ in FORMATS.values() for mark in format_.marks),
    *(
        "<think>",
        "</think>",
        "<function=now>",
        "<parameter=x>",
        "</parameter>",
        "</function>",
        "```json\n",
        "analysis",
    ),
    *(
        '{"name": "now", "arguments": {',
        '"name": "now"',
        '{"',
        "{",
        "}",
        "}}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "\\",
        "\n",
        " ",
        ";",
    ),
    *("now", "function", " to=functions.now", "x", "1", "null", '{"name": "now", "parameters": {}}', "é世"),
]
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=30).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMATS)), texts, st.sampled_from(["", "<think>", "a"]))
def test_any_split_gives_the_same(data: st.DataObject, name: str, text: str, prompt: str) -> None:
    format_ = formats(name, thinks="<think>")
    max_calls = data.draw(st.sampled_from([None, 1]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    split, whole = (
        parse(parser_of(format_, prompt=prompt, max_calls=max_calls), given_) for given_ in (pieces, [text])
    )
    assert split == whole


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), texts)
def test_text_without_calls_is_whole(name: str, text: str) -> None:
    answer = parse(parser_of(formats(name)), list(text))
    if not answer.calls and not answer.reasoning and name != "harmony":
        assert answer.content == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), min_size=1, max_size=3),
    st.integers(1, 7),
)
def test_calls_that_are_written_are_read(name: str, arguments: list[dict[str, Any]], step: int) -> None:
    format_ = FORMATS[name]
    calls = [("get_weather", json.dumps(one)) for one in arguments]
    if format_.syntax.separator is None:
        calls = calls[:1]
    text = format_.syntax.write(calls)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    assert parse(parser_of(format_), pieces) == Answer(calls=calls)


unstrict = st.lists(
    st.sampled_from([*"a\n\t\x00{", "\\\\", '\\"', "\\n", "\\u00e9", "\\ud83d", "\\ude00"]), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["hermes", "harmony"]), unstrict.map("".join), st.integers(1, 7))
def test_arguments_are_json_that_everybody_reads(name: str, written: str, step: int) -> None:
    """Which control characters and halves of pairs in strings are not."""
    text = FORMATS[name].syntax.write([("now", f'{{"a": "{written}"}}')])
    answer = parse(parser_of(FORMATS[name]), [text[at : at + step] for at in range(0, len(text), step)])
    assert answer.calls is not None
    ((_, arguments),) = answer.calls
    meant = json.loads(f'"{written}"', strict=False)
    read = from_json(arguments)["a"]
    assert read == meant.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\d+\.\w", r"\d+\.\w"),
        (r"it\'s", r"it\'s"),
        (r"C:\Users\x", r"C:\Users\x"),
        (r"\u12", r"\u12"),
        ("\\\n", "\\\n"),
        (r"\/\b\f\u0041", "/\b\fA"),
    ],
)
def test_backslashes_that_escape_nothing_are_meant_as_they_are(written: str, meant: str, step: int) -> None:
    text = FORMATS["hermes"].syntax.write([("now", f'{{"a": "{written}"}}')])
    answer = parse(parser_of(FORMATS["hermes"]), [text[at : at + step] for at in range(0, len(text), step)])
    assert answer.calls is not None
    ((_, arguments),) = answer.calls
    assert json.loads(arguments) == {"a": meant}


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("hermes", '<tool_call>{"x": "'),
        ("qwen3_coder", "<function=a"),
        ("mistral", '[TOOL_CALLS] [{"arguments": {"'),
        ("mistral_args", "[TOOL_CALLS]a"),
        ("llama3", '<|python_tag|>{"x": "'),
        ("deepseek", "<｜tool▁call▁begin｜>a"),
        ("harmony", "<|start|>assistant<|channel|>a"),
    ],
)
def test_many_beginnings_cost_little(name: str, beginning: str) -> None:
    """An answer may be made of what could become calls; each is looked at for so long only."""
    text = beginning * 1000 + "<"  # no harmony header goes on so
    parser = parser_of(FORMATS[name])
    assert isinstance(parser, SteppedParser)
    source, most, content = parser._source, 0, ""
    for at in range(0, len(text), 4):
        content += "".join(part.content for part in parser.push(text[at : at + 4]))
        most = max(most, len(source._text) + sum(map(len, source._taken)))
    assert content + "".join(part.content for part in parser.flush()) == text
    assert most <= MAX_ATTEMPT_CHARS + 100


def test_detection() -> None:
    chosen = {
        "plain": ("{{ messages }}", "hermes", None),
        "qwen3": ("{%- if tools %}<tool_call></tool_call>{{ '</think>' }}", "hermes", ("<think>", "</think>")),
        "coder": ("<tool_call>\n<function=example_function_name>", "qwen3_coder", None),
        "mistral": ('{{- "[TOOL_CALLS] [" }}', "mistral", None),
        "magistral": ("[THINK] [TOOL_CALLS] [ARGS]", "mistral_args", ("[THINK]", "[/THINK]")),
        "llama": ('{{- "<|python_tag|>" }}', "llama3", None),
        "llama3.2": (
            '{"name": function name, "parameters": dictionary of argument name and its value}',
            "llama3",
            None,
        ),
        "r1": ("<｜tool▁calls▁begin｜>' + '```json' + '</think>'", "deepseek", ("<think>", "</think>")),
        "v3.1": ("<｜tool▁calls▁begin｜> thinking </think>", "deepseek_v31", ("<think>", "</think>")),
        "gpt-oss": ("<|start|>assistant<|channel|>final<|message|>", "harmony", None),
    }
    for template, name, marks in chosen.values():
        assert (answer_format(template).name, answer_format(template).thought_marks) == (name, marks)
    assert answer_format(None).name == "hermes"
    assert answer_format("<think>", "mistral").thought_marks == ("<think>", "</think>")
    assert set(FORMATS) == set(get_args(AnswerFormatName))
