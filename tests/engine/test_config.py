"""What the engine makes of its settings."""

import pytest

from localmoe.core.errors import EngineStartError
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.engine.config import EngineConfig, kv_bytes_per_token

SHAPE = ModelShape(
    model_type="mixtral",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=4,
    top_k=2,
    expert_size=96,
    vocab_size=100,
    max_context_tokens=1024,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
F32 = WeightFormat.F32
CONTEXT_BYTES = 1024 * kv_bytes_per_token(SHAPE, "f32")


def test_a_cache_must_hold_one_full_context() -> None:
    with pytest.raises(EngineStartError, match="one sequence of 1024 tokens needs"):
        EngineConfig(kv_cache_bytes=CONTEXT_BYTES - 1).resolve(SHAPE, F32, 1 << 40)
    with pytest.raises(EngineStartError, match="not enough memory"):
        EngineConfig().resolve(SHAPE, F32, CONTEXT_BYTES - 1)
    assert EngineConfig(kv_cache_bytes=CONTEXT_BYTES).resolve(SHAPE, F32, 0).kv_cache_bytes == CONTEXT_BYTES


def test_an_automatic_cache_takes_a_quarter_of_what_is_free_within_reason() -> None:
    assert EngineConfig().resolve(SHAPE, F32, CONTEXT_BYTES).kv_cache_bytes == CONTEXT_BYTES
    assert EngineConfig().resolve(SHAPE, F32, 40 * CONTEXT_BYTES).kv_cache_bytes == 10 * CONTEXT_BYTES
    assert EngineConfig().resolve(SHAPE, F32, 1 << 40).kv_cache_bytes == 128 * CONTEXT_BYTES


def test_an_automatic_caches_share_can_be_set() -> None:
    tenth, half = EngineConfig(kv_cache_share=0.1), EngineConfig(kv_cache_share=0.5)
    assert tenth.resolve(SHAPE, F32, 40 * CONTEXT_BYTES).kv_cache_bytes == 4 * CONTEXT_BYTES
    assert tenth.resolve(SHAPE, F32, 5 * CONTEXT_BYTES).kv_cache_bytes == CONTEXT_BYTES
    assert half.resolve(SHAPE, F32, 40 * CONTEXT_BYTES).kv_cache_bytes == 20 * CONTEXT_BYTES
    for share in (0, 1.1):
        with pytest.raises(ValueError, match="kv_cache_share"):
            EngineConfig(kv_cache_share=share)


def test_a_cache_is_as_exact_as_the_weights_unless_it_says_otherwise() -> None:
    for weights, setting, dtype in (
        (F32, "auto", "f32"),
        (WeightFormat.INT8, "auto", "bf16"),
        (F32, "bf16", "bf16"),
    ):
        config = EngineConfig(kv_cache_dtype=setting).resolve(SHAPE, weights, CONTEXT_BYTES)
        assert config.kv_cache_dtype == dtype
        assert config.kv_cache_bytes == 1024 * kv_bytes_per_token(SHAPE, dtype)


def test_blocks_are_what_kernels_can_work_on() -> None:
    assert EngineConfig(block_tokens=32).block_tokens == 32
    with pytest.raises(ValueError, match="block_tokens is 24; it must be a multiple of 16"):
        EngineConfig(block_tokens=24)


def test_a_shorter_context_needs_less() -> None:
    config = EngineConfig(max_context_tokens=512).resolve(SHAPE, F32, CONTEXT_BYTES // 2)
    assert (config.max_context_tokens, config.kv_cache_bytes) == (512, CONTEXT_BYTES // 2)
    assert EngineConfig(max_context_tokens=1 << 20).resolve(SHAPE, F32, 1 << 40).max_context_tokens == 1024


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_a_device_has_a_name(device: str) -> None:
    assert EngineConfig(device=device).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device is"):
        EngineConfig(device=device)
