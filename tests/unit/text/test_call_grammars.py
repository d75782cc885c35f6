"""Grammars that make answers call tools: what they let through is read as calls, and nothing else is let through."""

import json
import random
from typing import Any

import pytest
import tokenizers

from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.request import Grammar
from localmoe.text.answer_format import FORMATS, AnswerFormat, answer_format
from localmoe.text.call_grammar import answer_grammar
from localmoe.text.grammar import GrammarCompiler, GrammarMatcher
from localmoe.text.text_model import TextModel
from support.tiny_text import write_tiny_text_model

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
CONTENT = Grammar(kind="json_schema", source=json.dumps(TOOLS["get_weather"]))
CALL = ("get_weather", '{"city": "Paris", "days": 3}')
THINK = "<think></think>"


@pytest.fixture(scope="module", params=["text", "special"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """Whose tokenizer has marks as text, or as special tokens."""
    directory = write_tiny_text_model(tmp_path_factory.mktemp(request.param))
    if request.param == "special":
        path = directory / "tokenizer.json"
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        marks = {mark for format_ in FORMATS.values() for mark in format_.marks}
        tokenizer.add_special_tokens([*sorted(marks), "<think>", "</think>"])
        tokenizer.save(str(path))
        (directory / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    return TextModel.load(directory)


@pytest.fixture(scope="module")
def compiler(text: TextModel) -> GrammarCompiler:
    return GrammarCompiler(text.tokenizer, text.vocab_size)


def grammar(format_: AnswerFormat, text: TextModel, **fields: Any) -> Grammar:
    defaults = {"prompt": "", "tools": TOOLS, "max_calls": None, "content": None}
    return answer_grammar(format_, text.tokenizer, **{**defaults, **fields})


def matcher(compiler: GrammarCompiler, text: TextModel, asked: Grammar) -> GrammarMatcher:
    return compiler.matcher(asked, stop_token_ids=text.defaults.eos_token_ids)


def accepts(compiler: GrammarCompiler, text: TextModel, asked: Grammar, answer: str) -> bool:
    following = matcher(compiler, text, asked)
    try:
        following.take(text.tokenizer.encode(answer, add_special_tokens=False))
    except EngineFaultError:
        return False
    return following.is_complete or allows(following.allowed([])[0], text.defaults.eos_token_ids[0])


def allows(mask: bytes, token_id: int) -> bool:
    return bool(mask[token_id >> 3] >> (token_id & 7) & 1)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_as_the_model_writes_them(text: TextModel, compiler: GrammarCompiler, name: str) -> None:
    format_ = FORMATS[name]
    syntax = format_.syntax
    asked = grammar(format_, text)
    assert accepts(compiler, text, asked, syntax.write([CALL]))
    assert accepts(compiler, text, asked, syntax.write([CALL, ("now", "{}")])) == (syntax.separator is not None)
    assert not accepts(compiler, text, asked, "Hello")
    for wrong in (
        ("later", "{}"),
        ("get_weather", '{"city": "Oslo"}'),
        ("get_weather", "{}"),
        ("now", '{"a": 1}'),
    ):
        assert not accepts(compiler, text, asked, syntax.write([wrong]))
    one = grammar(format_, text, max_calls=1)
    assert accepts(compiler, text, one, syntax.write([CALL]))
    assert not accepts(compiler, text, one, syntax.write([CALL, CALL]))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"harmony"}))
def test_reasoning_comes_first(text: TextModel, compiler: GrammarCompiler, name: str) -> None:
    format_ = answer_format(THINK, name)
    calls = format_.syntax.write([CALL])
    thought = "Hm, <b> {\n"
    may = grammar(format_, text)
    assert accepts(compiler, text, may, f"<think>{thought}</think>\n\n{calls}")
    assert accepts(compiler, text, may, calls)
    must = grammar(format_, text, prompt="<assistant><think>\n")
    assert accepts(compiler, text, must, f"{thought}</think>{calls}")
    assert not accepts(compiler, text, must, calls)
    not_now = grammar(format_, text, prompt="<assistant><think>\n\n</think>\n\n")
    assert accepts(compiler, text, not_now, calls)
    assert not accepts(compiler, text, not_now, f"<think></think>{calls}")


