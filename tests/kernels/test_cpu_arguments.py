"""What the C++ extension refuses: whatever would read or write outside an array, with a ValueError or a TypeError."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cpu_levels import LEVELS, cpu_kernels, each_format, each_level
from kernel_samples import cache_with, paged_step, random, random_codes, scattered_tables, weight_matrix

from localmoe.core.errors import EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store import ExpertWeights
from localmoe.kernels.base import AttentionWeights, PagedStep, RouterWeights, placed_experts

_cpu = pytest.importorskip("localmoe._cpu", reason="the C++ kernels were not built")

F32 = WeightFormat.F32


def kernels() -> Any:
    """One level will do: all share the checks."""
    return cpu_kernels(LEVELS[0], 1)


def bind(packed: PackedMatrix, **other: Any) -> Any:
    parts = {
        "format": packed.format.value,
        "rows": packed.rows,
        "columns": packed.columns,
        "values": packed.values.numpy(),
        "scales": packed.scales.numpy(),
        "tensor_scale": packed.tensor_scale,
    }
    return _cpu.Matrix(**(parts | other))


@pytest.mark.parametrize(
    ("level", "num_threads"), [("neon", 1), ("", 1), ("avx2", 0), ("avx2", -1), ("avx2", 9999)]
)
def test_runtime(level: str, num_threads: int) -> None:
    with pytest.raises(ValueError, match=r"level|num_threads"):
        _cpu.Runtime(level, num_threads)


@each_format
def test_matrix(weights: WeightFormat) -> None:
    packed = random_codes(weights, 20, 64)
    bind(packed)
    values, scales = packed.values.numpy(), packed.scales.numpy()
    unfit: list[dict[str, Any]] = [
        {"format": "q4_0"},
        {"rows": 0},
        {"rows": 33},
        {"columns": 0},
        {"columns": 96},
        {"columns": 63 if weights.value in ("nvfp4", "mxfp4", "int8", "f32") else 62},
        {"values": values[:-1]},
        {"scales": scales[:-1] if len(scales) else np.zeros(1, np.uint8)},
        {"rows": 1 << 62},
        {"columns": 1 << 60},
    ]
    for wrong in unfit:
        with pytest.raises(ValueError, match=r"matrix|format|values|scales"):
            bind(packed, **wrong)
    mistyped: list[dict[str, Any]] = [
        {"values": values.astype(np.int8)},
        {"values": values[::2]},
        {"rows": -1},
        {"values": None},
    ]
    for wrong in mistyped:
        with pytest.raises(TypeError):
            bind(packed, **wrong)


def test_embedding() -> None:
    matrix = random_codes(F32, 20, 64)
    embed = kernels().embedding(matrix)
    for ids in ([20], [0, -1], [2**31 - 1]):
        with pytest.raises(ValueError, match="id"):
            embed(torch.tensor(ids, dtype=torch.int32))
    with pytest.raises(TypeError):
        embed(torch.tensor([0]))
    runtime, bound = _cpu.Runtime(LEVELS[0], 1), bind(matrix)
    for shape in ((2, 64), (1, 63)):
        with pytest.raises(ValueError, match="out"):
            runtime.embed(bound, np.zeros(1, np.int32), np.zeros(shape, np.float32))


@pytest.mark.parametrize("x", [(3, 63), (3, 65)])
def test_product_and_head(x: tuple[int, int]) -> None:
    matrix = random_codes(F32, 20, 64)
    with pytest.raises(ValueError, match="fit"):
        kernels().linear(matrix)(random(*x))
    with pytest.raises(ValueError, match="fit"):
        kernels().head(random(64), matrix, 1e-5)(random(*x))
    with pytest.raises(ValueError, match="fit"):
        kernels().head(random(x[1]), matrix, 1e-5)(random(3, 64))
    runtime, bound = _cpu.Runtime(LEVELS[0], 1), bind(matrix)
    for out in ((3, 19), (2, 20), (4, 20)):
        with pytest.raises(ValueError, match="fit"):
            runtime.linear(bound, np.zeros((3, 64), np.float32), np.zeros(out, np.float32))


def test_arrays_of_another_type_or_order() -> None:
    matrix = random_codes(F32, 20, 64)
    linear = kernels().linear(matrix)
    for x in (random(64, 3).T, random(6, 64)[::2], random(3, 128)[:, :64], random(3, 64).double(), random(64)):
        with pytest.raises((TypeError, ValueError)):
            linear(x)
    runtime, bound, x_TC = _cpu.Runtime(LEVELS[0], 1), bind(matrix), np.zeros((3, 64), np.float32)
    read_only = np.zeros((3, 20), np.float32)
    read_only.flags.writeable = False
    for out in (read_only, np.zeros((20, 3), np.float32).T, np.zeros((3, 20))):
        with pytest.raises(TypeError):
            runtime.linear(bound, x_TC, out)


@each_level
@each_format
def test_no_tokens_are_no_work(level: str, weights: WeightFormat) -> None:
    matrix, cpu = random_codes(weights, 20, 64), cpu_kernels(level)
    assert cpu.linear(matrix)(torch.empty(0, 64)).shape == (0, 20)
    assert cpu.head(random(64), matrix, 1e-5)(torch.empty(0, 64)).shape == (0, 20)
    assert cpu.embedding(matrix)(torch.empty(0, dtype=torch.int32)).shape == (0, 64)


def test_router() -> None:
    weights = RouterWeights(norm_D=random(64), router=random_codes(F32, 4, 64), top_k=2, normalize=True, eps=1e-5)
    many = RouterWeights(norm_D=random(8), router=random_codes(F32, 99, 8), top_k=65, normalize=True, eps=1e-5)
    for wrong, columns in (
        (weights, 63),
        (replace(weights, norm_D=random(63)), 64),
        (replace(weights, top_k=5), 64),
        (replace(weights, top_k=0), 64),
        (replace(weights, router=None), 63),
    ):
        with pytest.raises(ValueError, match=r"fit|top_k"):
            kernels().router(wrong)(random(3, columns))
    assert kernels().router(replace(many, top_k=64))(random(3, 8))[1].shape == (3, 64)
    with pytest.raises(EngineStartError, match="65 experts, 64 are most"):
        kernels().router(many)


def expert(width: int = 32, hidden: int = 64, weights: WeightFormat = F32) -> ExpertWeights:
    wide = weight_matrix(weights, width, hidden)
    return ExpertWeights(gate=wide, up=wide, down=weight_matrix(weights, hidden, width))


def test_experts() -> None:
    good = expert()
    for wrong in (
        [good, expert(width=64)],
        [good, expert(hidden=96)],
        [good, expert(weights=WeightFormat.BF16)],
        [replace(good, up=weight_matrix(F32, 48, 64))],
        [replace(good, down=good.gate)],
        [replace(good, down=weight_matrix(WeightFormat.INT8, 64, 32))],
    ):
        with pytest.raises(ValueError, match="expert"):
            placed_experts(kernels(), wrong)
    for sizes in ((0, 64, 32), (1, 0, 32), (1, 64, 1 << 31)):
        with pytest.raises(ValueError, match=r"no expert|2\^31"):
            kernels().experts(*sizes, F32)
    with pytest.raises(ValueError, match="32 must divide"):
        kernels().experts(1, 64, 33, WeightFormat.INT8)
    compute = placed_experts(kernels(), [good, good])
    h, ids, shares = random(3, 64), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    compute(h, ids, shares, h.clone())
    for arguments in (
        (random(3, 63), ids, shares, h.clone()),
        (h, ids, shares, random(3, 63)),
        (h, ids, shares, random(2, 64)),
        (h, ids[:2], shares, h.clone()),
        (h, ids, torch.ones(3, 1), h.clone()),
        (h, ids + 2, shares, h.clone()),
        (h, ids - 2, shares, h.clone()),
        (h, ids[:, :0], shares[:, :0], h.clone()),
        (h, torch.zeros(3, 65, dtype=torch.int32), torch.ones(3, 65), h.clone()),
        (h[:0], ids[:0], shares[:0], h[:0].clone()),
    ):
        with pytest.raises(ValueError, match=r"not \[T|top_k|out of range"):
            compute(*arguments)
    for arguments in ((h, ids.long(), shares, h.clone()), (h, ids, shares, random(3, 128)[:, :64])):
        with pytest.raises(TypeError):
            compute(*arguments)


def test_experts_in_parts_are_refused_out_of_order() -> None:
    runtime = kernels()
    first, second = (placed_experts(runtime, [expert(), expert()]) for _ in range(2))
    h, ids, shares = random(3, 64), torch.tensor([[0], [1], [0]], dtype=torch.int32), torch.ones(3, 1)
    with pytest.raises(ValueError, match="moe_begin"):
        first.compute([0])
    first.begin(h, ids)
    for wrong, match in (((second, [0]), "moe_begin"), ((first, [2]), "range"), ((first, [-1]), "range")):
        with pytest.raises(ValueError, match=match):
            wrong[0].compute(wrong[1])
    first.remove(1)
    with pytest.raises(ValueError, match="not placed"):
        first.compute([1])
    with pytest.raises(ValueError, match="not placed"):
        first(h, ids, shares, h.clone())
    with pytest.raises(ValueError, match="range"):
        first.remove(2)
    with pytest.raises(ValueError, match=r"not \[T, K\]"):
        first.finish(torch.ones(3, 2), h.clone())
    with pytest.raises(ValueError, match=r"not \[T, D\]"):
        first.finish(shares, h[:2].clone())
    first.finish(shares, h.clone())
    with pytest.raises(ValueError, match="moe_begin"):
        first.finish(shares, h.clone())


def attention() -> AttentionWeights:
    return AttentionWeights(
        norm_D=random(64),
        q=weight_matrix(F32, 64, 64),
        k=weight_matrix(F32, 32, 64),
        v=weight_matrix(F32, 32, 64),
        o=weight_matrix(F32, 64, 64),
        q_norm=None,
        k_norm=None,
        num_heads=4,
        num_kv_heads=2,
        eps=1e-5,
    )


@pytest.mark.parametrize(
    "differences",
    [
        {"norm_D": random(63)},
        {"num_heads": 0},
        {"num_heads": 3},
        {"num_heads": 5},
        {"num_heads": 64},
        {"num_kv_heads": 0},
        {"num_kv_heads": 3},
        {"num_kv_heads": 1},
        {"q": weight_matrix(F32, 48, 64)},
        {"k": weight_matrix(F32, 64, 64)},
        {"v": weight_matrix(F32, 32, 63)},
        {"v": weight_matrix(WeightFormat.BF16, 32, 64)},
        {"o": weight_matrix(F32, 63, 64)},
        {"q_norm": random(16)},
        {"q_norm": random(16), "k_norm": random(32)},
        {"q_norm": random(15), "k_norm": random(15)},
        {"q_norm": random(64), "k_norm": random(64)},
    ],
    ids=lambda differences: " ".join(differences),
)
def test_attention_weights_that_do_not_fit(differences: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"head|fit|hidden|formats|together"):
        kernels().attention(replace(attention(), **differences))


def edit(
    name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> Callable[[PagedStep], PagedStep]:
    return lambda step: replace(step, **{name: change(getattr(step, name).copy())})


def with_number(name: str, index: tuple[int, ...], number: int) -> Callable[[PagedStep], PagedStep]:
    def change(array: Any) -> Any:
        array[index] = number
        return array

    return edit(name, change)


@pytest.mark.parametrize(
    "wrong",
    [
        with_number("slots_T", (0,), -1),
        with_number("slots_T", (4,), 16 * 6),
        with_number("tables_SN", (1, 1), 6),
        with_number("tables_SN", (0, 0), -1),
        with_number("spans_S3", (0, 0), -1),
        with_number("spans_S3", (1, 0), 3),
        with_number("spans_S3", (0, 1), 0),
        with_number("spans_S3", (0, 1), 6),
        with_number("spans_S3", (0, 1), 2**31 - 1),
        with_number("spans_S3", (0, 2), -1),
        with_number("spans_S3", (1, 2), 60),
        with_number("spans_S3", (1, 2), 2**31 - 1),
        edit("slots_T", lambda slots: slots[:-1]),
        edit("cosines_Td", lambda angles: angles[:-1]),
        edit("sines_Td", lambda angles: angles[:, :-1].copy()),
        edit("spans_S3", lambda spans: spans[:, :2].copy()),
        edit("tables_SN", lambda tables: tables[:1]),
        edit("tables_SN", lambda tables: tables[:, :1].copy()),
    ],
)
def test_steps_that_leave_the_cache(wrong: Callable[[PagedStep], PagedStep]) -> None:
    tables, num_blocks = scattered_tables([2, 40], 16)
    step = paged_step([(0, 2), (37, 3)], tables, 16, 16)
    keys, values = cache_with([0, 37], tables, (num_blocks, 2, 16, 16))
    attend, x = kernels().attention(attention()), random(5, 64)
    attend(x, keys, values, step)
    before = (x.clone(), keys.clone(), values.clone())
    with pytest.raises(ValueError, match=r"slot|block|span|angles|tables"):
        attend(x, keys, values, wrong(step))
    for found, expected in zip((x, keys, values), before, strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


def test_caches_that_do_not_fit() -> None:
    tables, num_blocks = scattered_tables([5], 16)
    step = paged_step([(0, 5)], tables, 16, 16)
    attend, x = kernels().attention(attention()), random(5, 64)
    keys, values = cache_with([0], tables, (num_blocks, 2, 16, 16))
    for wrong_keys, wrong_values in (
        (keys[:, :1].contiguous(), values),
        (keys, values[:, :1].contiguous()),
        (keys[:-1], values),
        (keys[..., :8].contiguous(), values[:, :, :8].contiguous()),
        (keys.bfloat16(), values),
    ):
        with pytest.raises(ValueError, match=r"cache|tokens of a block"):
            attend(x, wrong_keys, wrong_values, step)
    with pytest.raises(ValueError, match="x or slots"):
        attend(random(5, 63), keys, values, step)
    with pytest.raises(TypeError):
        attend(random(5, 128)[:, :64], keys, values, step)
