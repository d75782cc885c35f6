"""`bench kernels` on tiny sizes: every setting is there, and its figures hang together."""

from pathlib import Path

import pytest

_cpu = pytest.importorskip("localmoe._cpu")

from localmoe.bench import kernels as kernels_module  # noqa: E402
from localmoe.bench.kernels import CONTEXT_TOKENS, FORMATS, MATRIX_TOKENS, MOE_TOKENS, measure_kernels  # noqa: E402
from localmoe.bench.shapes import find_model  # noqa: E402
from localmoe.core.errors import EngineStartError  # noqa: E402
from localmoe.kernels.cpu import CpuKernels  # noqa: E402
from support.bench_models import EXPERT_SIZE, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, TOP_K, write_config  # noqa: E402


def test_every_kernel(tmp_path: Path) -> None:
    shape = find_model(str(write_config(tmp_path / "tiny.json"))).shape
    kernels = CpuKernels(_cpu.levels()[-1], 2, pin=False)
    report = measure_kernels(shape, kernels, 2, lambda stage: None, rotation_bytes=4 << 20, limit_s=0.0)
    assert (report.level, report.threads) == (_cpu.levels()[-1], 2)
    times = {(t.kernel, t.format, t.tokens, t.context_tokens): t for t in report.kernels}
    expected = {("matrix", weights, tokens, None) for weights in FORMATS for tokens in MATRIX_TOKENS}
    expected |= {("moe", weights, tokens, None) for weights in FORMATS for tokens in MOE_TOKENS}
    expected |= {("head", "int8", tokens, None) for tokens in (1, 8)} | {("attention", "int8", 512, 512)}
    expected |= {("attention", "int8", 1, context) for context in CONTEXT_TOKENS}
    assert times.keys() == expected
    assert len(times) == len(report.kernels)
    for time in report.kernels:
        assert time.median_us > 0
        assert (time.gb_s is None) == (time.roof_fraction is None) == (time.tokens > 16)
        if time.gb_s is not None and time.roof_fraction is not None:
            assert time.roof_fraction == pytest.approx(time.gb_s / report.read_bandwidth_gb_s)

    def flop(*key: object) -> float:
        return times[key].gflop_s * times[key].median_us * 1e3  # type: ignore[index]

    def num_bytes(*key: object) -> float:
        gb_s = times[key].gb_s  # type: ignore[index]
        assert gb_s is not None
        return gb_s * times[key].median_us * 1e3  # type: ignore[index]

    assert flop("matrix", "mxfp4", 64, None) == pytest.approx(2 * 64 * HIDDEN**2)
    assert flop("moe", "nvfp4", 512, None) == pytest.approx(2 * 512 * TOP_K * 3 * HIDDEN * EXPERT_SIZE)
    assert num_bytes("matrix", "nvfp4", 1, None) == pytest.approx(HIDDEN**2 * 4.5 / 8)
    assert num_bytes("moe", "mxfp4", 1, None) == pytest.approx(TOP_K * 3 * HIDDEN * EXPERT_SIZE * 4.25 / 8)
    projections, cached = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM, 2 * KV_HEADS * HEAD_DIM * 2
    assert num_bytes("attention", "int8", 1, 1024) == pytest.approx(projections * 8.5 / 8 + 1024 * cached)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "available_memory_bytes", lambda: 10**9)
    shape = find_model("olmoe-1b-7b").shape
    with pytest.raises(EngineStartError, match=r"measuring takes 3\.7 GB of memory, 1\.0 GB are available"):
        measure_kernels(shape, CpuKernels("avx2", 1, pin=False), 1, lambda stage: None)