def test_harmony(text: TextModel, compiler: GrammarCompiler) -> None:
    format_ = FORMATS["harmony"]
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    both = grammar(format_, text, content=CONTENT)
    for answer in (format_.syntax.write([CALL]), f"<|channel|>final<|message|>{CALL[1]}"):
        assert accepts(compiler, text, both, answer)
        assert accepts(compiler, text, both, thought + answer)
    assert not accepts(compiler, text, both, CALL[1])
    assert not accepts(compiler, text, both, '<|channel|>final<|message|>{"city": 1}')


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"harmony", "llama3"}))
def test_calls_or_content(text: TextModel, compiler: GrammarCompiler, name: str) -> None:
    format_ = answer_format(THINK, name)
    both = grammar(format_, text, content=CONTENT)
    for answer in (format_.syntax.write([CALL]), CALL[1]):
        assert accepts(compiler, text, both, answer)
        assert accepts(compiler, text, both, f"<think>Hm</think>\n\n{answer}")
    assert not accepts(compiler, text, both, '{"city": 1}')
    only = grammar(format_, text, tools={}, content=CONTENT)
    assert accepts(compiler, text, only, CALL[1])
    assert not accepts(compiler, text, only, format_.syntax.write([CALL]))


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (Grammar(kind="json_object"), '{"a": [1]}'),
        (Grammar(kind="regex", source="[ab]+/c"), "ab/c"),
        (Grammar(kind="choice", source='["yes", "no"]'), "no"),
    ],
)
def test_kinds_of_content(text: TextModel, compiler: GrammarCompiler, content: Grammar, answer: str) -> None:
    format_ = answer_format(THINK, "hermes")
    asked = grammar(format_, text, prompt="<think>", tools={}, content=content)
    assert accepts(compiler, text, asked, f"Hm</think>\n{answer}")
    assert not accepts(compiler, text, asked, f"Hm</think>\n{answer}?")


def test_what_cannot_be_said_in_one_grammar(text: TextModel) -> None:
    with pytest.raises(InvalidRequestError, match="send tools or a response format"):
        grammar(FORMATS["llama3"], text, content=CONTENT)
    with pytest.raises(InvalidRequestError, match="a grammar of rules"):
        grammar(FORMATS["hermes"], text, content=Grammar(kind="lark", source='start: "a"'))
    with pytest.raises(InvalidRequestError, match="x-guidance"):
        grammar(FORMATS["hermes"], text, tools={"f": {"x-guidance": {}}})


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"harmony"}))
def test_whatever_is_drawn_is_read_as_calls(text: TextModel, compiler: GrammarCompiler, name: str) -> None:
    """As a model that knows nothing would draw."""
    rng = random.Random(name)
    format_ = FORMATS[name]
    eos = text.defaults.eos_token_ids[0]
    for _ in range(3):
        following = matcher(compiler, text, grammar(format_, text, max_calls=1))
        ids: list[int] = []
        while not following.is_complete:
            mask = following.allowed([])[0]
            allowed = [i for i in range(text.vocab_size) if allows(mask, i)]
            token_id = eos if eos in allowed else rng.choice(allowed)
            if token_id == eos:
                break
            following.take([token_id])
            ids.append(token_id)
            assert len(ids) < 5000
        parser = format_.make_parser(tools=TOOLS, prompt="", max_calls=1)()
        answer = text.tokenizer.decode(ids, skip_special_tokens=False)
        parts = [*parser.push(answer), *parser.flush()]
        deltas = [call for part in parts for call in part.tool_calls]
        assert [delta.name for delta in deltas if delta.name] in (["get_weather"], ["now"])
        arguments = json.loads("".join(delta.arguments for delta in deltas))
        assert arguments == {} if deltas[0].name == "now" else arguments["city"] in ("Paris", "Rome")
        assert not any(part.content for part in parts)
