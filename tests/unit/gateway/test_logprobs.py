"""Log-probabilities by the hundred thousand: no token is looked up twice, and little is left for an answer's end."""

import json
import random
import time
from collections.abc import Iterator

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.request import FinishReason, TokenLogprob
from localmoe.gateway.answering.generation import ChoiceDelta, ScoredToken
from localmoe.gateway.context import ServedModel
from localmoe.gateway.openai.chat import ChatAnswer
from localmoe.gateway.openai.chat_schema import ChatCompletion, ChatCompletionRequest
from localmoe.gateway.openai.completions_schema import CompletionLogprobs
from localmoe.gateway.openai.logprobs import CompletionScores, Scorer
from localmoe.text.text_model import TextModel
from localmoe.text.tokenizer import Tokenizer
from support.tiny_text import served_model, write_tiny_text_model

NUM_TOKENS = 5000
NUM_TOP = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    text = TextModel.load(write_tiny_text_model(tmp_path_factory.mktemp("tiny")))
    return served_model(text, ScriptedBackend([5]))


@pytest.fixture(scope="module")
def scored(model: ServedModel) -> list[ScoredToken]:
    rng = random.Random(3)
    token_ids = range(3, 250)

    def top() -> list[tuple[int, float]]:
        return [(token_id, -rng.expovariate(1.0)) for token_id in rng.sample(token_ids, NUM_TOP)]

    return [
        ScoredToken(logprob=TokenLogprob(rng.choice(token_ids), float("-inf"), top()), text_offset=place)
        for place in range(NUM_TOKENS)
    ]


def deltas(scored: list[ScoredToken]) -> Iterator[ChoiceDelta]:
    for place, token in enumerate(scored, start=1):
        yield ChoiceDelta(
            index=0,
            text="x",
            scored=[token],
            finish_reason=FinishReason.LENGTH if place == len(scored) else None,
            prompt_tokens=3,
            completion_tokens=place,
            cached_tokens=0,
        )


def test_little_is_left_for_the_end_of_a_chats_answer(model: ServedModel, scored: list[ScoredToken]) -> None:
    body = ChatCompletionRequest.model_validate(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "logprobs": True,
            "top_logprobs": NUM_TOP,
        }
    )
    answer = ChatAnswer(body, model, 1, "chatcmpl-1")
    began_s = time.perf_counter()
    for delta in deltas(scored):
        answer.add(delta)
    added_s = time.perf_counter()
    whole = answer.whole()
    end_s = time.perf_counter() - added_s
    assert end_s < added_s - began_s
    logprobs = ChatCompletion.model_validate_json(whole).choices[0].logprobs  # as documented
    assert logprobs is not None
    assert len(logprobs.content) == NUM_TOKENS
    first, own = logprobs.content[0], scored[0].logprob
    tokenizer = model.local_text.tokenizer
    assert (first.token, first.logprob) == (tokenizer.token_text(own.token_id), -9999.0)
    assert [(top.token, top.logprob, bytes(top.bytes)) for top in first.top_logprobs] == [
        (tokenizer.token_text(token_id), logprob, tokenizer.token_bytes(token_id)) for token_id, logprob in own.top
    ]
    assert list(json.loads(whole)["choices"][0]) == ["index", "message", "logprobs", "finish_reason"]


def test_no_token_is_looked_up_twice(
    model: ServedModel, scored: list[ScoredToken], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[int] = []
    token_bytes = Tokenizer.token_bytes
    monkeypatch.setattr(
        Tokenizer, "token_bytes", lambda self, token_id: looked_up.append(token_id) or token_bytes(self, token_id)
    )
    entries, completions = Scorer(model), Scorer(model)
    known = {token_id for item in scored for token_id, _ in item.logprob.top}
    for _ in range(2):
        entries.entries(scored)
        assert len(looked_up) == 2 * len(known)  # its bytes and its text
    looked_up.clear()
    scores = CompletionScores([], [], [], [])
    for start in (0, NUM_TOKENS // 2):
        scores.add(completions.completion_scores(scored[start : start + NUM_TOKENS // 2], base_offset=7))
    assert len(looked_up) == len(known)
    documented = CompletionLogprobs.model_validate(
        {name: getattr(scores, name) for name in CompletionLogprobs.model_fields}
    )
    assert len(documented.top_logprobs) == NUM_TOKENS
    assert documented.text_offset[-1] == NUM_TOKENS - 1 + 7
