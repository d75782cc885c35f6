"""Steps over several sequences at once, by a plain model of transformers: DeepSpeed is not needed for them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from localmoe.backends.deepspeed_worker.attention import SequenceCache, _attention
from localmoe.backends.deepspeed_worker.launch import Step, Work
from localmoe.backends.deepspeed_worker.model import Model
from localmoe.core.errors import EngineStartError
from localmoe.core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=99, temperature=0.0, logprobs=0)


@pytest.fixture(scope="module", params=["distinct-experts", "dense", "olmoe", "qwen3_moe"])
def reference(request: pytest.FixtureRequest, tiny_home: Path) -> Any:
    path = tiny_home / "checkpoints" / request.param
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def model_of(module: Any) -> tuple[Model, SequenceCache]:
    """The same weights, with our attention."""
    cache = SequenceCache()
    transformers.AttentionInterface.register("test_sequences", cache.attend)
    config = copy.deepcopy(module.config)  # which it changes
    ours = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="test_sequences").eval()
    ours.load_state_dict(module.state_dict())

    def forward(token_ids_1T: Tensor, positions_1T: Tensor, rows_R: Tensor) -> Tensor:
        logits: Tensor = ours(
            input_ids=token_ids_1T, position_ids=positions_1T, use_cache=False, logits_to_keep=rows_R
        ).logits
        return logits

    return Model(forward, cache, torch.device("cpu")), cache


def work(sequence_id: int, ids: list[int], start: int = 0, **fields: Any) -> Work:
    return Work(sequence_id=sequence_id, token_ids=ids, start=start, sampling=GREEDY, seed=0, **fields)


def logprobs(module: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def test_sequences_beside_each_other_are_as_alone(reference: Any) -> None:
    """Prompts in chunks, single tokens and sequences that come and go, over more than one page."""
    model, cache = model_of(reference)
    chance = torch.Generator().manual_seed(0)
    texts = {name: torch.randint(300, (length,), generator=chance).tolist() for name, length in ((0, 300), (1, 9))}
    texts[2] = texts[1][::-1]
    pieces = {0: [(0, 250), (250, 299), (299, 300)], 1: [(0, 7), (7, 8), (8, 9)], 2: [(0, 9)]}
    for index in range(3):
        present = {name: spans[index] for name, spans in pieces.items() if index < len(spans)}
        parts = [
            work(name, texts[name][first:end], first, samples=True, targets=texts[name][first + 1 : end + 1])
            for name, (first, end) in present.items()
        ]
        results = model.step(Step(forget=[2] if index else [], work=parts, computes=True))
        for result, (name, (first, end)) in zip(results, present.items(), strict=True):
            expected = logprobs(reference, texts[name][:end])
            assert result.token_id == int(expected[-1].argmax())
            assert result.logprob is not None
            assert result.logprob.logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)
            scores = [score.logprob for score in result.prompt_logprobs]
            following = texts[name][first + 1 : end + 1]
            assert scores == pytest.approx(
                [float(expected[first + i, token]) for i, token in enumerate(following)], abs=1e-4
            )
    assert [cache.num_layers(name) > 0 for name in (0, 1, 2)] == [True, True, False]


def test_a_rank_without_work_computes_along_and_keeps_nothing(reference: Any) -> None:
    model, cache = model_of(reference)
    assert model.step(Step(forget=[], work=[], computes=True)) == []
    assert cache.num_layers(-1) == 0


def test_a_fault_is_one_sequences_own(reference: Any) -> None:
    model, _ = model_of(reference)
    bad = SamplingParams(max_tokens=1, temperature=0.0, logit_bias={1: float("inf")})
    parts = [
        work(0, [5, 6], samples=True),
        Work(sequence_id=1, token_ids=[5, 6], start=0, sampling=bad, seed=0, samples=True),
    ]
    good, failed = model.step(Step(forget=[], work=parts, computes=True))
    assert good.fault is None
    assert good.token_id is not None
    assert failed.fault == "the logits of the next token are not finite numbers"


def test_a_model_of_which_not_all_layers_are_attention_does_not_start(reference: Any) -> None:
    model, _ = model_of(reference)
    num_layers = reference.config.num_hidden_layers
    assert model.warm_up(num_layers) > 0
    with pytest.raises(EngineStartError, match=f"only {num_layers} of the model's {num_layers + 1} layers"):
        model.warm_up(num_layers + 1)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_that_asks_for_more_than_there_is_does_not_start(name: str) -> None:
    cache = SequenceCache()
    cache.begin([(0, 0, 1)])
    one = torch.zeros(1, 1, 1, 4)
    with pytest.raises(EngineStartError, match=name):
        cache.attend(torch.nn.Module(), one, one, one, None, **{name: torch.ones(1)})


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 9), (9, 9), (4, 9)])
def test_windows_see_what_their_definition_says(count: int, length: int, window: int | None) -> None:
    chance = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, count, 8, generator=chance)
    keys, values = torch.randn(2, 2, length, 8, generator=chance)
    rows, columns = torch.arange(length - count, length)[:, None], torch.arange(length)
    seen = (columns <= rows) & (columns > rows - (window or length))
    products = query[0] @ keys.repeat_interleave(2, 0).transpose(1, 2) * 0.5
    shares = products.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = shares @ values.repeat_interleave(2, 0)
    torch.testing.assert_close(_attention(query, keys, values, 0.5, window)[0], expected)
