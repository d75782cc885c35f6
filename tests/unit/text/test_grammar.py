"""Grammars compiled for a tokenizer, and what they let come."""

import json
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.request import Grammar
from localmoe.text.grammar import GrammarCompiler, GrammarMatcher
from localmoe.text.tokenizer import Tokenizer
from support.json_schemas import Schema, json_schemas
from support.tiny_text import write_tiny_text_model

EOS = 1
NUM_UNUSED = 7
"""Ids of the model that no token has."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tiny_text_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_UNUSED)


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def bits(mask: bytes) -> set[int]:
    return {index for index in range(8 * len(mask)) if mask[index >> 3] >> (index & 7) & 1}


def next_ids(matcher: GrammarMatcher) -> set[int]:
    [mask] = matcher.allowed([])
    return bits(mask)


def test_exactly_the_tokens_that_go_on_may_come(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(regex("hello|he[xy]z"), stop_token_ids=[EOS])
    texts = {token_id: tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}
    begins = {i for i, text in texts.items() if text and (b"hello".startswith(text) or text in (b"hex", b"hey"))}
    assert next_ids(matcher) == {i for i in begins if not tokenizer.is_special(i)}
    matcher.take(ids(tokenizer, "hex"))
    assert {texts[token_id] for token_id in next_ids(matcher)} == {b"z"}


def test_special_tokens_are_no_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (eos,) = ids(tokenizer, "<|im_end|>")
    matcher = compiler.matcher(regex(r"<\|im_end\|>"))
    assert eos not in next_ids(matcher)
    assert next_ids(matcher) == set(ids(tokenizer, "<"))


def test_stop_tokens_may_come_where_a_text_may_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (a,) = ids(tokenizer, "a")
    matcher = compiler.matcher(regex("a{2,3}"), stop_token_ids=[EOS, 40])
    matcher.take([a])
    assert next_ids(matcher) == {a}
    matcher.take([a])
    assert next_ids(matcher) == {a, EOS, 40}
    assert not matcher.is_complete
    matcher.take([a])
    assert matcher.is_complete
    # An answer that ended there, and whose end nobody heard of.
    assert next_ids(matcher) == {EOS, 40}
    assert all(i < tokenizer.vocab_size for i in next_ids(matcher))


def test_drafts_are_viable_as_far_as_they_do_not_end_the_answer(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    a, b, c = (ids(tokenizer, char)[0] for char in "abc")
    matcher = compiler.matcher(regex("abcab"))
    for draft, count in [
        ([], 0),
        ([a, b], 2),
        ([a, c, b], 1),
        ([b], 0),
        ([a, b, c, a, b], 4),
        ([a, b, c, a, b, c], 4),
    ]:
        assert matcher.count_viable(draft) == count
        masks = matcher.allowed(draft[:count])
        assert [bits(mask) for mask in masks] == [{token_id} for token_id in [a, b, c, a, b][: count + 1]]
    matcher.take([a, b])
    assert matcher.count_viable([c, a, b]) == 2
    assert next_ids(matcher) == {c}


@settings(max_examples=60, deadline=None)
@given(json_schemas(), st.randoms(use_true_random=False), st.data())
def test_looking_ahead_changes_nothing(
    compiler: GrammarCompiler, schema: Schema, random: Random, data: st.DataObject
) -> None:
    grammar = Grammar(kind="json_schema", source=json.dumps(schema))
    plain, drafting = compiler.matcher(grammar), compiler.matcher(grammar)
    taken: list[int] = []
    while len(taken) < 40 and not plain.is_complete:
        draft = data.draw(st.lists(st.integers(0, 300), max_size=3)) if len(taken) < 5 else []
        drafting.allowed(draft[: drafting.count_viable(draft)])
        allowed = sorted(next_ids(plain))
        assert allowed == sorted(next_ids(drafting))
        if not allowed:
            break
        taken.append(random.choice(allowed))
        plain.take(taken[-1:])
        drafting.take(taken[-1:])
    assert compiler.matcher(grammar, resumed_ids=taken).is_complete == plain.is_complete == drafting.is_complete


def test_what_was_generated_before_is_matched_first(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(regex("abcab"), resumed_ids=ids(tokenizer, "abc"))
    assert next_ids(matcher) == set(ids(tokenizer, "a"))
    with pytest.raises(EngineFaultError, match="not of its grammar"):
        compiler.matcher(regex("abcab"), resumed_ids=ids(tokenizer, "abb"))


def test_a_matcher_whose_answer_has_left_its_grammar_stays_failed(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.matcher(regex("abcab"))
    with pytest.raises(EngineFaultError):
        matcher.take(ids(tokenizer, "b"))
    with pytest.raises(EngineFaultError):
        matcher.allowed([])
    # Others of the same grammar do not suffer.
    assert next_ids(compiler.matcher(regex("abcab"))) == set(ids(tokenizer, "a"))


def test_answers_of_one_grammar_do_not_mix(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    first, second = (compiler.matcher(regex("ax|by")) for _ in range(2))
    first.take(ids(tokenizer, "a"))
    second.take(ids(tokenizer, "b"))
    assert next_ids(first) == set(ids(tokenizer, "x"))
    assert next_ids(second) == set(ids(tokenizer, "y"))


def test_a_text_without_end_costs_no_more_for_what_is_certain(compiler: GrammarCompiler) -> None:
    for source in ("a{1000000}", "(a?){5000}a{5000}", "(abcdefghij){100000}"):
        matcher = compiler.matcher(regex(source))
        started_s = time.thread_time()
        matcher.take(list(next_ids(matcher))[:1])
        matcher.allowed([])
        assert time.thread_time() - started_s < 0.5


def test_spaces_in_json_come_to_an_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (space,) = ids(tokenizer, " ")
    matcher = compiler.matcher(Grammar(kind="json_object"), resumed_ids=ids(tokenizer, "{"))
    count = 0
    while count < 100 and space in next_ids(matcher):
        matcher.take([space])
        count += 1
    assert 8 <= count <= 64


@pytest.mark.parametrize(
    ("kind", "source", "text"),
    [
        ("json_object", "", '{"a": [1, {"b": null}]}'),
        ("json_schema", '{"type": "array", "items": {"type": "integer"}}', "[ 1,\n  -20]"),
        ("regex", r"a/b\d+", "a/b07"),
        ("choice", '["a/b", "\\u0000\\n\\"\\\\é🎉"]', '\x00\n"\\é🎉'),
        ("lark", 'start: "<" /[a-z]+/ ">"', "<abc>"),
        ("lark", '{"not": "JSON"}', None),
    ],
)
def test_each_kind(
    compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, source: str, text: str | None
) -> None:
    grammar = Grammar(kind=kind, source=source)  # type: ignore[arg-type]
    if text is None:
        with pytest.raises(InvalidRequestError):
            compiler.matcher(grammar)
        return
    matcher = compiler.matcher(grammar, stop_token_ids=[EOS], resumed_ids=ids(tokenizer, text))
    assert EOS in next_ids(matcher)


def test_a_sentencepiece_models_tokens_spell_their_spaces(tmp_path: Path) -> None:
    path = write_tiny_text_model(tmp_path)
    serialized = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": {"<unk>": 0, "▁a": 1, "▁": 2, "a": 3, "<0x0A>": 4},
            "merges": [["▁", "a"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(serialized))
    compiler = GrammarCompiler(Tokenizer.load(path), 5)
    assert next_ids(compiler.matcher(regex(" a"))) == {1, 2}
    assert next_ids(compiler.matcher(regex("\n?a"))) == {3, 4}
