"""Skipping experts of little weight: the arithmetic, what it leaves alone, and that nothing is read for them."""

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.core.events import TierState
from localmoe.core.model import ModelShape
from localmoe.core.protocols import ExpertExecutor
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.config import EngineConfig
from localmoe.engine.expert_threshold import (
    StallFraction,
    ThresholdedExperts,
    adaptive_threshold,
    drop_experts,
    with_threshold,
)
from localmoe.engine.load import load_decoder, load_engine, load_tiered
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from localmoe.tiers.config import TiersConfig
from localmoe.tiers.host import stride_bytes
from support.models import FakeExperts, greedy, kernels_under_test, paged_logits, routed_to, run

SHAPE = ModelShape(
    model_type="mixtral",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    top_k=4,
    expert_size=96,
    vocab_size=100,
    max_context_tokens=1024,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
PLENTY = 1 << 30


def dropped(weights: list[float], threshold: float, *, normalize: bool) -> tuple[list[int], list[float]]:
    ids_TK = torch.arange(10, 10 + len(weights), dtype=torch.int32)[None]
    ids_TK, weights_TK = drop_experts(ids_TK, torch.tensor([weights]), threshold, normalize=normalize)
    assert (ids_TK.dtype, weights_TK.dtype) == (torch.int32, torch.float32)
    return ids_TK[0].tolist(), weights_TK[0].tolist()


def test_what_is_below_the_threshold_names_no_expert_and_has_no_weight() -> None:
    ids, weights = dropped([0.5, 0.3125, 0.125, 0.0625], 0.2, normalize=False)
    assert (ids, weights) == ([10, 11, -1, -1], [0.5, 0.3125, 0.0, 0.0])


def test_the_threshold_is_of_a_share_of_the_chosen_experts_weights() -> None:
    # Probabilities of all experts, as a model without normalisation has them: shares are 1/2, 1/4, 1/8, 1/8.
    ids, weights = dropped([0.25, 0.125, 0.0625, 0.0625], 0.2, normalize=False)
    assert (ids, weights) == ([10, 11, -1, -1], [0.25, 0.125, 0.0, 0.0])
    assert dropped([0.25, 0.125, 0.0625, 0.0625], 0.125, normalize=False)[0] == [10, 11, 12, 13]


def test_where_the_model_normalises_what_is_left_takes_all() -> None:
    ids, weights = dropped([0.5, 0.25, 0.125, 0.125], 0.2, normalize=True)
    assert ids == [10, 11, -1, -1]
    assert weights == pytest.approx([2 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize("normalize", [False, True])
def test_the_first_always_stays(normalize: bool) -> None:
    ids, weights = dropped([0.25, 0.25, 0.25, 0.25], 1.0, normalize=normalize)
    assert (ids, weights) == ([10, -1, -1, -1], [1.0 if normalize else 0.25, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_that_are_not_numbers_stay(normalize: bool) -> None:
    ids, weights = dropped([torch.nan] * 4, 0.5, normalize=normalize)
    assert ids == [10, 11, 12, 13]
    assert all(weight != weight for weight in weights)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 20), st.floats(0, 1), st.booleans(), st.integers(0, 1000))
def test_a_token_gets_the_same_alone_and_nothing_changes_without_a_drop(
    top_k: int, num_tokens: int, threshold: float, normalize: bool, seed: int
) -> None:
    scores = torch.randn(num_tokens, 12, generator=torch.Generator().manual_seed(seed))
    weights_TK, ids_TK = scores.softmax(-1).topk(top_k)
    if normalize:
        weights_TK /= weights_TK.sum(-1, keepdim=True)
    before = (ids_TK.clone(), weights_TK.clone())
    ids, weights = drop_experts(ids_TK, weights_TK, threshold, normalize=normalize)
    for t in range(num_tokens):
        alone = drop_experts(ids_TK[[t]], weights_TK[[t]], threshold, normalize=normalize)
        assert torch.equal(alone[0][0], ids[t])
        assert torch.equal(alone[1][0], weights[t])
        if torch.equal(ids[t], ids_TK[t]):
            assert torch.equal(weights[t], weights_TK[t])
    if normalize:
        torch.testing.assert_close(weights.sum(-1), torch.ones(num_tokens))
    assert torch.equal(ids_TK, before[0])  # the router's own arrays are left alone
    assert torch.equal(weights_TK, before[1])


def test_a_threshold_is_asked_for_once_a_step() -> None:
    thresholds = iter([0.0, 0.3])
    seen: list[list[int]] = []
    inner = FakeExperts(lambda routed, x: seen.append(routed.ids_TK[0].tolist()))
    experts = ThresholdedExperts(inner, lambda: next(thresholds), normalize=True)
    h, ids, weights = torch.zeros(1, 4), torch.tensor([[5, 6]], dtype=torch.int32), torch.tensor([[0.8, 0.2]])
    for _ in range(2):
        experts.begin_step([False])
        for layer in range(2):
            experts(routed_to(layer, h, ids, weights), h)
    assert seen == [[5, 6], [5, 6], [5, -1], [5, -1]]


def test_an_adaptive_threshold_rises_under_stall_only() -> None:
    stalls = [0.0, 0.1, 0.55, 1.0, 0.0]
    fractions = iter(stalls)
    threshold = adaptive_threshold(0.01, 8, lambda: next(fractions))
    found = [threshold() for _ in stalls]
    ceiling = 0.5 / 8
    assert found == pytest.approx([0.01, 0.01, (0.01 + ceiling) / 2, ceiling, 0.01])
    assert adaptive_threshold(0.2, 8, lambda: 1.0)() == 0.2  # never below what was asked for


def test_stall_is_the_share_of_recent_time() -> None:
    now_s = stall_s = 0.0
    fraction = StallFraction(lambda: stall_s, lambda: now_s)
    for _ in range(60):
        now_s, stall_s = now_s + 0.1, stall_s + 0.04
        latest = fraction()
    assert latest == pytest.approx(0.4, abs=1e-3)
    assert fraction() == latest  # no time has passed
    for _ in range(60):
        now_s += 0.1
        latest = fraction()
    assert latest == pytest.approx(0, abs=1e-3)


class WaitingExperts(FakeExperts):
    """Some are not in memory."""

    def state(self) -> TierState:  # type: ignore[override]
        return TierState(**dict.fromkeys(TierState.__struct_fields__, 0))


def test_off_means_the_very_same_experts() -> None:
    resident, waiting = FakeExperts(lambda *_: None), WaitingExperts(lambda *_: None)
    assert with_threshold(resident, EngineConfig(), SHAPE) is resident
    assert with_threshold(waiting, EngineConfig(), SHAPE) is waiting
    # There is nothing to wait for, and nothing to choose from.
    assert with_threshold(resident, EngineConfig(adaptive_expert_threshold=True), SHAPE) is resident
    one = msgspec.structs.replace(SHAPE, top_k=1)
    assert with_threshold(resident, EngineConfig(expert_threshold=0.5), one) is resident


def test_what_is_lossy_says_so(caplog: pytest.LogCaptureFixture) -> None:
    resident, waiting = FakeExperts(lambda *_: None), WaitingExperts(lambda *_: None)
    for experts, config in (
        (resident, EngineConfig(expert_threshold=0.1)),
        (waiting, EngineConfig(adaptive_expert_threshold=True)),
    ):
        found = with_threshold(experts, config, SHAPE)
        assert isinstance(found, ThresholdedExperts)
        assert found.state() == experts.state()
    assert [message.split(":")[0] for message in caplog.messages] == ["lossy", "lossy"]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_a_share(value: float) -> None:
    with pytest.raises(ValueError, match=r"expert_threshold is .*; it must be from 0 to 1"):
        EngineConfig(expert_threshold=value)
    assert EngineConfig(expert_threshold=1).expert_threshold == 1


def random_ids(count: int) -> list[int]:
    ids: list[int] = torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(5)).tolist()
    return ids


def tiered(store: Store, num_slots: int) -> tuple[Decoder, TieredExperts]:
    plan = MemoryPlan(
        budget_bytes=PLENTY,
        kv_cache_bytes=0,
        workspace_bytes=0,
        dense_bytes=0,
        num_slots=num_slots,
        slot_bytes=stride_bytes(store.blob_bytes),
    )
    decoder, _ = load_tiered(store, kernels_under_test(), plan, TiersConfig(prefetch_layers=0))
    assert isinstance(decoder.experts, TieredExperts)
    return decoder, decoder.experts


def thresholded(experts: ExpertExecutor[Tensor], threshold: float, shape: ModelShape) -> ThresholdedExperts:
    return ThresholdedExperts(experts, lambda: threshold, normalize=shape.norm_top_k)


@pytest.mark.parametrize("chunk_tokens", [1, 7])
@torch.inference_mode()
def test_what_is_dropped_is_not_read_and_the_tiers_do_not_show(tiny_home: Path, chunk_tokens: int) -> None:
    token_ids = random_ids(24)
    logits: dict[str, Tensor] = {}
    needed: dict[str, int] = {}
    with Store.open(tiny_home / "models/olmoe/stores/f32.store") as store:
        shape = store.shape
        for threshold in (0.0, 0.35, 1.0):
            resident = load_decoder(store, kernels_under_test())
            resident.experts = thresholded(resident.experts, threshold, shape)
            logits[f"resident {threshold}"] = paged_logits(resident, token_ids, chunk_tokens)
            decoder, experts = tiered(store, 9)
            decoder.experts = thresholded(experts, threshold, shape)
            logits[f"tiered {threshold}"] = paged_logits(decoder, token_ids, chunk_tokens)
            assert torch.equal(logits[f"tiered {threshold}"], logits[f"resident {threshold}"])
            state = experts.state()
            needed[f"{threshold}"] = state.hits + state.misses
    assert needed["1.0"] < needed["0.35"] < needed["0.0"]
    if chunk_tokens == 1:
        assert needed["0.0"] == 24 * shape.num_layers * shape.top_k
        assert needed["1.0"] == 24 * shape.num_layers  # the first expert of each token and layer
    assert not torch.equal(logits["tiered 0.35"], logits["tiered 0.0"])


def test_the_engine_applies_what_is_set(tiny_home: Path) -> None:
    store_path = tiny_home / "models/olmoe/stores/f32.store"
    tokens = {}
    for threshold in (0.0, 1e-9, 0.5):
        config = EngineConfig(num_threads=2, expert_threshold=threshold)
        engine = load_engine("test", store_path, config, PLENTY)
        tokens[threshold] = run(engine, [greedy("r", random_ids(24), 16)])
    assert tokens[1e-9] == tokens[0.0] != tokens[0.5]
