"""The reference kernels against the formulas they come from, written out with loops over single numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import cache_with, paged_step, random, scattered_tables
from torch import Tensor

from localmoe.core.model import ModelShape, RopeScaling, WeightFormat
from localmoe.formats.packed import pack_matrix
from localmoe.formats.store import ExpertWeights
from localmoe.kernels import reference as kernels
from localmoe.kernels.base import placed_experts, rotary_frequencies
from localmoe.kernels.reference import ReferenceKernels


def tiny_shape(rope_scaling: RopeScaling | None = None) -> ModelShape:
    return ModelShape(
        model_type="llama",
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        num_experts=1,
        top_k=1,
        expert_size=8,
        vocab_size=8,
        max_context_tokens=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=rope_scaling,
    )


def naive_attention(q_THd: torch.Tensor, k_LGd: torch.Tensor, v_LGd: torch.Tensor) -> torch.Tensor:
    """Softmax attention, one query and one head at a time, in float64."""
    num_tokens, num_heads, head_dim = q_THd.shape
    length, num_groups, _ = k_LGd.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=torch.float64)
    for t in range(num_tokens):
        visible = length - num_tokens + t + 1
        for h in range(num_heads):
            g = h * num_groups // num_heads
            scores = k_LGd[:visible, g].double() @ q_THd[t, h].double() / math.sqrt(head_dim)
            out[t, h] = scores.softmax(0) @ v_LGd[:visible, g].double()
    return out


def test_rms_norm() -> None:
    x, weight = random(5, 32), random(32, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected)


def test_query_and_key_norms() -> None:
    x, weight = random(5, 3, 8), random(24, seed=1)
    assert kernels.qk_norm(x, None, 1e-5) is x
    alone = kernels.qk_norm(x, weight[:8], 1e-5)
    together = kernels.qk_norm(x, weight, 1e-5)
    for t in range(5):
        norm = (x[t].square().sum() / 24 + 1e-5).sqrt()
        torch.testing.assert_close(together[t].flatten(), x[t].flatten() / norm * weight)
        for h in range(3):
            norm = (x[t, h].square().sum() / 8 + 1e-5).sqrt()
            torch.testing.assert_close(alone[t, h], x[t, h] / norm * weight[:8])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 12), st.booleans(), st.integers(0, 1000))
def test_routing(num_tokens: int, num_experts: int, normalize: bool, seed: int) -> None:
    """Logits are rounded to few values, so that most choices are between equals."""
    k = 1 + seed % num_experts
    logits = random(num_tokens, num_experts, seed=seed).round()
    ids, weights = kernels.top_k_softmax(logits, k, normalize=normalize)
    assert (ids.dtype, weights.dtype, ids.shape, weights.shape) == (
        torch.int64,
        torch.float32,
        (num_tokens, k),
        (num_tokens, k),
    )
    for t, row in enumerate(logits.tolist()):
        expected = [e for _, e in sorted((-logit, e) for e, logit in enumerate(row))][:k]
        assert ids[t].tolist() == expected
        total = sum(math.exp(row[e]) for e in (expected if normalize else range(num_experts)))
        torch.testing.assert_close(weights[t], torch.tensor([math.exp(row[e]) / total for e in expected]))


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 40])
def test_projection(num_tokens: int) -> None:
    x, weight = random(num_tokens, 24), random(40, 24, seed=1)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(kernels.project(x, weight), expected, atol=1e-5, rtol=1e-5)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x, angles = random(3, 2, 8), random(3, 4, seed=1)
    out = kernels.rotate(x, angles.cos(), angles.sin())
    for t in range(3):
        for i in range(4):
            turned = torch.complex(x[t, :, i], x[t, :, i + 4]) * torch.polar(torch.tensor(1.0), angles[t, i])
            torch.testing.assert_close(torch.complex(out[t, :, i], out[t, :, i + 4]), turned)


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        (1 << 30, "kept"),  # every wavelength is short against it
        (1, "divided"),  # every wavelength is long against it
    ],
)
def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones(original: int, expected: str) -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=original)
    stretched, plain = rotary_frequencies(tiny_shape(scaling)), rotary_frequencies(tiny_shape())
    np.testing.assert_allclose(stretched, plain / (1.0 if expected == "kept" else 8.0), rtol=1e-6)


def test_frequencies_fall_from_one_in_equal_ratios() -> None:
    np.testing.assert_allclose(rotary_frequencies(tiny_shape()), [1.0, 1e-1, 1e-2, 1e-3], rtol=1e-6)


def moe(h: Tensor, ids: Tensor, shares: Tensor, experts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    packed = [[pack_matrix(matrix, WeightFormat.F32) for matrix in expert] for expert in experts]
    weights = [ExpertWeights(gate=gate, up=up, down=down) for gate, up, down in packed]
    out = torch.zeros_like(h)
    placed_experts(ReferenceKernels(1), weights)(h, ids, shares, out)
    return out


def random_experts(count: int, hidden: int, width: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    matrices = random(count, 3, hidden, width, seed=1)
    return [(gate.T.contiguous(), up.T.contiguous(), down) for gate, up, down in matrices]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000))
def test_experts(num_tokens: int, num_experts: int, seed: int) -> None:
    hidden, width, k = 8, 12, min(2, num_experts)
    x, experts = random(num_tokens, hidden, seed=seed), random_experts(num_experts, hidden, width)
    ids, weights = kernels.top_k_softmax(random(num_tokens, num_experts, seed=seed + 1), k, normalize=True)
    out = moe(x, ids, weights, experts)
    for t in range(num_tokens):
        expected = torch.zeros(hidden)
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up, down = experts[expert]
            expected += weight * (down @ ((gate @ x[t]) * (gate @ x[t]).sigmoid() * (up @ x[t])))
        torch.testing.assert_close(out[t], expected, atol=1e-5, rtol=1e-4)


def test_a_tokens_experts_do_not_depend_on_its_neighbours() -> None:
    x, experts = random(16, 8), random_experts(4, 8, 12)
    ids, weights = kernels.top_k_softmax(random(16, 4, seed=3), 2, normalize=True)
    together = moe(x, ids, weights, experts)
    alone = torch.cat([moe(x[[t]], ids[[t]], weights[[t]], experts) for t in range(16)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.integers(0, 1000),
)
def test_paged_attention(sequences: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    """Random batches of (cached, new) tokens, whose blocks lie anywhere, against attention over plain lists; what is
    not theirs is NaN."""
    (num_heads, num_groups), head_dim, block = heads, 8, 4
    lengths = [cached + new for cached, new in sequences]
    tables, num_blocks = scattered_tables(lengths, block, seed)
    step = paged_step(sequences, tables, block, head_dim)
    keys, values = cache_with(lengths, tables, (num_blocks, num_groups, head_dim, block))
    q = random(sum(new for _, new in sequences), num_heads, head_dim, seed=seed)
    expected = []
    for (first, new, _), length, table in zip(step.spans_S3.tolist(), lengths, tables, strict=True):
        places = [(int(table[position // block]), position % block) for position in range(length)]
        k = torch.stack([keys[block_id, :, :, offset] for block_id, offset in places])
        v = torch.stack([values[block_id, :, offset] for block_id, offset in places])
        expected.append(naive_attention(q[first : first + new], k, v))
    out = kernels.paged_attention(q, keys, values, step)
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_go_to_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    k, v, slots = random(3, 2, 8), random(3, 2, 8, seed=1), [5, 0, 11]
    keys, values = torch.zeros(3, 2, 8, 4, dtype=dtype), torch.zeros(3, 2, 4, 8, dtype=dtype)
    kernels.write_kv(k, v, keys, values, torch.tensor(slots))
    for slot in range(12):
        found_key, found_value = keys[slot // 4, :, :, slot % 4], values[slot // 4, :, slot % 4]
        if slot in slots:
            assert torch.equal(found_key, k[slots.index(slot)].to(dtype))
            assert torch.equal(found_value, v[slots.index(slot)].to(dtype))
        else:
            assert not found_key.any()
            assert not found_value.any()
