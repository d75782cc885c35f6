"""Answers of the engine that follow grammars: valid whatever the weights, and the same however they came about."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from localmoe.core.errors import InvalidRequestError, OverloadedError
from localmoe.core.request import FinishReason, Grammar, Request, RequestFailed, SamplingParams, TokenChunk
from localmoe.engine.config import EngineConfig
from localmoe.engine.engine import Engine
from localmoe.engine.load import load_decoder
from localmoe.engine.speculation import SpeculationController
from localmoe.formats.store import Store
from localmoe.text.tokenizer import Tokenizer
from support.json_schemas import Schema, json_schemas
from support.models import kernels_under_test, make_engine

VALIDATOR = jsonschema.Draft202012Validator
EOS = 1
PROMPT = [5, 17, 3, 99, 42, 8]


@pytest.fixture(scope="module")
def model_path(tiny_home: Path) -> Path:
    return tiny_home / "models/distinct-experts"


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.load(model_path)


@pytest.fixture(scope="module")
def new_engine(model_path: Path) -> Callable[..., Engine]:
    with Store.open(model_path / "stores/f32.store") as store:
        decoder = load_decoder(store, kernels_under_test())

    def new(num_blocks: int = 400, **config: Any) -> Engine:
        engine = make_engine(decoder, EngineConfig(**config), num_blocks)
        engine.take_grammars(model_path)
        return engine

    return new


def request(name: str, grammar: Grammar | None, *, max_tokens: int = 900, **fields: Any) -> Request:
    sampling = SamplingParams(
        max_tokens=max_tokens, grammar=grammar, **{"seed": 7, "stop_token_ids": (EOS,), **fields}
    )
    return Request(id=name, model="test", prompt_ids=PROMPT, sampling=sampling)


class Answers:
    """What became of some requests."""

    def __init__(self) -> None:
        self.token_ids: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.failures: dict[str, RequestFailed] = {}

    def take(self, outputs: list[TokenChunk | RequestFailed]) -> None:
        for output in outputs:
            if isinstance(output, RequestFailed):
                self.failures[output.request_id] = output
                continue
            self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason


def answer(engine: Engine, *requests: Request) -> Answers:
    answers = Answers()
    for each in requests:
        engine.add(each)
    while engine.has_work:
        answers.take(engine.step())
    return answers


def of_schema(schema: Schema) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema))


REGEX = Grammar(kind="regex", source=r"[a-f]{20}-\d+!")


@pytest.mark.slow
@settings(max_examples=50, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(st.lists(json_schemas(), min_size=4, max_size=4))
def test_answers_are_valid_by_their_schemas(
    new_engine: Callable[..., Engine], tokenizer: Tokenizer, schemas: list[Schema]
) -> None:
    engine = new_engine()
    answers = answer(engine, *(request(str(i), of_schema(schema)) for i, schema in enumerate(schemas)))
    assert not answers.failures
    for index, schema in enumerate(schemas):
        text = tokenizer.decode(answers.token_ids[str(index)])
        assert answers.reasons[str(index)] is FinishReason.STOP, text
        VALIDATOR(schema, format_checker=VALIDATOR.FORMAT_CHECKER).validate(json.loads(text))


def test_a_batch_of_grammars_is_as_each_alone(new_engine: Callable[..., Engine]) -> None:
    grammars: dict[str, Grammar | None] = {
        "none": None,
        "object": Grammar(kind="json_object"),
        "regex": REGEX,
        "the same": REGEX,
        "choice": Grammar(kind="choice", source='["red", "green", "blue"]'),
        "rules": Grammar(kind="lark", source='start: "<" WORD ("," WORD)~2 ">"\nWORD: /[a-z]{1,8}/'),
    }
    asked = [request(name, grammar, max_tokens=60) for name, grammar in grammars.items()]
    together = answer(new_engine(), *asked)
    assert not together.failures
    for each in asked:
        assert answer(new_engine(), each).token_ids[each.id] == together.token_ids[each.id]
    assert together.token_ids["regex"] == together.token_ids["the same"]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (REGEX, r"[a-f]{20}-\d+!"),
        (Grammar(kind="choice", source='["red", "green\\n\\"", "blue é"]'), 'red|green\n"|blue é'),
        (Grammar(kind="lark", source='start: "<" WORD ("," WORD)~2 ">"\nWORD: /[a-z]{1,8}/'), "<[a-z,]+>"),
        (Grammar(kind="regex", source="x{300}"), "x{300}"),
    ],
)
def test_an_answer_ends_where_its_sentence_must(
    new_engine: Callable[..., Engine], tokenizer: Tokenizer, grammar: Grammar, pattern: str
) -> None:
    # Without any stop token: nothing but the grammar can end it.
    answers = answer(new_engine(), request("a", grammar, stop_token_ids=()))
    assert answers.reasons == {"a": FinishReason.STOP}
    assert re.fullmatch(pattern, tokenizer.decode(answers.token_ids["a"]))


def test_a_stop_token_comes_only_where_the_sentence_may_end(
    new_engine: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    # Wanted above all, it comes as soon as it may.
    grammar = Grammar(kind="regex", source="(abc)+")
    answers = answer(new_engine(), request("a", grammar, logit_bias={EOS: 100.0}))
    assert tokenizer.decode(answers.token_ids["a"]) == "abc"
    assert answers.token_ids["a"][-1] == EOS
    assert answers.reasons == {"a": FinishReason.STOP}


def test_neither_bias_nor_temperature_brings_what_is_refused(
    new_engine: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    (unwanted,) = tokenizer.encode("z", add_special_tokens=False)
    (wanted,) = tokenizer.encode("a", add_special_tokens=False)
    bias = {unwanted: 100.0, wanted: -100.0}
    grammar = Grammar(kind="regex", source="a{9}")
    fields = {"greedy": {"temperature": 0.0}, "hot": {"temperature": 2.0}, "cold": {"temperature": 1e-4}}
    asked = [request(name, grammar, logit_bias=bias, top_k=1, **sampling) for name, sampling in fields.items()]
    answers = answer(new_engine(), *asked)
    assert {tokenizer.decode(token_ids) for token_ids in answers.token_ids.values()} == {"a" * 9}


def test_max_tokens_ends_an_answer_within_its_sentence(new_engine: Callable[..., Engine]) -> None:
    answers = answer(new_engine(), request("a", REGEX, max_tokens=5))
    assert answers.reasons == {"a": FinishReason.LENGTH}
    assert len(answers.token_ids["a"]) == 5


def test_drafts_change_no_answer(new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    # Texts that go on as they went: most guesses are right, and at the end all of them are too long.
    grammars = {
        "numbers": Grammar(kind="regex", source="(0123456789){8}"),
        "list": of_schema({"type": "array", "items": {"const": "again"}, "minItems": 12, "maxItems": 12}),
        "free": Grammar(kind="regex", source="([ab]{3}, ){20}"),
    }
    asked = [request(name, grammar, stop_token_ids=()) for name, grammar in grammars.items()]
    plain = answer(new_engine(speculation=False), *asked)

    def all_of_them(
        _: SpeculationController, proposals: Sequence[tuple[float, int]], max_tokens: int
    ) -> list[int]:
        return [available for _, available in proposals]

    monkeypatch.setattr(SpeculationController, "choose", all_of_them)
    engine = new_engine()
    drafted = answer(engine, *asked)
    assert drafted.token_ids == plain.token_ids
    assert drafted.reasons == plain.reasons == dict.fromkeys(grammars, FinishReason.STOP)
    assert engine.state().num_accepted_tokens > 50


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_another_engine_goes_on_with_the_same_tokens(new_engine: Callable[..., Engine], share: float) -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 4, "maxItems": 4}
    asked = request("a", of_schema(schema))
    whole = answer(new_engine(), asked).token_ids["a"]
    count = int(share * len(whole))
    resumed = msgspec.structs.replace(asked, resumed_ids=whole[:count])
    assert answer(new_engine(), resumed).token_ids["a"] == whole[count:]


def test_an_answer_that_was_never_of_the_grammar_does_not_go_on(
    new_engine: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    begun = tokenizer.encode("[1, 2", add_special_tokens=False)
    asked = msgspec.structs.replace(request("a", Grammar(kind="json_object")), resumed_ids=begun)
    failure = answer(new_engine(), asked).failures["a"]
    assert "not of its grammar" in failure.message
    assert not failure.invalid


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="regex", source="("),
        Grammar(kind="json_schema", source='{"not": {}}'),
        Grammar(kind="lark", source="start: missing"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_and_nobody_else_notices(
    new_engine: Callable[..., Engine], grammar: Grammar
) -> None:
    good = request("good", REGEX, max_tokens=10)
    alone = answer(new_engine(), good)
    beside = answer(new_engine(), request("bad", grammar), good)
    assert beside.failures["bad"].invalid
    assert beside.token_ids == alone.token_ids


def test_rules_may_refer_to_rules_to_any_depth(new_engine: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    rules = ["start: r0", *(f"r{i}: r{i + 1}" for i in range(9000)), 'r9000: "deep"']
    answers = answer(new_engine(), request("a", Grammar(kind="lark", source="\n".join(rules))))
    assert tokenizer.decode(answers.token_ids["a"]) == "deep"


def test_what_no_token_can_say_fails_its_own_request_only(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_digits(self: Tokenizer, token_id: int) -> bytes:
        found = token_bytes(self, token_id)
        return b"" if found.strip(b"0123456789") != found else found

    token_bytes = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", no_digits)
    letters = Grammar(kind="regex", source="[a-f]{5}")
    digits = Grammar(kind="regex", source="[a-f]{2}[0-9]")
    endless = Grammar(kind="regex", source="[a-f]{2}[0-9]?")
    answers = answer(
        new_engine(), request("bad", digits), request("end", endless, stop_token_ids=()), request("good", letters)
    )
    assert "cannot be followed" in answers.failures["bad"].message
    assert answers.failures["bad"].invalid  # or it would be tried in other engines, and be their fault
    assert "what no token of the model is" in answers.failures["end"].message
    assert answers.reasons == {"good": FinishReason.STOP}


def test_cancelling_frees_what_an_answer_held(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    engine.add(request("while compiling", REGEX))
    engine.cancel("while compiling")
    assert not engine.has_work
    engine.add(request("amid", Grammar(kind="json_object")))
    engine.add(request("other", REGEX))
    answers = Answers()
    while len(answers.token_ids.get("amid", ())) < 3:
        answers.take(engine.step())
    engine.cancel("amid")
    while engine.has_work:
        answers.take(engine.step())
    assert len(answers.token_ids["amid"]) == 3
    assert answers.reasons == {"other": FinishReason.STOP}
    assert engine.state().kv_blocks_used == 0


def test_preempted_answers_stay_within_their_grammars(
    new_engine: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    asked = [request(str(i), Grammar(kind="regex", source="[a-f]{120}"), seed=i) for i in range(6)]
    engine = new_engine(num_blocks=20)
    answers = answer(engine, *asked)
    assert engine.state().num_preemptions > 0
    assert answers.token_ids == answer(new_engine(), *asked).token_ids
    assert all(re.fullmatch("[a-f]{120}", tokenizer.decode(ids)) for ids in answers.token_ids.values())


def test_an_engine_without_the_tokenizer_refuses_grammars(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    engine.take_grammars(None)
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        engine.add(request("a", REGEX))
    assert not engine.has_work


def test_a_tokenizer_that_is_damaged_costs_requests_with_grammars_only(
    new_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = new_engine()
    engine.take_grammars(tmp_path)
    answers = answer(engine, request("bad", REGEX), request("good", None, max_tokens=4))
    assert "tokenizer.json" in answers.failures["bad"].message
    assert len(answers.token_ids["good"]) == 4


def test_requests_that_are_being_compiled_count_as_waiting(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(max_num_queued=2)
    engine.add(request("a", REGEX))
    engine.add(request("b", REGEX))
    assert engine.state().num_waiting == 2
    with pytest.raises(OverloadedError):
        engine.add(request("c", REGEX))
    answers = Answers()
    while engine.has_work:
        answers.take(engine.step())
    assert set(answers.reasons) == {"a", "b"}
