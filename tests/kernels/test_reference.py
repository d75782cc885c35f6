"""The reference kernels against the formulas they come from, written out with loops over single numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.core.model import ModelShape, RopeScaling
from localmoe.kernels import reference as kernels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 40])
def test_projection(num_tokens: int) -> None:
    x, weight = random(num_tokens, 24), random(40, 24, seed=1)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(kernels.project(x, weight), expected, atol=1e-5, rtol=1e-5)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x, angles = random(3, 2, 8), random(3, 4, seed=1)
    out = kernels.rotate(x, angles)
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
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "num_experts": 1}
    rest = {"top_k": 1, "expert_size": 8, "vocab_size": 8, "max_context_tokens": 8}
    plain = ModelShape(model_type="llama", rms_norm_eps=1e-5, rope_theta=1e4, **sizes, **rest)
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=original)
    stretched = ModelShape(
        model_type="llama", rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=scaling, **sizes, **rest
    )
    divisor = 1.0 if expected == "kept" else 8.0
    torch.testing.assert_close(kernels.rotary_frequencies(stretched), kernels.rotary_frequencies(plain) / divisor)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000))
def test_experts(num_tokens: int, num_experts: int, seed: int) -> None:
    hidden, width, k = 8, 12, min(2, num_experts)
    x = random(num_tokens, hidden, seed=seed)
    gate_up, down = random(num_experts, 2 * width, hidden, seed=1), random(num_experts, hidden, width, seed=2)
    ids, weights = kernels.top_k_softmax(random(num_tokens, num_experts, seed=seed + 1), k)
    out = kernels.moe(x, ids, weights, gate_up, down)
    for t in range(num_tokens):
        expected = torch.zeros(hidden)
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up = (gate_up[expert] @ x[t]).chunk(2)
            expected += weight * (down[expert] @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(out[t], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(num_tokens))


def test_a_tokens_experts_do_not_depend_on_its_neighbours() -> None:
    x = random(16, 8)
    gate_up, down = random(4, 24, 8, seed=1), random(4, 8, 12, seed=2)
    ids, weights = kernels.top_k_softmax(random(16, 4, seed=3), 2)
    together = kernels.moe(x, ids, weights, gate_up, down)
    alone = torch.cat([kernels.moe(x[[t]], ids[[t]], weights[[t]], gate_up, down) for t in range(16)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.integers(0, 1000),
)
def test_paged_attention(sequences: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    """Random batches of (cached, new) tokens, whose blocks lie anywhere, against attention over plain lists."""
    from localmoe.core.plans import SequenceStep
    from localmoe.core.request import SamplingParams
    from localmoe.engine.kv_cache import place

    (num_heads, num_groups), head_dim, block = heads, 8, 4
    sequences = sorted(sequences, key=lambda s: s[1] == 1)
    needed = [-(-(cached + new) // block) for cached, new in sequences]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    k_cache = random(len(order), block, num_groups, head_dim, seed=seed)
    v_cache = random(len(order), block, num_groups, head_dim, seed=seed + 1)
    steps, expected = [], []
    q = random(sum(new for _, new in sequences), num_heads, head_dim, seed=seed + 2)
    row = 0
    for index, ((cached, new), count) in enumerate(zip(sequences, needed, strict=True)):
        table, order = order[:count], order[count:]
        steps.append(
            SequenceStep(
                sequence_id=index,
                token_ids=(0,) * new,
                start=cached,
                block_table=tuple(table),
                samples=False,
                sampling=SamplingParams(max_tokens=1),
                seed=0,
                history=([], []),
                scores_prompt=False,
            )
        )
        k, v = (cache[table].flatten(0, 1)[: cached + new] for cache in (k_cache, v_cache))
        expected.append(naive_attention(q[row : row + new], k, v))
        row += new
    out = kernels.paged_attention(q, k_cache, v_cache, place(steps, block))
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-4)
